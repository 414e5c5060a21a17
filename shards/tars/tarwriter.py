"""One shard on its way to a disk: a plain ustar file whose bytes depend on its samples only. Knows no audio."""

import hashlib
import tarfile
from pathlib import Path

from shards.files.write import name_file, naming
from shards.tars.archive import BLOCK, RECORD

MODIFIED = 946_684_800  # 2000-01-01; `tar` complains of 1970


class TarWriter:
    """Writes under a temporary name; the shard has its own name only once it is whole and on the disk.

    Args:
        path: the shard's final name.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = 0  # bytes so far
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._digest = hashlib.sha256()
        self._file = self._temporary.open("wb")

    def add(self, name: str, data: bytes) -> None:
        """Append a member."""
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = len(data), MODIFIED, 0o644
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))

    def close(self) -> str:
        """End the archive, sync it and give it its name; returns its SHA-256 in hex."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.size % RECORD))
        with naming(self.path):
            self._file.close()
        name_file(self._temporary, self.path)
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Remove what was written, if it has not got its name yet."""
        try:
            with naming(self.path):
                self._file.close()  # on a full disk this fails too
        finally:
            self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        with naming(self.path):
            self._file.write(data)
        self._digest.update(data)
        self.size += len(data)


def member_size(data: bytes) -> int:
    """Bytes that a member of a tar takes: its header, its data, and zeros up to a whole block."""
    return BLOCK + len(data) + -len(data) % BLOCK
