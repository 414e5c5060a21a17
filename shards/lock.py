"""One process at a time: a lock file that says who holds it and that dies with its holder. Knows no cache.

The kernel's `flock` is the lock and the file's text only says whose it is, so the lock of a killed process is free at
once, and a reused process id can fool nobody.
"""

import fcntl
import os
import socket
from pathlib import Path


class FileLock:
    """A lock that this process holds until `release`."""

    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path) -> "FileLock | None":
        """Take the lock, or return None where a living process holds it.

        Args:
            path: the lock file; made here, removed by `release`.
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if _is_file_at(path, descriptor):
                break
            os.close(descriptor)  # its holder removed the file between our open and our lock
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return cls(path, descriptor)

    def release(self) -> None:
        """Remove the file and let others have the lock."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def read_holder(path: Path) -> str:
    """Who holds the lock at `path`: `process 12 on host`, or nobody."""
    try:
        return path.read_text().strip() or "an unnamed process"
    except FileNotFoundError:
        return "nobody"


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
