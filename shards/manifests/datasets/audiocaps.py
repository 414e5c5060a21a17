"""AudioCaps: captioned clips of AudioSet, which everybody fetches from where they were published."""

from collections.abc import Iterator

from shards.manifests.datasets.dataset import CAPTIONS, Dataset, Request, field_of, find_audio, read_csv
from shards.manifests.manifest import Entry


def read_audiocaps(asked: Request) -> Iterator[Entry]:
    """`train.csv`: `audiocap_id`, `youtube_id`, `start_time`, `caption`; files named as the common downloaders do.

    `val.csv` and `test.csv` have five rows a clip.
    """
    labels = asked.labels
    for place, row in read_csv(labels):
        clip, start = field_of(row, "youtube_id", labels, place), field_of(row, "start_time", labels, place)
        stems = (
            clip,
            f"{clip}_{start}",
            f"{clip}_{int(start) * 1000}",
            f"Y{clip}",
            field_of(row, "audiocap_id", labels, place),
        )
        yield Entry(find_audio((asked.audio,), stems), field_of(row, "caption", labels, place), "audiocaption")


AUDIOCAPS = Dataset(read_audiocaps, CAPTIONS)
