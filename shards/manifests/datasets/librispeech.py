"""LibriSpeech: read books, with transcripts and the speakers' gender."""

from collections.abc import Collection, Iterator
from pathlib import Path

from shards.manifests.datasets.dataset import Dataset, Request
from shards.manifests.manifest import Entry, missing_file_error


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


LIBRISPEECH = Dataset(
    read_librispeech,
    ("asr", "gender_recognition"),
    r"train-[\w-]+|dev-[\w-]+|test-[\w-]+",
    hint=" (it publishes no phones: align them with a tool of yours)",
)
