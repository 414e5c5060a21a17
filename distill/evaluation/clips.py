"""Which rows of a split are one clip: it is answered once, and scored against what all of them say.

Clotho and AudioCaps have five captions a clip, each a row of its own, which training learns one by one. Rows are of one
clip where their audio (the sha256 of its decoded samples), task and question agree, whatever manifest or shard they
stand in. Knows what is written beside the audio, and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.sample import MAX_SECONDS
from shards.streaming.catalog import open_catalog
from shards.streaming.order import Order
from shards.streaming.reader import Reader
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.tars.localcopy import ShardCache


@dataclass(frozen=True)
class Clips:
    """The clips of a split that have a text."""

    references: dict[str, tuple[str, ...]]  # key of the row that is asked -> the texts of all rows of its clip
    left_out: tuple[str, ...]  # keys of the other rows, and of those without a text

    def stream(self, shards: str | Path | Sequence[str | Path], batch_size: int, rank: int = 0,
               world_size: int = 1) -> ShardStream:  # fmt: skip
        """Every clip once, in the order of the split, `batch_size` a rank."""
        return ShardStream(
            shards,
            Order(batch_size=batch_size * world_size, shuffle=False, epochs=1),
            Selection(sample_weights=dict.fromkeys(self.left_out, 0.0)),
            rank=rank,
            world_size=world_size,
        )


def find_clips(shards: str | Path | Sequence[str | Path]) -> Clips:
    """Group the rows of a split; the first of each clip is the one to ask. Reads no audio.

    Args:
        shards: see `shards.tars.source.expand_shards`.

    Raises:
        ShardError: a shard is missing or changed.
        ValueError: no clip has a text, so there is nothing to compare with.
    """
    catalog = open_catalog(shards)
    reader = Reader(catalog, ShardCache(), None, 0, MAX_SECONDS)
    first: dict[tuple, str] = {}
    references: dict[str, tuple[str, ...]] = {}
    left_out = []
    for row in range(len(catalog)):
        fields = reader.read_fields(row)
        if fields is None:  # whoever streams the split counts it as bad
            continue
        key = catalog.key(row)
        if fields["text"] is None:
            left_out.append(key)
            continue
        asked = first.setdefault((fields["sha256"], fields["task"], fields["Q"]), key)
        references[asked] = (*references.get(asked, ()), fields["text"])
        if asked != key:
            left_out.append(key)
    reader.close()
    if not references:
        raise ValueError(f"{shards} has no clip with a text, but answers are compared with one; pack some that have.")
    return Clips(references, tuple(left_out))
