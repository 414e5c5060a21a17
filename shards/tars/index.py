"""Where each sample of a shard lies: offset, size and crc32 of its members, and what plans need to know of it.

Built once from the strict walk of `archive`, kept beside the tar in a small safetensors file, and believed only
while the tar is the one it was built from. Serves audio shards and target shards alike. Knows no order and no decoder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from shards.files.hash import hash_file
from shards.files.write import write_atomically
from shards.lazy_imports import late
from shards.tars.archive import MAX_MEMBER_BYTES, Member, ShardError, Walk

np = late("numpy")
tensors = late("safetensors.numpy")

SIDECAR_SUFFIX = ".idx"
AS_WRITTEN = 0
_VERSION = 2
_KIND_SETS = ({"audio", "json"}, {"targets"})
_NUM_SHOWN = 5  # problems listed in an error
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one tar, in its order. A row of `members[kind]` is offset, size (bytes) and crc32."""

    name: str  # file name of the tar
    size: int  # bytes
    sha256: str  # of the tar
    mtime_ns: int  # of the tar when it was last compared; AS_WRITTEN: the sidecar was written right after it
    keys: list[str]
    members: dict[str, np.ndarray]  # "audio" and "json", or "targets" -> int64 of shape (samples, 3)
    seconds: np.ndarray  # float32; 0 where the sample's JSON cannot be read, and in target shards
    tasks: list[str]  # of the shard, sorted
    task_ids: np.ndarray  # uint16, into `tasks`
    has_text: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.keys)


def load_index(path: Path, *, sha256: str | None = None, max_member_bytes: int = MAX_MEMBER_BYTES) -> ShardIndex:
    """The index of a local tar: its sidecar, or a new one from a walk over the tar (about 200 MB/s).

    Args:
        path: the tar.
        sha256: the tar's, where pack's index.json gives it; a sidecar of another tar is then an old one.
        max_member_bytes: the largest member allowed.

    Raises:
        ShardError: the tar is damaged, incomplete, holds what it must not, or changed since it was indexed.
    """
    path = Path(path)
    sidecar = sidecar_path(path)
    index = unpack_sidecar(sidecar.read_bytes()) if sidecar.exists() else None
    status = path.stat()
    if index is None or sha256 not in (None, index.sha256):
        index = build_index(path, max_member_bytes=max_member_bytes)
        _write_sidecar(sidecar, index)
    elif not _is_unchanged(index, status, sidecar):
        index = _compare_again(path, index)
        _write_sidecar(sidecar, index)
    return index


def build_index(path: Path, *, max_member_bytes: int = MAX_MEMBER_BYTES) -> ShardIndex:
    """Walk a tar and index it; nothing is written.

    Raises:
        ShardError: see `load_index`.
    """
    status = path.stat()
    walk = Walk(path, max_member_bytes=max_member_bytes)
    rows: dict[str, dict[str, Member]] = {}
    problems, key = [], None
    for member in walk:
        if member.key != key and member.key in rows:
            problems.append(f"{member.key} is there twice, or its members are not side by side")
        key = member.key
        if member.kind in rows.setdefault(key, {}):
            problems.append(f"{key} has two {member.kind} members")
        rows[key][member.kind] = member
    kinds = max((set(row) for row in rows.values()), key=len, default=_KIND_SETS[0])
    kinds = next((allowed for allowed in _KIND_SETS if allowed & kinds), kinds)
    problems += [
        f"{key} has {_listed(row)}, but needs {_listed(kinds)}" for key, row in rows.items() if set(row) != kinds
    ]
    if problems:
        more = f" (and {len(problems) - _NUM_SHOWN} more)" if len(problems) > _NUM_SHOWN else ""
        raise ShardError(f"{path}: {'; '.join(problems[:_NUM_SHOWN])}{more}; pack this shard again.")
    return _to_index(path, rows, kinds, walk.sha256, status)


def sidecar_path(path: Path) -> Path:
    """Where the index of a tar is kept."""
    return path.with_name(path.name + SIDECAR_SUFFIX)


def write_index(path: Path) -> ShardIndex:
    """Index a tar that was just written and leave the sidecar beside it: equal bytes for equal tars.

    Raises:
        ShardError: see `load_index`; also where the folder cannot be written to.
    """
    index = build_index(Path(path))
    write_atomically(sidecar_path(Path(path)), pack_sidecar(replace(index, mtime_ns=AS_WRITTEN)))
    return index


def pack_sidecar(index: ShardIndex) -> bytes:
    """The sidecar's bytes: a safetensors file whose metadata holds a crc32 over its arrays.

    All of it is one field of the metadata, because safetensors writes several in any order.
    """
    arrays = {
        "keys": np.frombuffer("\n".join(index.keys).encode(), np.uint8),
        "tasks": np.frombuffer("\n".join(index.tasks).encode(), np.uint8),
        "seconds": index.seconds,
        "task_ids": index.task_ids,
        "has_text": index.has_text,
        **{f"members.{kind}": rows for kind, rows in index.members.items()},
    }
    facts = {"version": _VERSION, "name": index.name, "size": index.size, "sha256": index.sha256}
    facts |= {"mtime_ns": index.mtime_ns, "samples": len(index)}
    return tensors.save(arrays, {"index": json.dumps(facts | {"crc32": _checksum(arrays, facts)})})


def unpack_sidecar(data: bytes) -> ShardIndex | None:
    """The index in a sidecar's bytes; None where they are damaged or of another version."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts, arrays = json.loads(header["__metadata__"]["index"]), tensors.load(data)
        if facts.pop("crc32") != _checksum(arrays, facts) or facts["version"] != _VERSION:
            return None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError):
        return None
    return ShardIndex(
        name=facts["name"],
        size=facts["size"],
        sha256=facts["sha256"],
        mtime_ns=facts["mtime_ns"],
        keys=_split_lines(arrays["keys"]),
        members={name.partition(".")[2]: rows for name, rows in arrays.items() if name.startswith("members.")},
        seconds=arrays["seconds"],
        tasks=_split_lines(arrays["tasks"]),
        task_ids=arrays["task_ids"],
        has_text=arrays["has_text"],
    )


def _is_unchanged(index: ShardIndex, status: os.stat_result, sidecar: Path) -> bool:
    """Whether a tar has the size and the age that its sidecar knows."""
    if index.mtime_ns == AS_WRITTEN:
        is_known = status.st_mtime_ns <= sidecar.stat().st_mtime_ns
    else:
        is_known = status.st_mtime_ns == index.mtime_ns
    return is_known and status.st_size == index.size


def _write_sidecar(path: Path, index: ShardIndex) -> None:
    try:
        write_atomically(path, pack_sidecar(index))
    except OSError as error:  # data on a read-only disk still streams; only the walk is repeated next time
        _log.warning("%s cannot be written (%s); the shard will be indexed again next time", path, error.strerror)


def _compare_again(path: Path, index: ShardIndex) -> ShardIndex:
    """Take a touched or copied tar for the indexed one only if its content is."""
    status = path.stat()
    digest, sidecar = "not computed", sidecar_path(path).name
    if status.st_size == index.size:
        digest = hash_file(path)
    if digest != index.sha256:
        is_target = "targets" in index.members
        remedy = "run `distill cache` again, which makes it anew" if is_target else "restore it, or pack it again"
        raise ShardError(
            f"{path} has {status.st_size} bytes and sha256 {digest[:12]}, but {sidecar} was built from "
            f"{index.size} bytes and {index.sha256[:12]} ({len(index)} samples); {remedy}."
        )
    return replace(index, mtime_ns=status.st_mtime_ns)


def _to_index(path: Path, rows: dict, kinds: set[str], sha256: str, status: os.stat_result) -> ShardIndex:
    facts = [_read_facts(row["json"].data) if "json" in row else (0.0, "", False) for row in rows.values()]
    tasks = sorted({task for _, task, _ in facts})
    members = {
        kind: np.array(
            [(row[kind].offset, row[kind].size, row[kind].crc32) for row in rows.values()], np.int64
        ).reshape(-1, 3)
        for kind in sorted(kinds)
    }
    return ShardIndex(
        name=path.name,
        size=status.st_size,
        sha256=sha256,
        mtime_ns=status.st_mtime_ns,
        keys=list(rows),
        members=members,
        seconds=np.array([seconds for seconds, _, _ in facts], np.float32),
        tasks=tasks,
        task_ids=np.array([tasks.index(task) for _, task, _ in facts], np.uint16),
        has_text=np.array([has_text for _, _, has_text in facts], bool),
    )


def _read_facts(data: bytes) -> tuple[float, str, bool]:
    """Seconds, task, and whether there is an answer; zeros where the JSON is bad, which the reader then reports."""
    try:
        record = json.loads(data)
        seconds, task = float(record["duration"]), str(record["task"])
        valid = 0 <= seconds < math.inf and "\n" not in task
        return (seconds, task, isinstance(record["text"], str)) if valid else (0.0, "", False)
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0.0, "", False


def _checksum(arrays: dict[str, np.ndarray], facts: dict) -> int:
    crc = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc


def _split_lines(array: np.ndarray) -> list[str]:
    text = array.tobytes().decode()
    return text.split("\n") if text else []


def _listed(names) -> str:
    return " and ".join(sorted(names)) or "nothing"
