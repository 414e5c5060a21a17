"""`distill pack`: a manifest and its recordings become numbered tars and an `index.json`. Knows no model.

Workers decode and encode; one process writes, in the manifest's order, so that the bytes are the same whatever the
number of workers. A shard gets its name when it is whole; `index.partial.json` remembers the shards that are done, and
becomes `index.json` with the last one. A recording that cannot be trusted is written to `bad_samples.jsonl` and left
out; nothing takes its place.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile
from pathlib import Path

from shards.audio.decode import CHANNELS, LEFT
from shards.audio.limits import add_limit_arguments, read_limits
from shards.field_types import to_path
from shards.files.lock import hold
from shards.files.space import check_space
from shards.manifests.manifest import ANY_TASK, Entry, KnownTasks, check_paths, check_tasks, scan_manifest
from shards.manifests.records import RowError
from shards.packing.encode import TOO_LONG, BadSample, EncodeOptions, describe_reasons, encode_rows
from shards.packing.folder import PackFolder, ShardSize
from shards.packing.space import EvenChoice, estimate_bytes
from shards.pool import batched, count_cpus, map_in_order, progress_bar

ROWS_A_PIECE = 16
SIZE = ShardSize()
MAX_BAD_SHARE, MIN_MAX_BAD = 0.001, 10
LOCK = ".pack.lock"


@dataclass(frozen=True)
class PackReport:
    """What lies in the folder when packing has ended."""

    out: Path
    num_shards: int
    num_samples: int
    seconds: float
    num_bytes: int
    bad: tuple[BadSample, ...]
    num_resumed: int  # shards that an earlier run had done

    def __str__(self) -> str:
        bad = f"{len(self.bad)} bad ({describe_reasons(self.bad)})" if self.bad else "none bad"
        return (
            f"{self.out}: {self.num_shards} shards ({self.num_resumed} were done), {self.num_samples} samples, "
            f"{self.seconds / 3600:.2f} h, {self.num_bytes / 1e6:.1f} MB, {bad}"
        )


def pack(
    manifest: Path,
    out: Path,
    *,
    name: str | None = None,
    root: Path | None = None,
    tasks: KnownTasks = ANY_TASK,
    size: ShardSize = SIZE,
    options: EncodeOptions | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    workers: int | None = None,
    show_progress: bool = False,
) -> PackReport:
    """Pack a manifest into `out/NAME-000000.tar` and so on, going on where an interrupted run stopped.

    Args:
        manifest: see `shards.manifests.manifest.read_manifest`.
        out: a folder of its own; made if need be.
        name: the name of the shards; by default the manifest's.
        root: the folder that the manifest's paths are relative to, if not its own.
        tasks: those that exist.
        size: the most that a shard holds.
        options: what is accepted, and what is done with long clips; None: the defaults of `EncodeOptions`.
        max_bad_share: more bad samples than this share of all, and than 10, end the run.
        workers: processes; by default one a CPU.
        show_progress: draw a bar on stderr.

    Raises:
        FileNotFoundError: the manifest or a recording is not there.
        ValueError: unknown task, too many bad samples, or `out` holds another pack.
        OSError: the disk has too little room.
    """
    manifest, out = Path(manifest).expanduser(), Path(out).expanduser()
    workers = count_cpus() if workers is None else workers
    options = options or EncodeOptions()
    num_rows, some = _survey(manifest, root, tasks)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out / LOCK, f"{out} is being packed by {{holder}}, but a folder takes one pack at a time; wait for it."):
        packing = PackFolder(manifest, out, name or manifest.stem, size, options)
        resumed = packing.resume()
        if not packing.complete:
            longest = math.inf if options.too_long == "chunk" else options.limits.max_seconds
            needed = estimate_bytes(some, num_rows - packing.next_row, longest=longest)
            check_space(out, needed, "shards", remedy="free some space, or give a folder on another disk")
            max_bad = max(MIN_MAX_BAD, math.ceil(max_bad_share * num_rows))
            rows = scan_manifest(manifest, root=root, questions=tasks.questions)
            encoded = _encode_from(packing.next_row, rows, options, workers)
            with progress_bar(f"packing {packing.name}", num_rows, show=show_progress) as advance:
                advance(packing.next_row)
                packing.write(encoded, max_bad, num_rows, advance)
    return PackReport(
        out=out,
        num_shards=len(packing.shards),
        num_samples=packing.totals()["samples"],
        seconds=packing.totals()["seconds"],
        num_bytes=packing.totals()["bytes"],
        bad=tuple(packing.bad),
        num_resumed=resumed,
    )


def _encode_from(first: int, rows: Iterable, options: EncodeOptions, workers: int) -> Iterator:
    """The rows from a number on, encoded by several processes, in order."""
    rows = dropwhile(lambda row: row.number < first, rows)
    return map_in_order(partial(encode_rows, options=options), batched(rows, ROWS_A_PIECE), workers=workers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill pack` takes."""
    parser.add_argument("manifest", type=to_path, help="SALMONN's JSON or JSON Lines; with --verify, the packed folder")
    parser.add_argument("out", type=to_path, nargs="?", help="folder for the shards, index.json and bad_samples.jsonl")
    parser.add_argument("--name", help="of the shards (the manifest's)")
    parser.add_argument("--root", type=to_path, help="folder that its paths are relative to (the manifest's)")
    parser.add_argument("--prompts", type=to_path, help="JSON file of the prompts whose tasks exist (the library's)")
    parser.add_argument("--shard-samples", type=int, default=SIZE.samples, help="most samples a shard (%(default)s)")
    parser.add_argument("--shard-mb", type=float, default=SIZE.bytes / 1e6, help="most megabytes a shard (%(default)g)")
    parser.add_argument("--too-long", choices=TOO_LONG, default="auto", help="over 30 s; auto skips asr, cuts the rest")
    add_limit_arguments(parser)
    parser.add_argument("--channels", choices=CHANNELS, default=LEFT, help="heard of several (%(default)s)")
    parser.add_argument(
        "--max-bad", type=float, default=MAX_BAD_SHARE, help="share of bad samples to stop above, if over 10"
    )
    parser.add_argument(
        "--max-header-gap", type=float, default=0.0, help="seconds a header may be wrong by (%(default)g)"
    )
    parser.add_argument("--workers", type=int, default=count_cpus(), help="processes (%(default)s)")
    parser.add_argument(
        "--verify", action="store_true", help="read a packed folder again instead: every hash and sample"
    )


def main(args: argparse.Namespace, *, tasks: KnownTasks = ANY_TASK) -> int:
    """Run `distill pack`."""
    if args.verify:
        from shards.packing.verify import verify

        print(verify(args.out or args.manifest, workers=args.workers, show_progress=True))
        return 0
    if args.out is None:
        raise ValueError("out is missing, but shards need a folder; run distill pack MANIFEST OUT.")
    limits = read_limits(args, max_header_gap_seconds=args.max_header_gap)
    report = pack(
        args.manifest,
        args.out,
        name=args.name,
        root=args.root,
        tasks=tasks,
        size=ShardSize(args.shard_samples, int(args.shard_mb * 1e6)),
        options=EncodeOptions(args.too_long, limits, args.channels),
        max_bad_share=args.max_bad,
        workers=args.workers,
        show_progress=True,
    )
    print(report)
    return 0


def _survey(manifest: Path, root: Path | None, tasks: KnownTasks) -> tuple[int, list[Entry]]:
    """Number of rows and some of them, once every task is known and every recording is there; nothing is decoded."""
    num_bad, some = 0, EvenChoice()

    def entries() -> Iterator[Entry]:
        nonlocal num_bad
        for row in scan_manifest(manifest, root=root, questions=tasks.questions):
            if isinstance(row, RowError):
                num_bad += 1
            else:
                yield row

    num_good = 0
    for entry in check_paths(check_tasks(entries(), tasks.names)):
        some.add(entry)
        num_good += 1
    return num_good + num_bad, some.chosen
