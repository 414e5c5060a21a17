"""`distill split`: one manifest into a training and a validation manifest that share no speaker and no recording."""

import argparse
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.field_types import to_path
from shards.manifests.manifest import Entry, read_manifest, write_manifest

BY = ("speaker", "source", "recording")


@dataclass(frozen=True)
class SplitReport:
    """How the rows and groups were divided."""

    num_train: int
    num_valid: int
    train_groups: int
    valid_groups: int

    def __str__(self) -> str:
        return (
            f"train: {self.num_train} rows of {self.train_groups} groups, "
            f"valid: {self.num_valid} rows of {self.valid_groups} groups"
        )


def split(
    manifest: Path,
    train: Path,
    valid: Path,
    *,
    valid_share: float = 0.05,
    by: str = "speaker",
    speaker_pattern: str | None = None,
    seed: int = 0,
    root: Path | None = None,
) -> SplitReport:
    """Write two manifests that have no group in common; the same input and seed give the same files.

    Rows that share a recording are of one group, whatever else they are. Groups are drawn in an order that a hash of
    the seed and their name gives, as long as they fit into the share.

    Args:
        manifest: what to split; memory grows with the number of its recordings.
        train, valid: the manifests to write.
        valid_share: the share of the rows that goes to `valid` at the most (the smallest group, if none fits).
        by: what must not be on both sides: speaker, source (the data set) or recording.
        speaker_pattern: a regular expression whose first group is the speaker in the path, for manifests without
            `speaker`.
        seed: the seed of the draw.
        root: the folder that paths are relative to, if not the manifest's own.

    Raises:
        ValueError: a row has no speaker, or there is only one group.
    """
    if not 0 < valid_share < 1:
        raise ValueError(f"valid_share is {valid_share}, but must lie between 0 and 1; use 0.05.")
    name_group = _group_namer(by, speaker_pattern, root or Path(manifest).parent)
    groups = _Groups()
    sizes: Counter = Counter()
    for entry in read_manifest(manifest, root=root):
        sizes[groups.join(name_group(entry), entry)] += 1
    merged: Counter = Counter()
    for group, size in sizes.items():
        merged[groups.find(group)] += size
    chosen = _draw(merged, valid_share, seed, by, manifest)

    def rows(in_valid: bool) -> Iterator[Entry]:
        for entry in read_manifest(manifest, root=root):
            if (groups.find(name_group(entry)) in chosen) == in_valid:
                yield entry

    num_train, num_valid = write_manifest(train, rows(False)), write_manifest(valid, rows(True))
    return SplitReport(num_train, num_valid, len(merged) - len(chosen), len(chosen))


class _Groups:
    """Groups that become one when a recording turns up in both (disjoint sets)."""

    def __init__(self):
        self._parents: dict[str, str] = {}
        self._group_of: dict[str, str] = {}  # recording -> a group it was seen in

    def find(self, group: str) -> str:
        """The name that the group's set goes by: the smallest in it."""
        while (parent := self._parents.setdefault(group, group)) != group:
            self._parents[group] = group = self._parents[parent]
        return group

    def join(self, group: str, entry: Entry) -> str:
        """Put the entry's recordings into a group, and return the group."""
        for path in entry.paths:
            first, second = sorted((self.find(group), self.find(self._group_of.setdefault(str(path), group))))
            self._parents[second] = first
        return group


def _group_namer(by: str, speaker_pattern: str | None, folder: Path) -> Callable[[Entry], str]:
    """A function from an entry to the name of its group, which is the same wherever the data lie."""
    if by not in BY:
        raise ValueError(f"by is {by!r}, but must be one of {', '.join(BY)}; choose one.")
    pattern = re.compile(speaker_pattern) if speaker_pattern else None

    def name_group(entry: Entry) -> str:
        if by == "source":
            return entry.source
        if by == "recording":
            return os.path.relpath(entry.path, folder)
        speaker = entry.speaker
        if pattern is not None:
            match = pattern.search(entry.path.as_posix())
            speaker = match[1] if match else None
        if speaker is None:
            raise ValueError(
                f"{entry.place}.speaker is missing, but the split is by speaker; "
                "give speaker_pattern (--speaker-pattern), or split by recording (--by recording)."
            )
        return f"{entry.source}/{speaker}"

    return name_group


def _draw(sizes: Counter, valid_share: float, seed: int, by: str, manifest: Path) -> set[str]:
    if len(sizes) < 2:
        raise ValueError(
            f"{manifest} has {len(sizes)} groups by {by}, but a split needs two; split by something finer."
        )
    room = valid_share * sum(sizes.values())
    chosen = set()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).digest()):
        if sizes[group] <= room and len(chosen) < len(sizes) - 1:
            chosen.add(group)
            room -= sizes[group]
    return chosen or {min(sizes, key=lambda group: (sizes[group], group))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill split` takes."""
    parser.add_argument("manifest", type=to_path)
    parser.add_argument("train", type=to_path, help="manifest to write")
    parser.add_argument("valid", type=to_path, help="manifest to write")
    parser.add_argument("--valid-share", type=float, default=0.05, help="of the rows, at most (%(default)g)")
    parser.add_argument("--by", choices=BY, default="speaker", help="what may be on one side only (%(default)s)")
    parser.add_argument("--speaker-pattern", metavar="REGEX", help="its first group is the speaker in a path")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=to_path, help="folder that the manifest's paths are relative to (its own)")


def main(args: argparse.Namespace) -> int:
    """Run `distill split`."""
    report = split(
        args.manifest,
        args.train,
        args.valid,
        valid_share=args.valid_share,
        by=args.by,
        speaker_pattern=args.speaker_pattern,
        seed=args.seed,
        root=args.root,
    )
    print(report)
    return 0
