"""Who may write into a run's folder: one job at a time, and of its processes the first rank of one stage.

Two locks. `.job.lock` keeps other jobs out, at once: a pipeline holds it over all its stages and tells them so by the
environment, a stage that was started alone holds it itself. `.stage.lock` is held by the stage that writes; what a
killed pipeline left behind ends by itself, so the next one waits for it. `shards.files.lock` says what is promised
where.
"""

import os
from pathlib import Path

from shards.files.lock import FileLock, read_holder, take
from shards.files.write import temporary_path, write_atomically
from shards.status import print_status

JOB, STAGE = ".job.lock", ".stage.lock"
HELD_BY = "DISTILL_JOB"  # in the environment of a pipeline's stages: who holds the job's lock, as its file says
PATIENCE_SECONDS = 3.0  # for the rest of a job whose launcher was killed
STAGE_PATIENCE_SECONDS = 60.0  # for that of a pipeline: torchrun and queues leave it 30 s
_held: set[tuple[int, Path]] = set()  # processes and folders


class RunLock:
    """The right to write into a run's folder, which is made and proved writable.

    Ranks other than the first have no part in it, and within one process the first that asks has it for all.

    Args:
        folder: the folder of the run.
        pipeline: whether it is for the stages that this process starts.
        shared: whether other jobs may hold it too, that share it as well.
    """

    def __init__(self, folder: Path, *, pipeline: bool = False, shared: bool = False):
        self.folder = Path(os.path.abspath(folder))
        self.pipeline, self.shared = pipeline, shared
        self._locks: list[FileLock | None] = []
        self._mark = (os.getpid(), self.folder)

    def acquire(self) -> "RunLock":
        """Take the lock unless this process has it.

        Raises:
            FileExistsError: another job has it; the message names command, process, host and time.
            OSError: nothing can be written into the folder.
        """
        if os.environ.get("RANK", "0") != "0" or self._mark in _held:
            return self
        make_run_folder(self.folder)
        refusal = (
            f"run folder {self.folder} is in use by {{holder}}, but two jobs would mix their files there; wait for "
            f"that one, stop it, or choose another name=."
        )
        job, stage = self.folder / JOB, self.folder / STAGE
        if os.environ.get(HELD_BY) != read_holder(job):
            self._locks.append(take(job, refusal, shared=self.shared, patience=PATIENCE_SECONDS))
        try:
            if self.pipeline:
                os.environ[HELD_BY] = read_holder(job)
            else:
                self._locks.append(
                    take(stage, refusal, shared=self.shared, patience=STAGE_PATIENCE_SECONDS, say=print_status)
                )
        except BaseException:
            self.release()
            raise
        _held.add(self._mark)
        return self

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        if self._locks and self._mark[0] == os.getpid():
            _held.discard(self._mark)
            if self.pipeline:
                os.environ.pop(HELD_BY, None)
        while self._locks:
            lock = self._locks.pop()
            if lock is not None:
                lock.release()

    def __enter__(self) -> "RunLock":
        return self.acquire()

    def __exit__(self, *_) -> None:
        self.release()

    def __del__(self):
        self.release()


def make_run_folder(folder: Path) -> None:
    """Make a run's folder, and prove that files can be written and renamed there before hours are spent.

    Raises:
        OSError: they cannot.
    """
    probe = temporary_path(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"probe")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"run folder is {folder}, but nothing can be written there ({error.strerror or error}); change runs= or "
            f"its permissions, or free space."
        ) from error
