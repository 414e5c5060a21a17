"""Clotho: sounds of FreeSound, each with five captions."""

from collections.abc import Iterator

from shards.manifests.datasets.dataset import CAPTIONS, Dataset, Request, field_of, read_csv
from shards.manifests.manifest import Entry


def read_clotho(asked: Request) -> Iterator[Entry]:
    """`clotho_captions_SPLIT.csv`: `file_name` and `caption_1` to `caption_5`, an entry a caption.

    The recordings lie in the folder given, or in its folder SPLIT, as they are published.
    """
    split = asked.labels.stem.removeprefix("clotho_captions_")
    for place, row in read_csv(asked.labels):
        name = field_of(row, "file_name", asked.labels, place)
        path = next((p for p in (asked.audio / name, asked.audio / split / name) if p.exists()), asked.audio / name)
        for number in range(1, 6):
            yield Entry(path, field_of(row, f"caption_{number}", asked.labels, place), "audiocaption")


CLOTHO = Dataset(read_clotho, CAPTIONS)
