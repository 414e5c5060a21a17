"""GigaSpeech: parts of podcasts, videos and books, with transcripts."""

import re
from collections.abc import Iterator

from shards.manifests.datasets.dataset import Dataset, Request, field_of
from shards.manifests.manifest import Entry
from shards.manifests.records import read_array

GIGASPEECH_TAG = re.compile(r"\s*<[A-Z]+>")  # <COMMA>, <SIL>, ...


def read_gigaspeech(asked: Request) -> Iterator[Entry]:
    """`GigaSpeech.json`: parts of long recordings; punctuation tags removed, parts that are noise only left out.

    Each part lists its subsets, `{M}` among `{L}` and `{XL}`. DEV and TEST are left out unless asked for.
    """
    labels = asked.labels
    wanted = {f"{{{subset}}}" for subset in asked.subsets}
    for _, place, recording in read_array(labels, "audios"):
        for segment in field_of(recording, "segments", labels, place):
            subsets = set(segment["subsets"] if "subsets" in segment else field_of(recording, "subsets", labels, place))
            if subsets.isdisjoint(wanted) if wanted else subsets & {"{DEV}", "{TEST}"}:
                continue
            text = GIGASPEECH_TAG.sub("", field_of(segment, "text_tn", labels, place)).strip().lower()
            if text:
                yield Entry(
                    asked.audio / field_of(recording, "path", labels, place),
                    text,
                    "asr",
                    # most speakers are N/A: then the recording is what must stay on one side of a split
                    speaker=_named(segment.get("speaker")) or field_of(recording, "aid", labels, place),
                    start=float(field_of(segment, "begin_time", labels, place)),
                    end=float(field_of(segment, "end_time", labels, place)),
                )


def _named(speaker: str | None) -> str | None:
    return None if speaker in (None, "", "N/A") else speaker


GIGASPEECH = Dataset(read_gigaspeech, ("asr",), "XS|S|M|L|XL|DEV|TEST")
