"""The target cache on a disk: `cache.json`, and a tar of targets for each audio shard. Knows no teacher and no codec.

`NAME.targets.tar` is the sibling of `NAME.tar`; `NAME.targets.json`, its done record, is written last, so a shard
without one does not exist for anybody. Records are found and checked through `shards.tars.index`.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from shards.files.lock import FileLock
from shards.files.space import check_space, explain_full_disk
from shards.files.write import remove_leftovers, write_atomically
from shards.jsonfile import ShapeError, is_a, read_object
from shards.targets.header import HEADER, CacheHeader, read_header, write_header
from shards.targets.record import TargetRecord
from shards.tars.archive import ShardError
from shards.tars.index import ShardIndex, load_index, sidecar_path, write_index
from shards.tars.mirror import Mirror
from shards.tars.source import is_remote
from shards.tars.tarwriter import TarWriter

DONE_FIELDS = {"fingerprint": str, "rows": int, "bytes": int, "sha256": str, "figures": dict}  # of a done record


@dataclass
class TargetShard:
    """A shard being written; `TargetWriter.claim` makes it.

    Attributes:
        figures: totals for the done record, such as tokens; the same in every run, so no times.
    """

    name: str
    tar: TarWriter
    figures: dict[str, float] = field(default_factory=dict)
    rows: int = 0

    def add(self, key: str, record: bytes) -> None:
        """Append a sample's record; the order is the caller's, and must be the same in every run."""
        self.tar.add(f"{key}.targets.safetensors", record)
        self.rows += 1


class TargetWriter:
    """Writes a cache shard by shard; any number of processes may share the folder.

    Args:
        folder: made if it is not there; of a URL, what is written is sent there shard by shard.
        header: what makes this cache.
        audio: sha256 of each audio shard by its name; what was made of another one is made again. None: unknown.
        figures: names of the totals that a done record must have.

    Raises:
        ValueError: the folder holds a cache of something else; the message names what differs.
    """

    def __init__(
        self,
        folder: str | Path,
        header: CacheHeader,
        audio: Mapping[str, str] | None = None,
        figures: Sequence[str] = (),
    ):
        self.mirror = Mirror(str(folder)) if is_remote(str(folder)) else None
        self.folder = Path(folder) if self.mirror is None else self.mirror.pull()
        self.audio, self.figures = audio or {}, figures
        self.folder.mkdir(parents=True, exist_ok=True)
        with explain_full_disk(self.folder, "the cache's header needs"):
            self.header = write_header(self.folder, header)

    def is_done(self, shard: str) -> bool:
        """Whether a shard's targets are complete, and as they were written: a tar that was touched is read again."""
        done = read_done(self.folder, shard)
        path = tar_path(self.folder, shard_name(shard))
        return (
            done is not None
            and done["fingerprint"] == self.header.fingerprint
            and not is_of_other_audio(done, self.audio, shard)
            and all(name in done["figures"] and is_a(done["figures"][name], float) for name in self.figures)
            and self._is_there(path, done)
        )

    def _is_there(self, path: Path, done: dict) -> bool:
        if self.mirror is not None:
            return self.mirror.size(path.name) == done["bytes"]
        return path.exists() and path.stat().st_size == done["bytes"] and _is_as_written(path, done)

    def lock_path(self, shard: str) -> Path:
        """Where the lock of a shard that is being written is."""
        return self.folder / f".{shard_name(shard)}.targets.lock"

    @contextmanager
    def claim(self, shard: str, expected_bytes: int = 0) -> Iterator[TargetShard | None]:
        """A shard to write, complete when the block ends; None where it is done or another process writes it.

        An exception in the block, or the end of the process, leaves nothing under the shard's name, and the shard free.

        Args:
            shard: the audio shard, `train-000017` or its path.
            expected_bytes: estimate of what the targets will take; 0 if there is none.

        Raises:
            OSError: the disk is full, or will be.
        """
        name = shard_name(shard)
        lock = FileLock.acquire(self.lock_path(shard))
        if lock is None:
            yield None
            return
        try:
            if self.is_done(name):
                yield None
                return
            remove_leftovers(self.folder, escape(f"{name}.targets"))
            remedy = "free some space and start again, finished shards are kept"
            check_space(self.folder, expected_bytes, f"the targets of {name}", remedy=remedy)
            with explain_full_disk(self.folder, f"the targets of {name} need"):
                yield from self._write(name)
        finally:
            lock.release()

    def _write(self, name: str) -> Iterator[TargetShard]:
        path = tar_path(self.folder, name)
        tar = TarWriter(path)
        shard = TargetShard(name, tar)
        try:
            yield shard
            digest = tar.close()
        except BaseException:
            _discard(tar)
            raise
        index = write_index(path)
        if (index.sha256, len(index)) != (digest, shard.rows):
            raise ShardError(
                f"{path} reads back as {index.sha256[:16]} ({len(index)} rows), but {digest[:16]} ({shard.rows} rows) "
                f"was written; check the disk and cache this shard again."
            )
        done = {"fingerprint": self.header.fingerprint, "rows": shard.rows, "bytes": index.size, "sha256": digest}
        if name in self.audio:
            done["audio"] = self.audio[name]
        if self.mirror is not None:
            self._send(path)
        write_atomically(done_path(self.folder, name), json.dumps(done | {"figures": shard.figures}, sort_keys=True))
        if self.mirror is not None:
            self.mirror.push(done_path(self.folder, name).name)

    def _send(self, path: Path) -> None:
        """Send a whole shard and its index to where the cache is; no copy stays here."""
        for file in (path, sidecar_path(path)):
            self.mirror.push(file.name)
            file.unlink()

    def publish(self) -> None:
        """Send what lies beside the shards of a remote cache: its header, the teacher's parts, a list of its files."""
        if self.mirror is not None:
            self.mirror.push_small()


class TargetReader:
    """Reads records of a cache by shard and key.

    Args:
        folder: the folder of the cache, or its URL.
        expected: what this run's teacher is; a fingerprint will do, but only a header can say what differs. None reads
            any cache, for tools that inspect one.

    Raises:
        ValueError: the cache is of something else.
    """

    def __init__(self, folder: str | Path, expected: CacheHeader | str | None):
        self.mirror = Mirror(str(folder)) if is_remote(str(folder)) else None
        self.folder = Path(folder) if self.mirror is None else self.mirror.pull()
        self.header = read_header(self.folder)
        self._indexes: dict[str, tuple[ShardIndex, dict[str, int]]] = {}
        if isinstance(expected, CacheHeader):
            self.header.check(expected, self.folder / HEADER)
        elif expected is not None and expected != self.header.fingerprint:
            raise ValueError(
                f"{self.folder / HEADER} was cached as {self.header.fingerprint[:16]}, but this run's teacher is "
                f"{expected[:16]}; run `distill cache` again or point cache.folder at a cache of this teacher."
            )

    def _size(self, name: str) -> int | None:
        path = tar_path(self.folder, name)
        if self.mirror is not None:
            return self.mirror.size(path.name)
        return path.stat().st_size if path.exists() else None

    @contextmanager
    def _local(self, name: str) -> Iterator[Path]:
        path = tar_path(self.folder, name)
        if self.mirror is None:
            yield path
            return
        with self.mirror.local(path.name) as copy:
            yield copy

    def keys(self, shard: str) -> list[str]:
        """The keys of a shard, in its order."""
        return self._open(shard_name(shard))[0].keys

    def check_shards(self, shards: Iterable[str], audio: Mapping[str, str] | None = None) -> None:
        """Refuse a cache that lacks the targets of some of these audio shards, or holds another teacher's.

        With `audio`, as `TargetWriter` takes it, targets that were made of another shard of that name are missing too.

        Raises:
            ShardError: with the first few missing names, or both fingerprints or sizes.
        """
        names = [shard_name(shard) for shard in shards]
        found = {name: read_done(self.folder, name) for name in names}
        sizes = {name: self._size(name) for name in names if found[name] is not None}
        missing = [name for name in names if sizes.get(name) is None]
        missing = missing or [n for n in names if is_of_other_audio(found[n], audio or {}, n)]
        if missing:
            raise ShardError(
                f"{self.folder} lacks the targets of {len(missing)} of {len(names)} shards ({', '.join(missing[:5])}), "
                f"but training needs them all; run `distill cache` again, it goes on where it stopped."
            )
        for name in names:
            done, path = found[name], tar_path(self.folder, name)
            size = sizes[name]
            if (done["fingerprint"], done["bytes"]) != (self.header.fingerprint, size):
                raise ShardError(
                    f"{path} is {size:,} bytes of {done['fingerprint'][:16]}, but {done['bytes']:,} bytes of "
                    f"{self.header.fingerprint[:16]} were written; run `distill cache` again, which makes it anew."
                )

    def read(self, shard: str, key: str) -> bytes:
        """A sample's record.

        Raises:
            ShardError: the shard or key is not there, or the bytes are not those that were written.
        """
        name = shard_name(shard)
        index, rows = self._open(name)
        path = tar_path(self.folder, name)
        if key not in rows:
            raise ShardError(f"{path} holds no targets of {key}, but {len(index)} others; cache this shard again.")
        offset, size, crc = (int(value) for value in index.members["targets"][rows[key]])
        with self._local(name) as local, open(local, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        if zlib.crc32(data) != crc:
            raise ShardError(
                f"{path}: {key} has crc32 {zlib.crc32(data):08x} in {len(data)} bytes, but {crc:08x} in {size} were "
                f"written; remove it and run `distill cache` again."
            )
        return data

    def read_record(self, shard: str, key: str, identity: str | None = None) -> TargetRecord:
        """A sample's record, unpacked, and checked against the sample where `identity` is given.

        Raises:
            ValueError: as `read` and `TargetRecord.check`.
        """
        name = f"{tar_path(self.folder, shard_name(shard))}: {key}"
        data = self.read(shard, key)
        try:
            record = TargetRecord.unpack(data)
        except ValueError as error:
            raise ShardError(f"{name}: {error}") from error
        if identity is not None:
            record.check(identity, name)
        return record

    def _open(self, name: str) -> tuple[ShardIndex, dict[str, int]]:
        """The index of a shard, once it was compared with the done record."""
        if name not in self._indexes:
            self.check_shards([name])
            done = read_done(self.folder, name)
            with self._local(name) as local:
                index = load_index(local)
            stored = (self.header.fingerprint, done["rows"], done["sha256"])
            if (done["fingerprint"], len(index), index.sha256) != stored:
                raise ShardError(
                    f"{tar_path(self.folder, name)} holds {len(index)} rows of {done['fingerprint'][:16]} with sha256 "
                    f"{index.sha256[:16]}, but {done['rows']} of {self.header.fingerprint[:16]} with "
                    f"{done['sha256'][:16]} were written; run `distill cache` again, which makes it anew."
                )
            self._indexes[name] = index, {key: row for row, key in enumerate(index.keys)}
        return self._indexes[name]


def shard_name(shard: str | Path) -> str:
    """`train-000017` of an audio shard's name or path."""
    return Path(shard).name.removesuffix(".tar")


def tar_path(folder: Path, name: str) -> Path:
    """Where a shard's targets are."""
    return folder / f"{name}.targets.tar"


def done_path(folder: Path, name: str) -> Path:
    """Where the record of a finished shard is."""
    return folder / f"{name}.targets.json"


def read_done(folder: Path, shard: str) -> dict | None:
    """The done record of a shard: fingerprint, rows, bytes, sha256, audio, figures; None while it is not finished."""
    try:
        return read_object(done_path(folder, shard_name(shard)), DONE_FIELDS)
    except (FileNotFoundError, ShapeError):  # without a record, or with one of another shape, it is not finished
        return None


def _is_as_written(path: Path, done: dict) -> bool:
    """Whether a tar has the content that its done record tells of; one that its index does not know is read again."""
    try:
        index = load_index(path)
    except (ShardError, OSError):
        return False
    return (index.sha256, len(index)) == (done["sha256"], done["rows"])


def is_of_other_audio(done: dict, audio: Mapping[str, str], shard: str) -> bool:
    """Whether targets were made of another audio shard than the one of this name now, as far as both are known."""
    return "audio" in done and audio.get(shard_name(shard), done["audio"]) != done["audio"]


def _discard(tar: TarWriter) -> None:
    """Remove an unfinished tar; on a full disk its first close fails once more, and only the second removes it."""
    try:
        tar.discard()
    except OSError:
        tar.discard()
