"""The data sets there are, and `distill manifest`, which writes what they yield: one more is one file and one line.

What is published for validation and test stays out unless it is asked for. An entry whose recording is not there is
yielded too, so that `distill audit` counts it (AudioCaps loses some every month). Opens no audio.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from shards.field_types import to_path
from shards.manifests.datasets.audiocaps import AUDIOCAPS
from shards.manifests.datasets.clotho import CLOTHO
from shards.manifests.datasets.dataset import Request
from shards.manifests.datasets.gigaspeech import GIGASPEECH
from shards.manifests.datasets.librispeech import LIBRISPEECH
from shards.manifests.datasets.musicnet import MUSICNET
from shards.manifests.datasets.wavcaps import WAVCAPS
from shards.manifests.manifest import Entry, missing_file_error, write_manifest

NUM_NAMED = 5  # recordings that are missing
DATASETS = {
    "librispeech": LIBRISPEECH,
    "gigaspeech": GIGASPEECH,
    "clotho": CLOTHO,
    "audiocaps": AUDIOCAPS,
    "wavcaps": WAVCAPS,
    "musicnet": MUSICNET,
}


def read_dataset(
    name: str,
    labels: Path,
    audio: Path | None = None,
    *,
    task: str | None = None,
    subsets: Sequence[str] = (),
    exclude: Sequence[Path] = (),
) -> Iterator[Entry]:
    """Entries of a published data set.

    Args:
        name: one of `DATASETS`.
        labels: LibriSpeech, MusicNet: the folder; WavCaps: its JSON file or the folder `json_files`; the others: their
            JSON or CSV file.
        audio: the folder of the recordings; by default that of the labels.
        task: what the answers are; by default the first that the data set has them for.
        subsets: parts of GigaSpeech (M, DEV), LibriSpeech (train-clean-100) or MusicNet (test); by default what is for
            training.
        exclude: WavCaps' blacklists; by default its `blacklist_exclude_test_ac.json`, where that lies beside.

    Raises:
        FileNotFoundError: there are no labels.
        ValueError: the labels are not those of this data set, or it has no such task, part or list.
    """
    if not labels.exists():
        raise missing_file_error(labels)
    dataset = DATASETS[name]
    task = dataset.tasks[0] if task is None else task
    if task not in dataset.tasks:
        raise ValueError(
            f"task is {task!r}, but the labels of {name} answer {', '.join(dataset.tasks)} alone{dataset.hint}; choose "
            f"one of them."
        )
    wrong = [subset for subset in subsets if not dataset.subsets or not re.fullmatch(dataset.subsets, subset)]
    if wrong:
        parts = dataset.subsets.replace("|", ", ").replace(r"[\w-]+", "…") or "none"
        raise ValueError(f"subset is {wrong[0]!r}, but those of {name} are {parts}; choose one of them.")
    if exclude and not dataset.excludes:
        raise ValueError(f"exclude is {exclude[0]}, but {name} has no lists of what to leave out; drop it.")
    folder = audio or (labels if labels.is_dir() else labels.parent)
    number = -1
    for number, entry in enumerate(dataset.read(Request(labels, folder, task, tuple(subsets), tuple(exclude)))):
        yield replace(entry, task=task, number=number, source=name, place=f"{name} {number}")
    if number < 0:
        part = f" in {', '.join(subsets)}" if subsets else " for training" if dataset.subsets else ""
        hint = " --subset names another part." if dataset.subsets else ""
        raise ValueError(
            f"{labels} holds nothing of {name}{part}, but its labels are read from it; is it the right place?{hint}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill manifest` takes."""
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument(
        "labels", type=to_path, help="LibriSpeech, MusicNet, WavCaps: a folder; the others: their JSON or CSV"
    )
    parser.add_argument("out", type=to_path, help="manifest to write: .json (SALMONN's) or .jsonl")
    parser.add_argument("--audio", type=to_path, help="folder of the recordings (that of the labels)")
    parser.add_argument(
        "--task", help="another than the data set's own: audiocaption_v2, LibriSpeech's gender_recognition"
    )
    parser.add_argument(
        "--subset",
        action="append",
        default=[],
        help="GigaSpeech: M, DEV …; LibriSpeech: dev-clean …; default: for training",
    )
    parser.add_argument(
        "--exclude", action="append", type=to_path, default=[], help="WavCaps: blacklist files (the tests' one)"
    )


def main(args: argparse.Namespace) -> int:
    """Run `distill manifest`."""
    num_missing, named = 0, {}

    def entries() -> Iterator[Entry]:
        nonlocal num_missing
        asked = {"task": args.task, "subsets": args.subset, "exclude": args.exclude}
        for entry in read_dataset(args.dataset, args.labels, args.audio, **asked):
            if not entry.path.exists():
                num_missing += 1
                if len(named) < NUM_NAMED:
                    named[str(entry.path)] = None
            yield entry

    count = write_manifest(args.out, entries())
    print(f"{args.out}: {count} rows, {num_missing} of them without their recording")
    if named:
        print(f"missing, the first of them: {', '.join(named)}", file=sys.stderr)
    return 0
