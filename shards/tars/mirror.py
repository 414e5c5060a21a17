"""A remote folder, written and read through a local one: whatever fsspec opens (S3, GCS, `hf://`, …); http is read.

The local folder holds the small files; the shards of targets are sent away as soon as they are whole, the record that
says so last. Knows names and bytes, nothing of what they hold.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.files.usercache import user_cache
from shards.files.write import open_atomically, write_atomically
from shards.tars.archive import ShardError
from shards.tars.localcopy import ShardCache
from shards.tars.source import TARGETS_SUFFIX, is_http, open_filesystem, read_small, remote_size, retry

LISTING = "files.json"  # names of the small files, for http, which lists no folder


class Mirror:
    """A remote folder and the local one that stands for it.

    Several machines may write one remote folder; they do not see each other's locks, so that a shard may be made twice,
    with the same bytes.

    Args:
        url: the URL of the remote folder.
        folder: the local one; None: one of its own under the user's cache.
    """

    def __init__(self, url: str, folder: Path | None = None):
        self.url = url.rstrip("/")
        self.folder = folder or user_cache("caches") / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def pull(self) -> Path:
        """Fetch every small file of the remote folder, and return the local one.

        Raises:
            ShardError: a file cannot be had.
        """
        for name in self._names():
            data = read_small(f"{self.url}/{name}")
            path = self.folder / name
            if data is not None and not (path.exists() and path.read_bytes() == data):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, data)
        return self.folder

    def size(self, name: str) -> int | None:
        """Bytes of a remote file; None where there is none."""
        return remote_size(f"{self.url}/{name}")

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A copy on this machine of a remote file, fetched where it is not here; it stays within the block."""
        with ShardCache().local(f"{self.url}/{name}") as path:
            yield path

    def push(self, name: str) -> None:
        """Send a file of the local folder, whole or not at all.

        Raises:
            ShardError: it cannot be written there.
        """
        if is_http(self.url):
            raise ShardError(f"cache.folder is {self.url}, but http(s) is only read; name a place that can be written.")
        filesystem, path = open_filesystem(f"{self.url}/{name}")

        def send() -> None:
            # object stores put whole objects; where a name can be half-written, the rename is what makes it whole
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(self.folder / name), f"{path}.part")
            filesystem.mv(f"{path}.part", path)

        _tried(send, f"{self.url}/{name}")

    def push_small(self) -> None:
        """Send every small file but done records, which say that a shard is whole, and the list of all of them."""
        names = [n for n in self._local_names() if not n.endswith(TARGETS_SUFFIX.replace(".tar", ".json"))]
        for name in names:
            self.push(name)
        self.push_listing()

    def push_listing(self) -> None:
        """Send the names of the small files, which http could not tell."""
        names = sorted({*self._names(), *self._local_names()} - {LISTING})
        with open_atomically(self.folder / LISTING) as file:
            json.dump(names, file)
        self.push(LISTING)

    def _local_names(self) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(str(path.relative_to(self.folder)) for path in files if not path.name.endswith(TARGETS_SUFFIX))

    def _names(self) -> list[str]:
        """Names of the small remote files."""
        if is_http(self.url):
            listing = read_small(f"{self.url}/{LISTING}")
            return json.loads(listing) if listing else []
        filesystem, root = open_filesystem(self.url)
        found = _tried(lambda: filesystem.find(root) if filesystem.exists(root) else [], self.url)
        names = [path.removeprefix(root).removeprefix("/") for path in found]
        return [name for name in names if not name.endswith((TARGETS_SUFFIX, ".part")) and ".." not in name.split("/")]


def _tried(call: Callable, name: str):
    """`call()` with retries; what stays wrong is an error that names the file.

    Raises:
        ShardError: every try failed.
        OSError: the disk is full.
    """
    try:
        return retry(call, name)
    except FileNotFoundError as error:
        raise ShardError(f"{name} is not there, but is needed; look at the address and the rights.") from error
    except PermissionError as error:
        raise OSError(error.errno or errno.EACCES, f"{name} cannot be written ({error}); check the rights.") from error
