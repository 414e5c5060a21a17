"""The samples of one shard as a caching job reads them, and as whoever checks its targets reads them again."""

import math
from dataclasses import replace

from distill.config import Config
from shards.audio.augment import sample_seed
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream


def open_shard(config: Config, shard: str, share: float = 1.0) -> ShardStream:
    """The samples of one shard as the job reads them: in batches of like length, the same in every run."""
    order = Order(config.cache.batch_size, shuffle=False, epochs=1, bucket_batches=10**6)
    selection, limits = Selection(labelled_share=config.data.labelled_share), Limits(workers=config.data.workers)
    stream = ShardStream(shard, order, selection, limits)
    if share == 1:
        return stream
    keys = [stream.catalog.key(row) for row in range(len(stream.catalog))]
    left_out = sorted(keys, key=lambda key: sample_seed(config.seed, config.on_policy.round, key))
    left_out = left_out[math.ceil(share * len(keys)) :]
    return ShardStream(shard, order, replace(selection, sample_weights=dict.fromkeys(left_out, 0.0)), limits)
