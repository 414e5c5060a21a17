"""The clips that an export is compared with its student on."""

from pathlib import Path

from distill.config import SPLITS, Config
from shards.sample import Sample
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream

CLIPS = 8  # that both answer


def read_clips(config: Config) -> list[Sample]:
    """The first clips of the run's test split, or of another one.

    Raises:
        FileNotFoundError: it has no shards on this machine any more.
    """
    for split in reversed(SPLITS):
        place = config.shards(split)
        if Path(place).exists():
            stream = ShardStream(place, Order(batch_size=1, shuffle=False, epochs=1))
            clips = [sample for samples in stream for sample in samples]
            step = max(1, len(clips) // CLIPS)  # tasks lie side by side
            return clips[::step][:CLIPS]
    raise FileNotFoundError(
        f"data.folder is {config.data.folder}, but it holds no shards, and an export is compared with its student on "
        f"the run's clips; put them back, or give the folder's new place in {config.run_folder}/config.yaml."
    )
