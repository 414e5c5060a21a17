"""Every sample of a set of shards in a few flat arrays: the indexes of the tars, joined with those of a target cache.

About 100 bytes a sample, so that a million samples open in seconds and forked workers share them. Knows no order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from shards.field_types import expand_home
from shards.jsonfile import ShapeError, parse_object
from shards.lazy_imports import late
from shards.streaming.limits import Limits
from shards.streaming.selection import Selection
from shards.tars.archive import ShardError
from shards.tars.index import SIDECAR_SUFFIX, ShardIndex, load_index, unpack_sidecar
from shards.tars.source import SHARD_SUFFIX, TARGETS_SUFFIX, expand_shards, is_folder, is_remote, read_small

np = late("numpy")

CATALOG = "index.json"  # written by `distill pack`: samples, bytes and sha256 of each shard
LISTED_TYPES = {"name": str, "samples": int, "bytes": int, "sha256": str, "seconds": float, "rows": list}
LISTED = ("name", "samples", "bytes", "sha256")  # of each shard, in it
_NUM_SHOWN = 5  # keys listed in an error
_NUM_THREADS = 8


@dataclass(frozen=True, eq=False)
class Catalog:
    """All samples, in the order of the shards."""

    names: list[str]  # path or URL of each shard
    target_names: list[str]  # of its target shard; empty without a target cache
    answer_names: list[str]  # of the shard of the student's answers; empty without a round
    sizes: dict[str, int]  # bytes of every tar above
    attested: list[bool]  # per shard: whether an index.json vouches for the very bytes that were indexed
    shards: np.ndarray  # int32: shard of each sample
    keys: np.ndarray  # bytes of fixed width
    members: dict[str, np.ndarray]  # "audio", "json", "targets", "answers" -> int64 (samples, 3): offset, size, crc32
    seconds: np.ndarray  # float32
    tasks: list[str]  # sorted
    task_ids: np.ndarray  # uint16, into `tasks`
    has_text: np.ndarray  # bool
    digest: str  # hash of names and contents of the audio shards
    answers_digest: str  # hash of names and contents of the shards of the student's answers; empty without a round

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """Key of a sample."""
        return self.keys[row].decode()

    def task_rows(self, task: str) -> np.ndarray:
        """Samples of a task."""
        return np.flatnonzero(self.task_ids == self.tasks.index(task))

    def chosen_rows(self, task: str, selection: Selection) -> np.ndarray:
        """Samples of a task that take part."""
        rows = self.task_rows(task)
        left_out = [key.encode() for key, weight in selection.sample_weights.items() if weight == 0]
        rows = rows[~np.isin(self.keys[rows], left_out)] if left_out else rows
        if not selection.labelled_only:
            return rows
        rows = rows[self.has_text[rows]]
        return rows[[selection.shows_text(self.key(row)) for row in rows]] if selection.labelled_share < 1 else rows


def open_catalog(
    shards: str | Path | Sequence[str | Path], selection: Selection | None = None, limits: Limits | None = None
) -> Catalog:
    """Open, check and join the indexes of shards.

    Args:
        shards: see `shards.tars.source.expand_shards`.
        selection: the tasks whose samples must have their targets, where there is a target cache; None: all samples.
        limits: the limits of members' sizes, and of copies of remote shards; None: the defaults.

    Raises:
        ShardError: a shard is missing, damaged, or not what its index or `index.json` says; a key comes twice; a target
            is missing or foreign.
    """
    selection, limits = selection or Selection(), limits or Limits()
    shards = expand_home(shards)
    names = expand_shards(shards)
    listings = _read_listings(names)
    indexes = _load_all(names, limits, listings)
    wrong = next((name for name, index in zip(names, indexes) if set(index.members) != {"audio", "json"}), None)
    if wrong is not None:
        raise ShardError(f"{wrong} holds targets, but audio is asked for; give it as targets.")
    if isinstance(shards, str | Path) and is_folder(str(shards)):
        _check_whole(str(shards), names, listings)
    _check_unique(names, indexes)
    catalog = _concatenate(names, indexes, attested=[_folder(name) in listings for name in names])
    if selection.targets is not None:
        wanted = [_wanted(index, selection.tasks) for index in indexes]
        joined, _ = _join(catalog, "targets", selection.targets, indexes, wanted, limits)
        catalog = replace(joined, target_names=[_target_name(selection.targets, name) for name in names])
    if selection.student_answers is not None:
        wanted = [np.zeros(len(index), bool) for index in indexes]
        joined, digest = _join(catalog, "answers", selection.student_answers, indexes, wanted, limits)
        names_there = [_target_name(selection.student_answers, name) for name in names]
        catalog = replace(joined, answer_names=names_there, answers_digest=digest)
    return catalog


def is_packed(folder: str | Path) -> bool:
    """Whether a local folder is there, or a remote one that `distill pack` filled."""
    return read_small(f"{folder}{CATALOG}") is not None if is_remote(str(folder)) else Path(folder).is_dir()


def hash_shards(shards: Sequence[str]) -> dict[str, str]:
    """sha256 of each shard by its name without folder and suffix: index.json's word, or else that of its own index."""
    listings = _read_listings(list(shards))
    entries = {name: _find_entry(name, listings) for name in shards}
    unlisted = _load_all([n for n in shards if entries[n] is None], Limits(), listings)
    found = {name: entry["sha256"] for name, entry in entries.items() if entry is not None}
    found |= {index.name: index.sha256 for index in unlisted}
    return {_base(name).removesuffix(SHARD_SUFFIX): sha256 for name, sha256 in found.items()}


def _join(
    catalog: Catalog,
    kind: str,
    folder: str | Path,
    indexes: list[ShardIndex],
    wanted: list[np.ndarray],
    limits: Limits,
) -> tuple[Catalog, str]:
    """The catalog with the members of the sibling shards in a folder as its `kind`, and the hash of those shards."""
    names = [_target_name(folder, name) for name in catalog.names]
    siblings = _load_all(names, limits, {})
    rows = [join_targets(*pair) for pair in zip(indexes, siblings, wanted)]
    sizes = {name: index.size for name, index in zip(names, siblings)}
    joined = replace(catalog, sizes=catalog.sizes | sizes, members=catalog.members | {kind: np.concatenate(rows)})
    return joined, _digest(siblings)


def join_targets(audio: ShardIndex, targets: ShardIndex, wanted: np.ndarray) -> np.ndarray:
    """Rows of the target members in the order of the audio shard's samples.

    Args:
        audio: index of the audio shard.
        targets: index of its sibling.
        wanted: bool per sample of the audio shard: whether it must have a target.

    Returns:
        int64 of shape (samples, 3): offset, size, crc32; -1 where there is none.

    Raises:
        ShardError: naming the targets that are missing or belong to no sample.
    """
    row_of = {key: row for row, key in enumerate(targets.keys)}
    rows = np.array([row_of.pop(key, -1) for key in audio.keys], np.int64)
    if row_of:
        raise ShardError(
            f"{targets.name} holds a target of {_shown(list(row_of))}, but {audio.name} has no such sample: it was "
            f"cached from other data; run `distill cache` again."
        )
    missing = [audio.keys[row] for row in np.flatnonzero(wanted & (rows < 0))]
    if missing:
        raise ShardError(
            f"{targets.name} holds no target of {_shown(missing)}, but {audio.name} has it; run `distill cache` again."
        )
    table = np.concatenate([targets.members["targets"], np.full((1, 3), -1, np.int64)])
    return table[rows]  # row -1 is the appended one


def _load_all(names: list[str], limits: Limits, listings: dict[str, dict[str, dict]]) -> list[ShardIndex]:
    """Index of each shard: its sidecar where there is a good one, else a walk over the tar."""

    def load(name: str) -> ShardIndex:
        entry = _find_entry(name, listings)
        sha256 = None if entry is None else entry["sha256"]
        sidecar = read_small(name + SIDECAR_SUFFIX) if is_remote(name) else None
        index = unpack_sidecar(sidecar) if sidecar is not None else None
        if index is None:
            with limits.cache.local(name) as path:
                index = load_index(path, sha256=sha256, max_member_bytes=limits.max_member_bytes)
        for field, actual in (("samples", len(index)), ("bytes", index.size), ("sha256", index.sha256)):
            if entry is not None and entry[field] != actual:
                raise ShardError(
                    f"{name} has {field} {actual}, but {CATALOG} beside it says {entry[field]}; copy or pack it again."
                )
        return replace(index, name=_base(name))  # a local copy has another one

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(load, names))


def _concatenate(names: list[str], indexes: list[ShardIndex], attested: list[bool]) -> Catalog:
    """One catalog of all audio shards."""
    tasks = sorted({task for index in indexes for task in index.tasks})
    return Catalog(
        names=names,
        target_names=[],
        answer_names=[],
        sizes={name: index.size for name, index in zip(names, indexes)},
        attested=attested,
        shards=np.repeat(np.arange(len(names), dtype=np.int32), [len(index) for index in indexes]),
        keys=np.concatenate([np.array(index.keys, "S") for index in indexes]),
        members={kind: np.concatenate([index.members[kind] for index in indexes]) for kind in ("audio", "json")},
        seconds=np.concatenate([index.seconds for index in indexes]),
        tasks=tasks,
        task_ids=np.concatenate([_renumber(index, tasks) for index in indexes]),
        has_text=np.concatenate([index.has_text for index in indexes]),
        digest=_digest(indexes),
        answers_digest="",
    )


def _digest(indexes: list[ShardIndex]) -> str:
    """Hash of the names and contents of shards."""
    return hashlib.sha256(json.dumps([[index.name, index.sha256] for index in indexes]).encode()).hexdigest()


def _read_listings(names: list[str]) -> dict[str, dict[str, dict]]:
    """What the index.json of each folder says of its shards, for the folders that have one."""
    listings, policies = {}, {}
    for folder in dict.fromkeys(_folder(name) for name in names):
        data = read_small(f"{folder}{CATALOG}")
        if data is not None:
            policies[folder] = read_channels(data)
            listings[folder] = {shard["name"]: shard for shard in read_listing(f"{folder}{CATALOG}", data)}
    _compare_channels(policies)
    return listings


def check_channels(folders: Iterable[str | Path]) -> None:
    """Refuse a run's folders of shards, or their URLs, in which several channels are not heard alike.

    Raises:
        ShardError: naming what was heard in each.
    """
    found = {str(folder): read_small(f"{str(folder).rstrip('/')}/{CATALOG}") for folder in folders}
    _compare_channels({folder: read_channels(data) for folder, data in found.items() if data is not None})


def _compare_channels(policies: dict[str, str]) -> None:
    if len(set(policies.values()) - {"unknown"}) > 1:
        said = ", ".join(f"{folder} {policy}" for folder, policy in policies.items())
        raise ShardError(
            f"channels of {said}, but shards that are read together must hear several channels alike; pack one of them "
            f"again with --channels."
        )


def read_channels(data: bytes) -> str:
    """What was heard of several channels, out of an index.json."""
    try:
        return json.loads(data)["options"]["channels"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "unknown"  # `read_listing` says what is wrong


def read_listing(path: str | Path, data: bytes, fields: Sequence[str] = LISTED) -> list[dict]:
    """These fields of each shard that an index.json lists.

    Raises:
        ShardError: it is damaged, or something else's.
    """
    try:
        shards = parse_object(data, {"shards": list})["shards"]
        for shard in shards:
            parse_object(json.dumps(shard), {field: LISTED_TYPES[field] for field in fields})
    except ShapeError as error:
        raise ShardError(
            f"{path} cannot be read as what `distill pack` writes (it {error}), but lists the shards beside it; "
            f"restore it, remove it if something else wrote it, or pack again."
        ) from error
    return [{field: shard[field] for field in fields} for shard in shards]


def _find_entry(name: str, listings: dict[str, dict[str, dict]]) -> dict | None:
    """What index.json says of a shard; None where there is no index.json."""
    if _folder(name) not in listings:
        return None
    listed = listings[_folder(name)]
    if _base(name) not in listed:
        raise ShardError(f"{name} is not one of the {len(listed)} shards of its {CATALOG}; move it, or pack again.")
    return listed[_base(name)]


def _check_whole(folder: str, names: list[str], listings: dict[str, dict[str, dict]]) -> None:
    listed = {name for listing in listings.values() for name in listing}
    lost = sorted(listed - {_base(name) for name in names})
    if lost:
        raise ShardError(
            f"{folder} has {len(names)} shards, but its {CATALOG} lists {len(listed)}: {_shown(lost)} is missing; "
            f"copy or pack it again."
        )


def _check_unique(names: list[str], indexes: list[ShardIndex]) -> None:
    if len(set().union(*(index.keys for index in indexes))) == sum(len(index) for index in indexes):
        return
    shard_of: dict[str, str] = {}
    for name, index in zip(names, indexes):
        for key in index.keys:
            if shard_of.setdefault(key, name) != name:
                raise ShardError(f"{key} is in {shard_of[key]} and in {name}, but a key is unique; pack them together.")


def _target_name(targets: str | Path, name: str) -> str:
    """The target shard beside which a shard of this name lies in a target cache."""
    stem = _base(name).removesuffix(SHARD_SUFFIX)
    target = f"{str(targets).rstrip('/')}/{stem}{TARGETS_SUFFIX}"
    if not is_remote(target) and not Path(target).exists():
        raise ShardError(f"{target} is missing, but {name} needs its targets; run `distill cache` (again).")
    return target


def _wanted(index: ShardIndex, tasks: Sequence[str] | None) -> np.ndarray:
    """Which samples of a shard take part."""
    chosen = [tasks is None or task in tasks for task in index.tasks]
    return np.array(chosen, bool)[index.task_ids]


def _renumber(index: ShardIndex, tasks: list[str]) -> np.ndarray:
    return np.array([tasks.index(task) for task in index.tasks], np.uint16)[index.task_ids]


def _folder(name: str) -> str:
    return name[: len(name) - len(_base(name))]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
