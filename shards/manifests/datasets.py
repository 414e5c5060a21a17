"""Data sets as they are published, read into entries of a manifest. Opens tables and transcripts, and no audio.

One function a data set; `distill manifest` writes what they yield. What is published for validation and test stays out
unless it is asked for. An entry whose recording is not there is yielded too, so that `distill audit` counts it
(AudioCaps loses some every month).
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shards.manifests.manifest import Entry, missing_file_error, to_path, write_manifest
from shards.manifests.records import read_array
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
WAVCAPS_ORIGINS = {"as": "AudioSet", "fsd": "FreeSound"}  # by the beginning of the file's name
WAVCAPS_TESTS = "blacklist_exclude_test_ac.json"  # clips of the tests of AudioCaps and Clotho
NUM_NAMED = 5  # recordings that are missing
MIN_SECONDS = 1.0  # of the last piece of a MusicNet recording


@dataclass(frozen=True)
class Request:
    """What is asked of a data set."""

    labels: Path
    audio: Path  # folder of the recordings
    task: str
    subsets: tuple[str, ...] = ()  # as it names them; none: all that is for training
    exclude: tuple[Path, ...] = ()  # files that list what to leave out


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
        part = f" in {', '.join(subsets)}" if subsets else ""
        raise ValueError(
            f"{labels} holds nothing of {name}{part}, but its labels are read from it; is it the right place?"
        )


def read_librispeech(asked: Request) -> Iterator[Entry]:
    """`SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt`, text in lower case, or `SPEAKERS.TXT`'s gender.

    `dev-*` and `test-*` are left out unless asked for, or unless the folder given is one of them.
    """
    genders = _read_genders(asked.labels) if asked.task == "gender_recognition" else None
    for transcript in sorted(asked.labels.rglob("*.trans.txt")):
        below = transcript.parent.relative_to(asked.labels)
        if not _is_asked([asked.labels.name, *below.parts], below.parts, asked.subsets):
            continue
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            speaker = name.partition("-")[0]
            if genders is not None and speaker not in genders:
                raise ValueError(
                    f"{transcript}: speaker {speaker} is not in SPEAKERS.TXT, but the gender is read there."
                )
            answer = text.lower() if genders is None else genders[speaker]
            yield Entry(asked.audio / below / f"{name}.flac", answer, "asr", speaker=speaker)


def _is_asked(parts: Collection[str], below: Collection[str], subsets: Collection[str]) -> bool:
    """Whether a transcript's folders are of a subset that is wanted; `below`: without the folder that was given."""
    if subsets:
        return not set(subsets).isdisjoint(parts)
    return not any(part.startswith(("dev-", "test-")) for part in below)


def _read_genders(folder: Path) -> dict[str, str]:
    """Speaker to Male or Female, from the SPEAKERS.TXT of a LibriSpeech: in the folder, or one or two above it."""
    places = [parent / "SPEAKERS.TXT" for parent in (folder, *folder.resolve().parents[:2])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise missing_file_error(places[0])
    genders = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith(";"):
            continue
        speaker, gender, *_ = [*(field.strip() for field in line.split("|")), ""]
        if gender not in ("F", "M"):
            raise ValueError(f"{path}: line {number} has sex {gender!r}, but it is F or M; is it the right file?")
        genders[speaker] = "Female" if gender == "F" else "Male"
    return genders


def read_gigaspeech(asked: Request) -> Iterator[Entry]:
    """`GigaSpeech.json`: parts of long recordings; punctuation tags removed, parts that are noise only left out.

    Each part lists its subsets, `{M}` among `{L}` and `{XL}`. DEV and TEST are left out unless asked for.
    """
    labels = asked.labels
    wanted = {f"{{{subset}}}" for subset in asked.subsets}
    for _, place, recording in read_array(labels, "audios"):
        for segment in _field(recording, "segments", labels, place):
            subsets = set(segment["subsets"] if "subsets" in segment else _field(recording, "subsets", labels, place))
            if subsets.isdisjoint(wanted) if wanted else subsets & {"{DEV}", "{TEST}"}:
                continue
            text = GIGASPEECH_TAG.sub("", _field(segment, "text_tn", labels, place)).strip().lower()
            if text:
                yield Entry(
                    asked.audio / _field(recording, "path", labels, place),
                    text,
                    "asr",
                    # most speakers are N/A: then the recording is what must stay on one side of a split
                    speaker=_named(segment.get("speaker")) or _field(recording, "aid", labels, place),
                    start=float(_field(segment, "begin_time", labels, place)),
                    end=float(_field(segment, "end_time", labels, place)),
                )


def read_clotho(asked: Request) -> Iterator[Entry]:
    """`clotho_captions_SPLIT.csv`: `file_name` and `caption_1` to `caption_5`, an entry a caption.

    The recordings lie in the folder given, or in its folder SPLIT, as they are published.
    """
    split = asked.labels.stem.removeprefix("clotho_captions_")
    for place, row in _read_csv(asked.labels):
        name = _field(row, "file_name", asked.labels, place)
        path = next((p for p in (asked.audio / name, asked.audio / split / name) if p.exists()), asked.audio / name)
        for number in range(1, 6):
            yield Entry(path, _field(row, f"caption_{number}", asked.labels, place), "audiocaption")


def read_audiocaps(asked: Request) -> Iterator[Entry]:
    """`train.csv`: `audiocap_id`, `youtube_id`, `start_time`, `caption`; files named as the common downloaders do.

    `val.csv` and `test.csv` have five rows a clip.
    """
    labels = asked.labels
    for place, row in _read_csv(labels):
        clip, start = _field(row, "youtube_id", labels, place), _field(row, "start_time", labels, place)
        stems = (
            clip,
            f"{clip}_{start}",
            f"{clip}_{int(start) * 1000}",
            f"Y{clip}",
            _field(row, "audiocap_id", labels, place),
        )
        yield Entry(_find_audio((asked.audio,), stems), _field(row, "caption", labels, place), "audiocaption")


def read_wavcaps(asked: Request) -> Iterator[Entry]:
    """`as_final.json`, `fsd_final.json` and so on, or all in a folder: an array `data` of `id` and `caption`.

    Its clips of AudioSet and FreeSound are in part those of AudioCaps and Clotho: the blacklists that it publishes name
    them, `{"AudioSet": [id, …], "FreeSound": [id, …]}`.
    """
    tables = [asked.labels] if asked.labels.is_file() else sorted(asked.labels.rglob("*_final.json"))
    blacklists = asked.exclude or tuple(_find_blacklist(asked.labels))
    excluded, num_left_out = _read_blacklists(blacklists), 0
    for table in tables:
        origin = WAVCAPS_ORIGINS.get(table.stem.partition("_")[0])
        folders = (asked.audio, asked.audio / table.parent.name, asked.audio / f"{table.parent.name}_flac")
        for _, place, row in read_array(table, "data"):
            stem = str(_field(row, "id", table, place)).removesuffix(".wav")
            if (origin, stem) in excluded:
                num_left_out += 1
                continue
            yield Entry(_find_audio(folders, (stem,)), _field(row, "caption", table, place), "audiocaption")
    names = ", ".join(path.name for path in blacklists)
    print(
        f"wavcaps: {num_left_out} rows left out by {names}"
        if blacklists
        else "wavcaps: nothing is left out, but it holds clips of AudioCaps' and Clotho's tests; give its blacklist by "
        "--exclude",
        file=sys.stderr,
    )


def _find_blacklist(labels: Path) -> Iterator[Path]:
    """WavCaps' list of test clips, where its folder lies beside or above the labels."""
    folders = (labels, *labels.resolve().parents[:2])
    places = (folder / "blacklist" / WAVCAPS_TESTS for folder in folders)
    yield from [place for place in places if place.is_file()][:1]


def _read_blacklists(paths: Iterable[Path]) -> set[tuple[str, str]]:
    """Origin and id of every clip that is named."""
    names: set[tuple[str, str]] = set()
    for path in paths:
        if not path.is_file():
            raise missing_file_error(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for origin in ("AudioSet", "FreeSound"):
                names |= {(origin, str(name).removesuffix(".wav")) for name in content[origin]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no blacklist of WavCaps ({error!r}), but it names ids by AudioSet and FreeSound; give "
                f"blacklist_exclude_*.json."
            ) from error
    return names


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
        notes = [_read_note(row, table, place) for place, row in _read_csv(table)]
        length = max((end for _, end, _ in notes), default=0.0)
        path = _find_audio((audio,), (table.stem,))
        start = 0.0
        while length - start >= MIN_SECONDS:
            end = min(start + MAX_SECONDS, length)
            playing = {program for first, last, program in notes if first < end and last > start}
            if playing:
                names = ", ".join(MUSICNET_INSTRUMENTS[program] for program in sorted(playing))
                yield Entry(path, names, "QA", MUSICNET_QUESTION, speaker=table.stem, start=start, end=end)
            start += MAX_SECONDS


@dataclass(frozen=True)
class Dataset:
    """What a published data set can give."""

    read: Callable[[Request], Iterator[Entry]]
    tasks: tuple[str, ...]  # the first is its own
    subsets: str = ""  # pattern of their names; empty: it has none, or one a file
    excludes: bool = False
    hint: str = ""  # on a task that it lacks


CAPTIONS = ("audiocaption", "audiocaption_v2")
DATASETS = {
    "librispeech": Dataset(
        read_librispeech,
        ("asr", "gender_recognition"),
        r"train-[\w-]+|dev-[\w-]+|test-[\w-]+",
        hint=" (it publishes no phones: align them with a tool of yours)",
    ),
    "gigaspeech": Dataset(read_gigaspeech, ("asr",), "XS|S|M|L|XL|DEV|TEST"),
    "clotho": Dataset(read_clotho, CAPTIONS),
    "audiocaps": Dataset(read_audiocaps, CAPTIONS),
    "wavcaps": Dataset(read_wavcaps, CAPTIONS, excludes=True),
    "musicnet": Dataset(read_musicnet, ("QA",), "train|test"),
}


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


def _find_audio(folders: Iterable[Path], stems: Iterable[str]) -> Path:
    """The first file that is there with one of these stems; else the first name it could have."""
    names = [folder / f"{stem}{suffix}" for folder in folders for stem in stems for suffix in AUDIO_SUFFIXES]
    return next((path for path in names if path.exists()), names[0])


def _field(row: object, name: str, path: Path, place: str):
    """A field that must be there."""
    if not isinstance(row, dict) or row.get(name) is None:
        raise ValueError(f"{path}: {place}.{name} is missing, but is read from every row; is it the right file?")
    return row[name]


def _named(speaker: str | None) -> str | None:
    return None if speaker in (None, "", "N/A") else speaker
