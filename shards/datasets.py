"""Data sets as they are published, read into entries of a manifest. Opens tables and transcripts, and no audio.

One function a data set, all called with its labels and its audio; `distill manifest` writes what they yield. An entry
whose recording is not there is yielded too, so that `distill audit` counts it (AudioCaps loses some every month).
"""

import argparse
import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from shards.manifest import Entry, missing_file_error, write_manifest
from shards.records import read_array
from shards.sample import MAX_SECONDS

AUDIO_SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3")
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
GIGASPEECH_TAG = re.compile(r"\s*<[A-Z]+>")  # <COMMA>, <SIL>, ...
MIN_SECONDS = 1.0  # of the last piece of a MusicNet recording


def read_dataset(name: str, labels: Path, audio: Path | None = None) -> Iterator[Entry]:
    """Entries of a published data set.

    Args:
        name: one of `READERS`.
        labels: LibriSpeech: the folder; MusicNet: the folder of CSV files; the others: their JSON or CSV file.
        audio: the folder of the recordings; by default that of the labels.

    Raises:
        FileNotFoundError: there are no labels.
        ValueError: the labels are not those of this data set.
    """
    if not labels.exists():
        raise missing_file_error(labels)
    entries = READERS[name](labels, audio or (labels if labels.is_dir() else labels.parent))
    number = -1
    for number, entry in enumerate(entries):
        yield replace(entry, number=number, source=name, place=f"{name} {number}")
    if number < 0:
        raise ValueError(f"{labels} holds nothing of {name}, but its labels are read from it; is it the right place?")


def read_librispeech(labels: Path, audio: Path) -> Iterator[Entry]:
    """`SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt`, text in lower case."""
    for transcript in sorted(labels.rglob("*.trans.txt")):
        folder = audio / transcript.parent.relative_to(labels)
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield Entry(folder / f"{name}.flac", text.lower(), "asr", speaker=name.partition("-")[0])


def read_gigaspeech(labels: Path, audio: Path) -> Iterator[Entry]:
    """`GigaSpeech.json`: parts of long recordings; punctuation tags removed, parts that are noise only left out."""
    for _, place, recording in read_array(labels, "audios"):
        for segment in _field(recording, "segments", labels, place):
            text = GIGASPEECH_TAG.sub("", _field(segment, "text_tn", labels, place)).strip().lower()
            if text:
                yield Entry(
                    audio / _field(recording, "path", labels, place),
                    text,
                    "asr",
                    # most speakers are N/A: then the recording is what must stay on one side of a split
                    speaker=_named(segment.get("speaker")) or _field(recording, "aid", labels, place),
                    start=float(_field(segment, "begin_time", labels, place)),
                    end=float(_field(segment, "end_time", labels, place)),
                )


def read_clotho(labels: Path, audio: Path) -> Iterator[Entry]:
    """`clotho_captions_*.csv`: `file_name` and `caption_1` to `caption_5`, an entry a caption."""
    for place, row in _read_csv(labels):
        path = audio / _field(row, "file_name", labels, place)
        for number in range(1, 6):
            yield Entry(path, _field(row, f"caption_{number}", labels, place), "audiocaption")


def read_audiocaps(labels: Path, audio: Path) -> Iterator[Entry]:
    """`train.csv`: `audiocap_id`, `youtube_id`, `start_time`, `caption`; files named as the common downloaders do."""
    for place, row in _read_csv(labels):
        clip, start = _field(row, "youtube_id", labels, place), _field(row, "start_time", labels, place)
        stems = (
            clip,
            f"{clip}_{start}",
            f"{clip}_{int(start) * 1000}",
            f"Y{clip}",
            _field(row, "audiocap_id", labels, place),
        )
        yield Entry(_find_audio(audio, stems), _field(row, "caption", labels, place), "audiocaption")


def read_wavcaps(labels: Path, audio: Path) -> Iterator[Entry]:
    """`as_final.json`, `fsd_final.json` and so on: an array `data` of `id` and `caption`."""
    for _, place, row in read_array(labels, "data"):
        stem = str(_field(row, "id", labels, place)).removesuffix(".wav")
        yield Entry(_find_audio(audio, (stem,)), _field(row, "caption", labels, place), "audiocaption")


def read_musicnet(labels: Path, audio: Path) -> Iterator[Entry]:
    """`train_labels/*.csv`: the notes of a recording become a question about each 30 s: which instruments play?"""
    for table in sorted(labels.glob("*.csv")):
        notes = [_read_note(row, table, place) for place, row in _read_csv(table)]
        length = max((end for _, end, _ in notes), default=0.0)
        path = _find_audio(audio, (table.stem,))
        start = 0.0
        while length - start >= MIN_SECONDS:
            end = min(start + MAX_SECONDS, length)
            playing = {program for first, last, program in notes if first < end and last > start}
            if playing:
                names = ", ".join(MUSICNET_INSTRUMENTS[program] for program in sorted(playing))
                yield Entry(path, names, "QA", MUSICNET_QUESTION, speaker=table.stem, start=start, end=end)
            start += MAX_SECONDS


READERS: dict[str, Callable[[Path, Path], Iterator[Entry]]] = {
    "librispeech": read_librispeech,
    "gigaspeech": read_gigaspeech,
    "clotho": read_clotho,
    "audiocaps": read_audiocaps,
    "wavcaps": read_wavcaps,
    "musicnet": read_musicnet,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill manifest` takes."""
    parser.add_argument("dataset", choices=READERS)
    parser.add_argument("labels", type=Path, help="LibriSpeech, MusicNet: a folder; the others: their JSON or CSV")
    parser.add_argument("out", type=Path, help="manifest to write: .json (SALMONN's) or .jsonl")
    parser.add_argument("--audio", type=Path, help="folder of the recordings (that of the labels)")
    parser.add_argument("--task", help="instead of the data set's own, such as audiocaption_v2")


def main(args: argparse.Namespace) -> int:
    """Run `distill manifest`."""
    missing = 0

    def entries() -> Iterator[Entry]:
        nonlocal missing
        for entry in read_dataset(args.dataset, args.labels, args.audio):
            missing += not entry.path.exists()
            yield entry if args.task is None else replace(entry, task=args.task)

    count = write_manifest(args.out, entries())
    print(f"{args.out}: {count} rows, {missing} of them without their recording")
    return 0


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield f"line {number}", row


def _read_note(row: dict, table: Path, place: str) -> tuple[float, float, int]:
    """Start and end in seconds, and the MIDI program."""
    start, end, program = (_field(row, name, table, place) for name in ("start_time", "end_time", "instrument"))
    if int(program) not in MUSICNET_INSTRUMENTS:
        raise ValueError(f"{table}: {place} has instrument {program}, but MusicNet's are {list(MUSICNET_INSTRUMENTS)}.")
    return int(start) / MUSICNET_RATE, int(end) / MUSICNET_RATE, int(program)


def _find_audio(folder: Path, stems: Iterable[str]) -> Path:
    """The first file that is there with one of these stems; else the first name it could have."""
    names = [folder / f"{stem}{suffix}" for stem in stems for suffix in AUDIO_SUFFIXES]
    return next((path for path in names if path.exists()), names[0])


def _field(row: object, name: str, path: Path, place: str):
    """A field that must be there."""
    if not isinstance(row, dict) or row.get(name) is None:
        raise ValueError(f"{path}: {place}.{name} is missing, but is read from every row; is it the right file?")
    return row[name]


def _named(speaker: str | None) -> str | None:
    return None if speaker in (None, "", "N/A") else speaker
