"""What a published data set is to us, what is asked of it, and how its tables are read. Knows none of them."""

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.audio.limits import AUDIO_SUFFIXES
from shards.manifests.manifest import Entry

CAPTIONS = ("audiocaption", "audiocaption_v2")  # the tasks of captions


@dataclass(frozen=True)
class Request:
    """What is asked of a data set."""

    labels: Path
    audio: Path  # folder of the recordings
    task: str
    subsets: tuple[str, ...] = ()  # as it names them; none: all that is for training
    exclude: tuple[Path, ...] = ()  # files that list what to leave out


@dataclass(frozen=True)
class Dataset:
    """What a published data set can give."""

    read: Callable[[Request], Iterator[Entry]]
    tasks: tuple[str, ...]  # the first is its own
    subsets: str = ""  # pattern of their names; empty: it has none, or one a file
    excludes: bool = False
    hint: str = ""  # on a task that it lacks


def read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """Each row of a table with a header, and its place for messages."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield f"line {number}", row


def find_audio(folders: Iterable[Path], stems: Iterable[str]) -> Path:
    """The first file that is there with one of these stems; else the first name it could have."""
    names = [folder / f"{stem}{suffix}" for folder in folders for stem in stems for suffix in AUDIO_SUFFIXES]
    return next((path for path in names if path.exists()), names[0])


def field_of(row: object, name: str, path: Path, place: str):
    """A field that must be there."""
    if not isinstance(row, dict) or row.get(name) is None:
        raise ValueError(f"{path}: {place}.{name} is missing, but is read from every row; is it the right file?")
    return row[name]
