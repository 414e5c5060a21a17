"""Local copies of remote shards in a folder of bounded size, so that a remote shard is read as a local one is.

Safe for any number of processes on one machine. A copy has a lock file while somebody fetches, indexes or opens it;
what a killed process left (a part of a download, a lock) is cleared by the next that needs the shard or the room.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.files.lock import FileLock
from shards.files.space import DISK_IS_FULL
from shards.files.usercache import user_cache
from shards.files.write import name_file
from shards.tars.archive import ShardError
from shards.tars.index import SIDECAR_SUFFIX
from shards.tars.source import (
    FIRST_WAIT_SECONDS,
    SHARD_SUFFIX,
    download,
    is_remote,
    nearest,
    retry,
)

DEFAULT_BYTES = 64 * 2**30
_PART_SUFFIX, _LOCK_SUFFIX = ".part", ".lock"


class ShardCache:
    """Local copies, at most `max_bytes` of them; the least recently used goes first.

    A remote shard is taken never to change; where one did, empty the folder. What is being fetched comes on top of
    `max_bytes`: a shard a process.
    """

    def __init__(
        self,
        folder: Path | None = None,
        max_bytes: int = DEFAULT_BYTES,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ):
        self.folder = folder or user_cache("shards")
        self.max_bytes = max_bytes
        self.first_wait_seconds = first_wait_seconds

    def open(self, name: str) -> int:
        """A file descriptor on the shard, fetched first where it is remote; the caller closes it.

        Raises:
            ShardError: the shard cannot be had.
        """
        try:
            with self.local(name) as path:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ShardError(f"{name} is missing; {nearest(name)}") from error

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Path of the shard or of its local copy, fetched first where it is remote; the copy stays within the block."""
        if not is_remote(name):
            yield Path(name)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        lock = FileLock.acquire(_lock_path(path), wait=True)
        try:
            is_new = not path.exists()
            if is_new:
                self._fetch(name, path)
            os.utime(path)
            yield path
        finally:
            lock.release()
        if is_new:
            self._evict(keep=path)

    def _path(self, name: str) -> Path:
        """Where a URL's copy lies: a name of its own, which still says which shard it is."""
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{name.rpartition('/')[2][-150:]}"

    def _fetch(self, name: str, path: Path) -> None:
        part = Path(f"{path}{_PART_SUFFIX}")
        part.unlink(missing_ok=True)  # a killed process left it; its last bytes may not be what was sent
        try:
            retry(lambda: download(name, part), name, first_wait_seconds=self.first_wait_seconds)
            name_file(part, path)
        except FileNotFoundError as error:
            raise ShardError(f"{name} is missing; {nearest(name)}") from error
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            raise ShardError(
                f"{self.folder} has {shutil.disk_usage(self.folder).free:,} bytes free, but {name} needs more; "
                f"free some space, or give a ShardCache on another disk or with a smaller max_bytes."
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        """Remove the copies used longest ago until the rest fits, but none that is in use by its path.

        An open descriptor still reads a removed file.
        """
        files = []
        for path in [*self.folder.glob(f"*{SHARD_SUFFIX}"), *self.folder.glob(f"*{_PART_SUFFIX}")]:
            with suppress(FileNotFoundError):  # another process evicted it
                files.append((path.suffix != _PART_SUFFIX, path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for *_, size, _ in files)
        for is_whole, _, size, path in sorted(files):  # parts of dead processes first
            if (total > self.max_bytes or not is_whole) and path != keep and _remove_unless_locked(path):
                total -= size


def _lock_path(path: Path) -> Path:
    return Path(f"{str(path).removesuffix(_PART_SUFFIX)}{_LOCK_SUFFIX}")


def _remove_unless_locked(path: Path) -> bool:
    """Whether the copy, or the part of one, is gone with its sidecar; what another holds stays."""
    lock = FileLock.acquire(_lock_path(path))
    if lock is None:
        return False
    path.unlink(missing_ok=True)
    Path(f"{path}{SIDECAR_SUFFIX}").unlink(missing_ok=True)
    lock.release()
    return True
