"""The strict walk over one tar: every header, every byte of padding and the end of the archive are checked.

Vanilla readers stop at the first odd block without a word, so a cut or zero-filled shard just looks shorter
(`webdataset` and `tarfile` alike). This one knows no audio and no index; it yields members or raises.
"""

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512  # bytes
RECORD = 20 * BLOCK  # bytes; `tar` and `tarfile` pad an archive to a multiple of this
MAX_MEMBER_BYTES = 256 * 2**20
MAX_JSON_BYTES = 2**20
_MAX_HEADER_BYTES = 64 * 2**10  # of an extended header
_PIECE = 2**20  # bytes read at once

KINDS = {
    "flac": "audio",
    "wav": "audio",
    "ogg": "audio",
    "mp3": "audio",
    "json": "json",
    "targets.safetensors": "targets",
}
_EXECUTABLE = {
    "pyd",
    "pyc",
    "py",
    "so",
    "pkl",
    "pickle",
    "pth",
    "pt",
    "bin",
    "npy",
    "npz",
    "joblib",
    "dill",
    "sh",
    "exe",
}
_COMPRESSED = {"gz", "bz2", "xz", "zst", "zip"}
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_MAX_KEY = 200  # characters


class ShardError(ValueError):
    """A shard that is damaged, incomplete, changed, or holds what it must not; the message names it."""


@dataclass(frozen=True)
class Member:
    """One file of a tar."""

    key: str
    kind: str  # a value of KINDS
    offset: int  # of the data in the tar, bytes
    size: int  # bytes
    crc32: int
    data: bytes | None  # of a JSON member; None for the others


class Walk:
    """Reads a tar from its first byte to its last and yields its members; then `sha256` is the file's.

    Args:
        path: a local tar.
        max_member_bytes: the largest member allowed.

    Raises:
        ShardError: while iterating, at the first damaged byte or forbidden member.
    """

    def __init__(self, path: Path, *, max_member_bytes: int = MAX_MEMBER_BYTES):
        self.path = Path(path)
        self.max_member_bytes = max_member_bytes
        self.position = 0
        self._digest = hashlib.sha256()
        self._last_key = "the start"

    @property
    def sha256(self) -> str:
        """Hash of what was read so far: of the whole file after the walk."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Member]:
        with open(self.path, "rb") as self._file:
            name, size = None, None  # from an extended header before the member
            while (header := self._read(BLOCK)) != bytes(BLOCK):
                self._check_header(header)
                kind = header[156:157]
                length = _octal(header[124:136], self) if size is None else size
                if kind in (b"x", b"L"):
                    name, size = self._read_extended(kind, length, name, size)
                    continue
                if kind == b"g":
                    self._read_extended(kind, length, None, None)
                    continue
                yield self._read_member(name if name is not None else _plain_name(header), kind, length)
                name, size = None, None
            self._check_end()

    def error(self, what: str) -> ShardError:
        """A ShardError at the current position."""
        return ShardError(
            f"{self.path} is damaged at byte {self.position} (after {self._last_key}): {what}; "
            f"copy or pack this shard again."
        )

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        if len(data) != size:
            raise self.error(f"it ends {size - len(data)} bytes early")
        self.position += size
        return data

    def _check_header(self, header: bytes) -> None:
        field = header[148:156]
        total = sum(header) - sum(field) + 8 * ord(" ")
        if not re.fullmatch(rb"[0-7]{6}\0 ", field) or int(field[:6], 8) != total:
            raise self.error("the checksum of a member's header does not match")
        if header[257:262] != b"ustar":
            raise self.error("a member's header is not of the ustar format")

    def _read_extended(self, kind: bytes, length: int, name: str | None, size: int | None):
        """Name and size that a pax (`x`) or GNU (`L`) header gives to the member after it."""
        if length > _MAX_HEADER_BYTES:
            raise self.error(f"an extended header of {length} bytes is larger than {_MAX_HEADER_BYTES}")
        data = self._read(length)
        self._skip_padding(length)
        if kind == b"L":
            return data.rstrip(b"\0").decode("utf-8", "replace"), size
        for field, value in _pax_fields(data, self):
            if field == "path":
                name = value
            elif field == "size":
                size = _number(value.encode(), self)
            elif field.startswith("GNU.sparse"):
                raise self.error("a member is sparse")
        return name, size

    def _read_member(self, name: str, kind: bytes, size: int) -> Member:
        if kind not in (b"0", b"\0"):
            raise ShardError(
                f"{self.path} holds {name!r}, but a shard holds plain files only (no link, no folder); repack it."
            )
        key, suffix = split_name(name, self.path)
        self._last_key = key
        limit = min(self.max_member_bytes, MAX_JSON_BYTES) if suffix == "json" else self.max_member_bytes
        if size > limit:
            raise ShardError(
                f"{self.path}: {name} is {size} bytes, but a member may have {limit}; raise max_member_bytes."
            )
        offset, crc, pieces = self.position, 0, []
        for start in range(0, size, _PIECE):
            piece = self._read(min(_PIECE, size - start))
            crc = zlib.crc32(piece, crc)
            if suffix == "json":
                pieces.append(piece)
        self._skip_padding(size)
        return Member(key, KINDS[suffix], offset, size, crc, b"".join(pieces) if suffix == "json" else None)

    def _skip_padding(self, size: int) -> None:
        if any(self._read(-size % BLOCK)):
            raise self.error("the padding after a member is not zero")

    def _check_end(self) -> None:
        """The second zero block, then nothing but the padding of the last record."""
        if any(self._read(BLOCK)):
            raise self.error("the end of the archive is one block, not two")
        end = self.position
        rest = self._file.read(RECORD + 1)
        self._digest.update(rest)
        if any(rest):
            raise self.error("data follows the end of the archive")
        if len(rest) not in (0, -end % RECORD):
            raise self.error("zeros follow the end of the archive, so its tail may have been lost")


def split_name(name: str, path: Path) -> tuple[str, str]:
    """Key and suffix of a member's name.

    Raises:
        ShardError: where the name is absolute, leaves the folder, or is not `KEY.SUFFIX` with a suffix of KINDS.
    """
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    parts = set(suffix.lower().split("."))
    if parts & (_EXECUTABLE | _COMPRESSED) and suffix not in KINDS:
        raise ShardError(
            f"{path} holds {name!r}, but executable, pickled and compressed members are refused; remove it and repack."
        )
    if name.startswith("/") or ".." in name.split("/") or len(key) > _MAX_KEY or not _KEY.fullmatch(key):
        raise ShardError(
            f"{path} holds {name!r}, but a key is at most {_MAX_KEY} of A-Z a-z 0-9 _ - / and no path; repack it."
        )
    if suffix not in KINDS:
        raise ShardError(
            f"{path} holds {name!r}, but a member is KEY.SUFFIX (one dot) with {', '.join(KINDS)}; repack it."
        )
    return key, suffix


def _plain_name(header: bytes) -> str:
    name, prefix = (
        header[start:end].partition(b"\0")[0].decode("utf-8", "replace") for start, end in ((0, 100), (345, 500))
    )
    is_posix = header[257:263] == b"ustar\0"  # GNU keeps other things in the prefix field
    return f"{prefix}/{name}" if prefix and is_posix else name


def _octal(field: bytes, walk: Walk) -> int:
    if field[0] & 0x80:  # GNU writes sizes over 8 GiB in base 256
        return int.from_bytes(field[1:], "big")
    return _number(field.strip(b" \0"), walk, base=8)


def _number(text: bytes, walk: Walk, base: int = 10) -> int:
    if not re.fullmatch(rb"[0-7]+" if base == 8 else rb"[0-9]{1,20}", text):
        raise walk.error("a member's size is not a number")
    return int(text, base)


def _pax_fields(data: bytes, walk: Walk) -> Iterator[tuple[str, str]]:
    while data:
        length = re.match(rb"(\d{1,6}) ", data)
        record = data[: int(length[1])] if length else b""
        if not record.endswith(b"\n") or b"=" not in record:
            raise walk.error("an extended header cannot be read")
        field, _, value = record[length.end() : -1].partition(b"=")
        yield field.decode("utf-8", "replace"), value.decode("utf-8", "replace")
        data = data[len(record) :]
