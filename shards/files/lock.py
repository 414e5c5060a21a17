"""One process at a time: a lock file that says who holds it and that dies with its holder. Knows no folder's content.

The kernel's `flock` is the lock and the file's text only says whose it is, so the lock of a killed process is free at
once, and a reused process id can fool nobody. On NFS it holds between hosts as far as the mount hands locks to its
server (NFSv4, or NFSv3 with lockd; not with `local_lock=`, nor on Lustre with `localflock`): where locks stay on their
host, two hosts are not kept apart. Where there are none at all, `hold` says so and goes on.
"""

import errno
import fcntl
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have none
POLL_SECONDS = 0.1  # between looks at a lock that is waited for
NUM_SHOWN = 200  # characters of a holder's command
_log = logging.getLogger(__name__)


class FileLock:
    """A lock that this process holds until `release`, and with it the processes that it forks."""

    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self._descriptor, self._process = descriptor, os.getpid()

    @classmethod
    def acquire(cls, path: Path, *, shared: bool = False, wait: bool = False) -> "FileLock | None":
        """Take the lock, or return None where somebody alive holds it: a process, or another thread of this one.

        Args:
            path: the lock file; made here, removed by `release`.
            shared: let others hold it too, if they share it.
            wait: until it is free, so that it is never None.
        """
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, kind)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError:
                os.close(descriptor)
                raise
            if _is_file_at(path, descriptor):
                break
            os.close(descriptor)  # its holder removed the file between our open and our lock
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{describe_process()}\n".encode(), 0)
        return cls(path, descriptor)

    def release(self) -> None:
        """Let others have the lock; the file goes with its last holder. A forked child has nothing to release."""
        if os.getpid() == self._process:
            with suppress(BlockingIOError):  # it is shared, and somebody still holds it
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.path.unlink(missing_ok=True)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # forked children have the descriptor too
        os.close(self._descriptor)


@contextmanager
def hold(path: Path, refusal: str, *, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """A block during which this process holds a lock.

    Args:
        path: the path of the lock file.
        refusal: what to say where another holds it; `{holder}` becomes who.
        shared: see `FileLock.acquire`.
        patience: seconds to wait for a holder that is about to end.

    Raises:
        FileExistsError: another holds it.
    """
    lock = take(path, refusal, shared=shared, patience=patience)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def take(path: Path, refusal: str, *, shared: bool = False, patience: float = 0.0, say=None) -> FileLock | None:
    """The lock of `hold`, until its `release`; None where the file system has no locks, which is said.

    Args:
        path, refusal, shared, patience: as there.
        say: is told whom this process waits for.

    Raises:
        FileExistsError: another holds it.
    """
    end = time.monotonic() + patience
    while True:
        try:
            lock = FileLock.acquire(path, shared=shared)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _log.warning("%s: this file system has no locks (%s); see that no other job uses it", path, error.strerror)
            return None
        if lock is not None:
            return lock
        if time.monotonic() >= end:
            raise FileExistsError(refusal.replace("{holder}", read_holder(path)))
        if say is not None:
            say(f"waits for {read_holder(path)}, which was left behind and is ending")
            say = None
        time.sleep(POLL_SECONDS)


def describe_process() -> str:
    """This process, for whoever waits for it: `distill run toy.yaml (process 12 on host, since …)`."""
    name = Path(sys.argv[0] or "python").name
    command = shlex.join([name, *sys.argv[1:]]).replace("\n", " ")[:NUM_SHOWN]
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"{command} (process {os.getpid()} on {socket.gethostname()}, since {since})"


def read_holder(path: Path) -> str:
    """Who holds the lock at `path`, as `describe_process` said it, or nobody."""
    try:
        return path.read_text(errors="replace").strip() or "an unnamed process"
    except FileNotFoundError:
        return "nobody"


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
