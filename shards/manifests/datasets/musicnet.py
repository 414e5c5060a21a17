"""MusicNet: recordings of classical music, with every note of every instrument."""

from collections.abc import Iterator
from pathlib import Path

from shards.manifests.datasets.dataset import Dataset, Request, field_of, find_audio, read_csv
from shards.manifests.manifest import Entry
from shards.sample import MAX_SECONDS

MUSICNET_RATE = 44_100  # Hz; its labels count samples
MUSICNET_QUESTION = "Which instruments are playing in the music?"
# General MIDI programs, from 1, as far as MusicNet has them (Thickstun et al. 2017).
MUSICNET_INSTRUMENTS = {
    1: "piano",
    7: "harpsichord",
    41: "violin",
    42: "viola",
    43: "cello",
    44: "double bass",
    61: "horn",
    69: "oboe",
    71: "bassoon",
    72: "clarinet",
    74: "flute",
}
MIN_SECONDS = 1.0  # of the last piece of a MusicNet recording


def read_musicnet(asked: Request) -> Iterator[Entry]:
    """`train_labels/*.csv`: the notes of a recording become a question about each 30 s: which instruments play?

    Args:
        asked: its labels are a folder of tables, or the folder of `train_labels` and `test_labels`; of these the first
            is for training.
    """
    labels, audio = asked.labels, asked.audio
    if (labels / "train_labels").is_dir() or asked.subsets:
        for part in asked.subsets or ("train",):
            data = audio / f"{part}_data"
            yield from _read_notes(labels / f"{part}_labels", data if data.is_dir() else audio)
        return
    yield from _read_notes(labels, audio)


def _read_notes(labels: Path, audio: Path) -> Iterator[Entry]:
    for table in sorted(labels.glob("*.csv")):
        notes = [_read_note(row, table, place) for place, row in read_csv(table)]
        length = max((end for _, end, _ in notes), default=0.0)
        path = find_audio((audio,), (table.stem,))
        start = 0.0
        while length - start >= MIN_SECONDS:
            end = min(start + MAX_SECONDS, length)
            playing = {program for first, last, program in notes if first < end and last > start}
            if playing:
                names = ", ".join(MUSICNET_INSTRUMENTS[program] for program in sorted(playing))
                yield Entry(path, names, "QA", MUSICNET_QUESTION, speaker=table.stem, start=start, end=end)
            start += MAX_SECONDS


def _read_note(row: dict, table: Path, place: str) -> tuple[float, float, int]:
    """Start and end in seconds, and the MIDI program."""
    start, end, program = (field_of(row, name, table, place) for name in ("start_time", "end_time", "instrument"))
    if int(program) not in MUSICNET_INSTRUMENTS:
        raise ValueError(f"{table}: {place} has instrument {program}, but MusicNet's are {list(MUSICNET_INSTRUMENTS)}.")
    return int(start) / MUSICNET_RATE, int(end) / MUSICNET_RATE, int(program)


MUSICNET = Dataset(read_musicnet, ("QA",), "train|test")
