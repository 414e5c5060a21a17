"""`distill subset`: a smaller manifest: chosen tasks, a share of each task, a number of rows or hours.

Always the same rows, and clips whole: rows that share recording, task and question (five captions) come together.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.field_types import to_path
from shards.lazy_imports import late
from shards.manifests.manifest import Entry, read_manifest, write_manifest
from shards.packing.stats import measure_seconds
from shards.pool import count_cpus

np = late("numpy")


@dataclass(frozen=True)
class SubsetReport:
    """What was chosen."""

    num_rows: int
    num_chosen: int
    seconds: float | None  # of the chosen rows; None: not measured, because no hours were asked for

    def __str__(self) -> str:
        hours = "" if self.seconds is None else f" ({self.seconds / 3600:.2f} h)"
        return f"{self.num_chosen} of {self.num_rows} rows{hours}"


def subset(
    manifest: Path,
    out: Path,
    *,
    tasks: Collection[str] | None = None,
    share: float = 1.0,
    rows: int | None = None,
    hours: float | None = None,
    seed: int = 0,
    root: Path | None = None,
    workers: int | None = None,
) -> SubsetReport:
    """Write a part of a manifest, in its order; the same manifest and seed give the same rows.

    A smaller share is a part of a larger one. Where a share ends within a clip's rows, the clip is left out.

    Args:
        manifest: what to choose from.
        out: the manifest to write.
        tasks: those to keep; None keeps all.
        share: the share of each task's rows.
        rows: the most rows of each task.
        hours: the most audio of what is left; needs the header of every recording.
        seed: the seed of the draw.
        root: the folder that paths are relative to, if not the manifest's own.
        workers: processes that read headers; by default one a CPU.

    Raises:
        ValueError: a task that no row has, or nothing is left.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but must be over 0 and at most 1; use 0.1 for a tenth.")
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}, but must be at least 1; use 200000, or leave it out for all.")
    folder = root or Path(manifest).parent
    row_tasks, order = [], []
    for entry in read_manifest(manifest, root=root):
        row_tasks.append(entry.task)
        order.append(_draw(entry, seed, folder))
    row_tasks, order = np.array(row_tasks), np.array(order, np.uint64)
    is_chosen = _choose_share(row_tasks, order, tasks, share, rows, manifest)
    seconds = None
    if hours is not None:
        entries = (entry for entry in read_manifest(manifest, root=root) if is_chosen[entry.number])
        lengths = np.zeros(len(order))
        lengths[is_chosen] = list(measure_seconds(entries, workers=workers))
        is_chosen, seconds = _choose_hours(is_chosen, lengths, order, hours)
    if not is_chosen.any():
        raise ValueError(f"{manifest} has {len(order)} rows, but none is left; raise share or hours.")

    def chosen() -> Iterator[Entry]:
        return (entry for entry in read_manifest(manifest, root=root) if is_chosen[entry.number])

    return SubsetReport(len(order), write_manifest(out, chosen()), seconds)


def _draw(entry: Entry, seed: int, folder: Path) -> int:
    """A clip's place in the draw: 64 bits of a hash of the seed and of what its rows share, wherever the data lie."""
    paths = [os.path.relpath(path, folder) for path in entry.paths]
    clip = f"{seed} {paths} {entry.start} {entry.end} {entry.task} {entry.question}"
    return int.from_bytes(hashlib.blake2b(clip.encode(), digest_size=8).digest())


def _choose_share(
    row_tasks: np.ndarray,
    order: np.ndarray,
    tasks: Collection[str] | None,
    share: float,
    most: int | None,
    manifest: Path,
) -> np.ndarray:
    """Of each task the rows that come first in the draw; at least one clip."""
    is_chosen = np.zeros(len(order), bool)
    present = sorted(set(row_tasks.tolist()))
    for task in present if tasks is None else tasks:
        if task not in present:
            raise ValueError(f"{manifest} has no task {task!r}, but it was asked for; it has {', '.join(present)}.")
        rows = np.flatnonzero(row_tasks == task)
        rows = rows[np.argsort(order[rows], kind="stable")]
        count = min(max(1, round(share * len(rows))), most or len(rows))
        count = _end_of_clip(order[rows], count) or int((order[rows] == order[rows[0]]).sum())
        is_chosen[rows[:count]] = True
    return is_chosen


def _end_of_clip(draws: np.ndarray, count: int) -> int:
    """The most of the first `count` rows that are whole clips: rows of one clip share their draw."""
    return count if count == len(draws) else int(np.searchsorted(draws, draws[count]).clip(max=count))


def _choose_hours(
    is_chosen: np.ndarray, lengths: np.ndarray, order: np.ndarray, hours: float
) -> tuple[np.ndarray, float]:
    """The rows that come first in the draw and fit; a row whose length is unknown (NaN) is left out."""
    rows = np.flatnonzero(is_chosen & np.isfinite(lengths))
    rows = rows[np.argsort(order[rows], kind="stable")]
    fitting = rows[: _end_of_clip(order[rows], int((np.cumsum(lengths[rows]) <= hours * 3600).sum()))]
    is_fitting = np.zeros_like(is_chosen)
    is_fitting[fitting] = True
    return is_fitting, float(lengths[fitting].sum())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill subset` takes."""
    parser.add_argument("manifest", type=to_path)
    parser.add_argument("out", type=to_path, help="manifest to write")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these")
    parser.add_argument("--share", type=float, default=1.0, help="of each task's rows (%(default)g)")
    parser.add_argument("--rows", type=int, help="of each task, at most")
    parser.add_argument("--hours", type=float, help="of audio, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=to_path, help="folder that the manifest's paths are relative to (its own)")
    parser.add_argument("--workers", type=int, default=count_cpus(), help="processes that read headers (%(default)s)")


def main(args: argparse.Namespace) -> int:
    """Run `distill subset`."""
    report = subset(
        args.manifest,
        args.out,
        tasks=args.tasks,
        share=args.share,
        rows=args.rows,
        hours=args.hours,
        seed=args.seed,
        root=args.root,
        workers=args.workers,
    )
    print(report)
    return 0
