"""`distill stats`: samples and hours of each task and data set, and how long the clips are. Decodes nothing."""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.audio.container import UNKNOWN_FRAMES, read_header
from shards.audio.decode import GAP_SECONDS
from shards.audio.limits import AudioError
from shards.field_types import to_path
from shards.lazy_imports import late
from shards.manifests.manifest import Entry, missing_file_error, read_manifest
from shards.pool import batched, count_cpus, map_in_order, progress_bar
from shards.status import print_json, print_status
from shards.streaming.catalog import read_listing

np = late("numpy")
soundfile = late("soundfile")

ROWS_A_PIECE = 256
BIN_SECONDS, NUM_BINS = 2.0, 15  # of the histogram; the last bin takes all that is longer
BAR_WIDTH = 40  # characters


@dataclass
class Count:
    """Of one task in one data set."""

    samples: int = 0
    unlabelled: int = 0
    unknown: int = 0  # whose length no header tells
    seconds: float = 0.0
    longest: float = 0.0  # seconds
    bins: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))

    def add(self, seconds: float, is_labelled: bool) -> None:
        """Count a sample; `seconds` may be NaN."""
        self.samples += 1
        self.unlabelled += not is_labelled
        if not np.isfinite(seconds):
            self.unknown += 1
            return
        self.seconds += seconds
        self.longest = max(self.longest, seconds)
        self.bins[min(int(seconds / BIN_SECONDS), NUM_BINS - 1)] += 1

    def as_json(self) -> dict:
        """Every figure by its name; lengths in seconds."""
        counts = {name: getattr(self, name) for name in ("samples", "unlabelled", "unknown", "seconds", "longest")}
        return {**counts, "bins": self.bins.tolist()}


@dataclass
class Stats:
    """Counts by (task, data set); `str` is the table and the histogram."""

    counts: dict[tuple[str, str], Count]

    @property
    def total(self) -> Count:
        """Of all tasks and data sets."""
        total = Count()
        for count in self.counts.values():
            total.samples += count.samples
            total.unlabelled += count.unlabelled
            total.unknown += count.unknown
            total.seconds += count.seconds
            total.longest = max(total.longest, count.longest)
            total.bins += count.bins
        return total

    def as_json(self) -> dict:
        """The same for a script; lengths are counted by bins of BIN_SECONDS, the last one open."""
        rows = [
            {"task": task, "source": source, **count.as_json()} for (task, source), count in sorted(self.counts.items())
        ]
        return {"rows": rows, "total": self.total.as_json(), "bin_seconds": BIN_SECONDS}

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.histogram()}"

    def table(self) -> str:
        """Counts, one line a task and data set, and their sum."""
        head = ("task", "data set", "samples", "unlabelled", "unknown", "hours", "mean s", "max s")
        rows = [(task, source, *_figures(count)) for (task, source), count in sorted(self.counts.items())]
        rows.append(("all", "", *_figures(self.total)))
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        return "\n".join("  ".join(_align(cell, i, widths[i]) for i, cell in enumerate(row)) for row in (head, *rows))

    def histogram(self) -> str:
        """Lengths of all samples as bars of text."""
        bins = self.total.bins
        scale = BAR_WIDTH / max(int(bins.max()), 1)
        return "\n".join(f"{_bin_name(i):>8}  {'█' * round(n * scale):<{BAR_WIDTH}} {n}" for i, n in enumerate(bins))

    def save_png(self, path: Path) -> None:
        """Draw the lengths, a color a task and data set."""
        from matplotlib.figure import Figure  # half a second, and only here

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        bottom = np.zeros(NUM_BINS)
        for (task, source), count in sorted(self.counts.items()):
            starts = np.arange(NUM_BINS) * BIN_SECONDS
            axes.bar(starts, count.bins, BIN_SECONDS * 0.95, bottom, align="edge", label=f"{task} ({source})")
            bottom += count.bins
        axes.set(xlabel="seconds", ylabel="samples", title=f"{self.total.samples} samples")
        axes.legend()
        figure.savefig(path, dpi=120)


def measure(path: Path, *, root: Path | None = None, workers: int | None = None, show_progress: bool = False) -> Stats:
    """Count the samples of a manifest (by the headers of its recordings) or of a packed folder (by its JSON).

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(path).expanduser()
    counts: dict[tuple[str, str], Count] = {}
    samples = _packed_samples(path) if path.is_dir() else _listed_samples(path, root, workers)
    total = _num_rows(path, root) if show_progress else 0
    if total:
        print_status(f"counting {total} rows of {path}")
    with progress_bar("measuring", total, show=show_progress) as advance:
        for task, source, is_labelled, seconds in samples:
            counts.setdefault((task, source), Count()).add(seconds, is_labelled)
            advance(1)
    return Stats(counts)


def measure_seconds(entries: Iterable[Entry], *, workers: int | None = None) -> Iterator[float]:
    """Length of each entry in seconds by the headers of its recordings; NaN where one does not tell."""
    workers = count_cpus() if workers is None else workers
    pieces = batched(entries, ROWS_A_PIECE)
    for lengths in map_in_order(_measure_piece, pieces, workers=workers):
        yield from lengths


def _measure_piece(entries: list[Entry]) -> list[float]:
    return [
        sum(map(_header_seconds, entry.paths)) + GAP_SECONDS * (len(entry.paths) - 1)
        if entry.end is None
        else entry.end - entry.start
        for entry in entries
    ]


def _header_seconds(path: Path) -> float:
    """By the header; an MP3, and what says no length, is counted."""
    try:
        info = soundfile.info(str(path))
        if info.format == "MP3" or info.frames >= UNKNOWN_FRAMES:
            return read_header(path).seconds or float("nan")
    except (soundfile.SoundFileError, AudioError, OSError, RuntimeError):
        return float("nan")
    return info.frames / info.samplerate


def _listed_samples(path: Path, root: Path | None, workers: int | None) -> Iterator[tuple[str, str, bool, float]]:
    labels = ((entry.task, entry.source, entry.text is not None) for entry in read_manifest(path, root=root))
    lengths = measure_seconds(read_manifest(path, root=root), workers=workers)
    yield from ((*label, seconds) for label, seconds in zip(labels, lengths))


def _packed_samples(folder: Path) -> Iterator[tuple[str, str, bool, float]]:
    index = folder / "index.json"
    if not index.exists():
        raise missing_file_error(index)
    for shard in read_listing(index, index.read_bytes()):
        with tarfile.open(folder / shard["name"]) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    fields = json.load(tar.extractfile(member))
                    yield fields["task"], fields["source"], fields["text"] is not None, fields["duration"]


def _num_rows(path: Path, root: Path | None) -> int:
    if path.is_dir():
        index = path / "index.json"
        return sum(s["samples"] for s in read_listing(index, index.read_bytes())) if index.exists() else 0
    return sum(1 for _ in read_manifest(path, root=root))


def _figures(count: Count) -> tuple[str, ...]:
    mean = count.seconds / max(count.samples - count.unknown, 1)
    counts = (f"{count.samples}", f"{count.unlabelled}", f"{count.unknown}")
    return (*counts, f"{count.seconds / 3600:.2f}", f"{mean:.1f}", f"{count.longest:.1f}")


def _align(cell: str, column: int, width: int) -> str:
    return f"{cell:<{width}}" if column < 2 else f"{cell:>{width}}"


def _bin_name(number: int) -> str:
    start = number * BIN_SECONDS
    return f"{start:g} s +" if number == NUM_BINS - 1 else f"{start:g}-{start + BIN_SECONDS:g} s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill stats` takes."""
    parser.add_argument("path", type=to_path, help="a manifest, or a packed folder")
    parser.add_argument("--png", type=to_path, help="draw the histogram here")
    parser.add_argument("--root", type=to_path, help="folder that the manifest's paths are relative to (its own)")
    parser.add_argument("--workers", type=int, default=count_cpus(), help="processes that read headers (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else on stdout")


def main(args: argparse.Namespace) -> int:
    """Run `distill stats`."""
    stats = measure(args.path, root=args.root, workers=args.workers, show_progress=True)
    if args.json:
        print_json(stats.as_json())
    else:
        print(stats)
    if args.png is not None:
        stats.save_png(args.png)
    return 0
