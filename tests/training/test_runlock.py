"""Who may write into a run's folder: one job, its stages, and after a killed one whoever comes next."""

import os
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from distill.pipeline import run_pipeline
from distill.training import runlock
from distill.training.runlock import HELD_BY, JOB, STAGE, RunLock
from shards.files.lock import FileLock, read_holder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(runlock, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(runlock, "STAGE_PATIENCE_SECONDS", 0.0)
    monkeypatch.delenv("RANK", raising=False)


@contextmanager
def another_process(take: Callable):
    """A process that takes something and then waits to be killed; its id."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        taken = take()
        os.write(said, b"!")
        signal.pause()
        del taken
        os._exit(0)
    try:
        os.close(said)
        assert os.read(ready, 1) == b"!"
        yield child
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_in_use_is_refused_with_holder_process_host_and_time_until_the_holder_dies(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/distill", "run", "own {}.yaml", "name=x"])
    with another_process(lambda: RunLock(tmp_path).acquire()) as child:
        told = rf"{tmp_path} is in use by distill run 'own \{{\}}\.yaml' name=x \(process {child} on "
        told += rf"{socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC\), but two jobs .*; wait for that"
        with pytest.raises(FileExistsError, match=told):
            RunLock(tmp_path).acquire()
        monkeypatch.setenv("RANK", "1")  # another rank of a job: its first one decides
        RunLock(tmp_path).acquire()
        monkeypatch.delenv("RANK")
    with RunLock(tmp_path):
        assert read_holder(tmp_path / JOB).startswith("distill run")
    assert list(tmp_path.iterdir()) == []


def test_one_process_takes_a_folder_as_often_as_it_likes_and_gives_it_back_once(tmp_path):
    with RunLock(tmp_path):
        with RunLock(tmp_path):
            pass
        assert FileLock.acquire(tmp_path / STAGE) is None
    assert FileLock.acquire(tmp_path / STAGE) is not None


def test_a_pipelines_stages_may_write_and_nobody_else_may(tmp_path, monkeypatch):
    with another_process(lambda: RunLock(tmp_path, pipeline=True).acquire()):
        with pytest.raises(FileExistsError, match="is in use by"):
            RunLock(tmp_path).acquire()
        monkeypatch.setenv(HELD_BY, read_holder(tmp_path / JOB))
        with RunLock(tmp_path):  # as in a process that the pipeline started
            assert FileLock.acquire(tmp_path / STAGE) is None
            assert read_holder(tmp_path / JOB) == os.environ[HELD_BY]


def test_a_stage_that_a_killed_pipeline_left_behind_is_waited_for(tmp_path, monkeypatch, capsys):
    with another_process(lambda: FileLock.acquire(tmp_path / STAGE)) as left_behind:
        monkeypatch.setattr(runlock, "STAGE_PATIENCE_SECONDS", 60.0)
        monkeypatch.setattr("shards.files.lock.time.sleep", lambda _: os.kill(left_behind, signal.SIGKILL))
        with RunLock(tmp_path):
            pass
    assert f"(process {left_behind} on " in capsys.readouterr().err


def test_jobs_that_only_read_the_student_share_its_folder_but_nobody_trains_there(tmp_path):
    with another_process(lambda: RunLock(tmp_path, shared=True).acquire()):
        with RunLock(tmp_path, shared=True):
            pass
        with pytest.raises(FileExistsError, match="is in use by"):
            RunLock(tmp_path).acquire()
    with RunLock(tmp_path):
        pass


def test_a_forked_child_gives_nothing_back_that_its_parent_holds(tmp_path):
    lock = RunLock(tmp_path).acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert FileLock.acquire(tmp_path / JOB) is None
    lock.release()


def test_a_pipeline_in_a_folder_in_use_is_refused_before_anything_is_packed(tmp_path):
    (tmp_path / "own.yaml").write_text(
        f"{{name: x, runs: {tmp_path}/runs, data: {{folder: {tmp_path}/data}}, corpus: {{kind: synth}}, "
        f"scratch: {{steps: 1}}}}"
    )
    with (
        another_process(lambda: RunLock(tmp_path / "runs" / "x").acquire()),
        pytest.raises(FileExistsError, match=r"runs/x is in use by"),
    ):
        run_pipeline(str(tmp_path / "own.yaml"), [], None)
    assert not (tmp_path / "data").exists()


def test_a_file_system_without_locks_is_said_and_used_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("shards.files.lock.fcntl.flock", refuse)
    with RunLock(tmp_path):
        pass
    assert "has no locks (No locks available); see that no other job uses it" in caplog.text
