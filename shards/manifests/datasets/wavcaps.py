"""WavCaps: captions that a language model wrote, for sounds of several sites."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.manifests.datasets.dataset import CAPTIONS, Dataset, Request, field_of, find_audio
from shards.manifests.manifest import Entry, missing_file_error
from shards.manifests.records import read_array
from shards.status import print_status

WAVCAPS_ORIGINS = {"as": "AudioSet", "fsd": "FreeSound"}  # by the beginning of the file's name
WAVCAPS_TESTS = "blacklist_exclude_test_ac.json"  # clips of the tests of AudioCaps and Clotho


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
            stem = str(field_of(row, "id", table, place)).removesuffix(".wav")
            if (origin, stem) in excluded:
                num_left_out += 1
                continue
            yield Entry(find_audio(folders, (stem,)), field_of(row, "caption", table, place), "audiocaption")
    names = ", ".join(path.name for path in blacklists)
    print_status(
        f"wavcaps: {num_left_out} rows left out by {names}"
        if blacklists
        else "wavcaps: nothing is left out, but it holds clips of AudioCaps' and Clotho's tests; give its blacklist by "
        "--exclude"
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


WAVCAPS = Dataset(read_wavcaps, CAPTIONS, excludes=True)
