"""Every whole-file write, file hash and lock has one home, and a kill leaves no half file under its name."""

import ast
import hashlib
import os
import signal
import threading
from pathlib import Path

import pytest

from benchmarks.house import parse, place_of, python_files
from shards.files import hash as hashes
from shards.files.lock import FileLock, read_holder
from shards.files.write import create_once, folder_atomically, open_atomically, staged, write_atomically

HOMES = {
    "shards/files/write.py": ("os.replace", "os.rename", "os.renames", "os.link", "os.fsync", "Path.replace"),
    "shards/files/hash.py": ("hashlib.file_digest",),
    "shards/files/lock.py": ("fcntl.flock", "fcntl.lockf"),
}


def find_calls(tree: ast.AST) -> set[str]:
    """Dotted names of the calls that write, hash or lock; a `replace` of one argument is a path's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "fcntl", "hashlib"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
            is_paths = node.func.attr in ("replace", "rename") and not node.keywords
            if is_paths and getattr(node.func.value, "id", "") not in ("os", "dataclasses"):
                found.add("Path.replace")
    return found & {name for names in HOMES.values() for name in names}


def test_atomic_writes_file_hashes_and_locks_have_one_home_each():
    calls = {place_of(path): find_calls(parse(path)) for path in python_files()}
    assert {name: found for name, found in calls.items() if found - set(HOMES.get(name, ()))} == {}
    assert all(calls[name] for name in HOMES)  # or this test looks for what is nowhere


def write_folder(folder: Path) -> None:
    if (folder / "new").exists():
        return
    with folder_atomically(folder / "new") as new:
        (new / "a").write_text("new")
        (new / "inner").mkdir()
        (new / "inner" / "b").write_text("new")


def write_staged(folder: Path) -> None:
    with staged(folder / "held", last="b") as stage:
        (stage / "a").write_text("new")
        (stage / "b").write_text("new")


def write_lines(folder: Path) -> None:
    with open_atomically(folder / "old") as file:
        file.write("n")
        file.write("ew")


WRITERS = {
    "open": write_lines,
    "write": lambda folder: write_atomically(folder / "old", b"new"),
    "create": lambda folder: create_once(folder / "new", "new"),
    "folder": write_folder,
    "staged": write_staged,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_and_never_a_half(tmp_path, name):
    killed, call = True, 0
    while killed:
        call += 1
        folder = tmp_path / str(call)
        folder.mkdir()
        (folder / "old").write_text("old")
        killed = run_killed(lambda folder=folder: WRITERS[name](folder), call)
        visible = [path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.parts)]
        assert all(path.read_text() in ("old", "new") for path in visible if path.is_file())
        assert (folder / "new").is_dir() <= ((folder / "new" / "inner" / "b").exists())  # a folder is whole, too
        WRITERS[name](folder)  # and the next process is not in its way
    assert call > 3
    assert not any(path.name.startswith(".") for path in folder.rglob("*"))


def run_killed(work, call: int) -> bool:
    """Whether a child that does the work died by its n-th call that changes the disk."""
    child = os.fork()
    if child == 0:
        left = [call]

        def fatal(function):
            def wrapper(*arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return wrapper

        os.fsync, os.replace, os.link, os.mkdir = map(fatal, (os.fsync, os.replace, os.link, os.mkdir))
        Path.write_text = fatal(Path.write_text)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)  # whatever it raised: a second copy of this process must not go on
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_a_file_that_is_there_is_not_created_again(tmp_path):
    create_once(tmp_path / "a", "first")
    create_once(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_an_exception_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError), open_atomically(tmp_path / "a") as file:
        file.write("new")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_waiting_thread_gets_the_lock_when_its_holder_lets_go(tmp_path):
    lock, got = FileLock.acquire(tmp_path / "lock"), []
    assert FileLock.acquire(tmp_path / "lock") is None  # of this process, but not ours
    assert f"process {os.getpid()} " in read_holder(tmp_path / "lock")
    thread = threading.Thread(target=lambda: got.append(FileLock.acquire(tmp_path / "lock", wait=True)))
    thread.start()
    assert got == []
    lock.release()
    thread.join()
    got[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_large_files_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, data = tmp_path / "weights", bytes(hashes.LEAST_BYTES)
    path.write_bytes(data)
    assert hashes.remember_hash(path) == hashlib.sha256(data).hexdigest()
    assert not hashes.memory_path().exists()  # it was written just now, and may be again
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", 0.0)
    hashes.remember_hash(path)
    monkeypatch.setattr(hashlib, "file_digest", None)  # a second reading would fail
    assert hashes.remember_hash(path) == hashlib.sha256(data).hexdigest()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    times = path.stat()
    path.write_bytes(data[:-1] + b"1")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hashes.remember_hash(path) == hashlib.sha256(data[:-1] + b"1").hexdigest()
    hashes.memory_path().write_text("garbage")
    assert hashes.remember_hash(path) == hashlib.sha256(data[:-1] + b"1").hexdigest()
