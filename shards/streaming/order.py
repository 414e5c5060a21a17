"""Which sample comes when: a pure function of the index, the options, and the epoch. Reads nothing.

The order comes from a mixing function of its own (splitmix64), not from a library's generator, so that a resumed run
on another version of numpy still repeats it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Order:
    """What decides the global batches; ranks and workers have no part in it."""

    batch_size: int  # samples of a global batch; with batch_seconds, the most it may have
    seed: int = 0
    shuffle: bool = True  # False: in the order of the shards
    epochs: int | None = None  # passes over the data; None: without end
    batch_seconds: float | None = None  # most seconds of audio in a global batch, padding included
    bucket_batches: int = 0  # samples of so many batches are sorted by length before they are cut up; 0: none
    window_shards: int = 16  # samples are shuffled within so many shards, which are read at the same time
    task_weights: Mapping[str, float] = field(default_factory=dict)  # task -> times an epoch each sample comes; else 1

    def __post_init__(self):
        positive = {"batch_size": self.batch_size, "window_shards": self.window_shards}
        positive |= {"epochs": self.epochs, "batch_seconds": self.batch_seconds}
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, but it must be above 0; set it so.")
        if self.bucket_batches < 0:
            raise ValueError(f"bucket_batches is {self.bucket_batches}, but it must be 0 (none) or more; set it so.")
        for task, weight in self.task_weights.items():
            if not 0 <= weight <= 1000:
                raise ValueError(
                    f"task_weights.{task} is {weight}, but it must be 0 to 1000 times an epoch; set it so."
                )

    @property
    def options(self) -> dict:
        """Every option, as plain data: equal ones give equal batches over equal data."""
        options = dataclasses.asdict(self)
        return options | {"weights": dict(sorted(options.pop("task_weights").items()))}  # as checkpoints name them


class Position(NamedTuple):
    """Where a stream stands: so many samples of so many whole epochs were given out, over all ranks."""

    epoch: int = 0
    offset: int = 0  # samples into the epoch


class Plan:
    """The global batches of a data set.

    Args:
        order: the options.
        shards: shard number of each sample, ascending.
        seconds: length of each sample.
        groups: samples of each task that takes part, and how many times an epoch each of them comes.
    """

    def __init__(
        self, order: Order, shards: np.ndarray, seconds: np.ndarray, groups: Sequence[tuple[np.ndarray, float]]
    ):
        self.order = order
        self._shards, self._seconds, self._groups = shards, seconds, groups
        self.num_samples = sum(_share(weight, len(group)) for group, weight in groups)
        if self.num_samples == 0:
            raise ValueError("the stream has 0 samples, but it needs 1; look at shards, tasks and weights.")
        longest = max(float(seconds[group].max(initial=0)) for group, _ in groups)
        if order.batch_seconds is not None and longest > order.batch_seconds:
            raise ValueError(
                f"batch_seconds is {order.batch_seconds:g}, but the longest clip has {longest:.1f} s; raise it."
            )
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def rows(self) -> np.ndarray:
        """Samples that take part: those of the tasks that come at least once an epoch."""
        return np.concatenate([group for group, weight in self._groups if _share(weight, len(group))])

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of the first epoch; the last of them may reach into the next."""
        if self.order.batch_seconds is None:
            return -(-self.num_samples // self.order.batch_size)
        return len(self._epoch(0)[1])

    def batches(self, position: Position) -> Iterator[tuple[np.ndarray, Position]]:
        """Global batches from `position` on: rows of (epoch, sample), and the position after each."""
        while self.order.epochs is None or position.epoch < self.order.epochs:
            batch, position = self._next_batch(position)
            yield batch, position

    def _next_batch(self, position: Position) -> tuple[np.ndarray, Position]:
        pieces, (epoch, offset) = [], position
        missing = self.order.batch_size
        if self.order.batch_seconds is not None:
            ends = self._epoch(epoch)[1]
            missing = int(ends[np.searchsorted(ends, offset, side="right")]) - offset
        while missing and (self.order.epochs is None or epoch < self.order.epochs):
            ids = self._epoch(epoch)[0]
            piece = ids[offset : offset + missing]
            pieces.append(np.stack([np.full(len(piece), epoch), piece], axis=1))
            missing -= len(piece)
            offset += len(piece)
            if offset == len(ids):
                epoch, offset = epoch + 1, 0
        return np.concatenate(pieces), Position(epoch, offset)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of an epoch in order, and where its batches end."""
        ids = self._draw(epoch)
        order, size = self.order, self.order.batch_size
        # By count, the first samples of an epoch complete the last batch of the one before.
        head = (-epoch * self.num_samples) % size if order.batch_seconds is None else 0
        pools = self._pools(np.arange(len(ids)), head)
        if order.bucket_batches:
            ids = ids[np.lexsort((-self._seconds[ids], pools))]
        if order.batch_seconds is None:
            ends = np.append(np.arange(head or size, len(ids), size), len(ids))
        else:
            ends = _cut_by_seconds(self._seconds[ids], pools, order.batch_seconds, size)
        if order.bucket_batches and order.shuffle:
            ids, ends = self._shuffle_batches(ids, ends, epoch, head)
        return ids, ends

    def _draw(self, epoch: int) -> np.ndarray:
        """Samples of an epoch, repeated by weight, shuffled within windows of shuffled shards."""
        # A share of a group walks round it in a fixed order, so that every sample comes equally often over the epochs.
        ids = np.concatenate([self._share_of(group, weight, epoch) for group, weight in self._groups])
        ids.sort()
        if not self.order.shuffle:
            return ids
        seed, num_shards = self.order.seed, int(self._shards[-1]) + 1
        place = np.empty(num_shards, np.int64)
        place[np.argsort(mix(np.arange(num_shards), seed, epoch, 1))] = np.arange(num_shards)
        windows = place[self._shards[ids]] // self.order.window_shards
        return ids[np.lexsort((mix(np.arange(len(ids)), seed, epoch, 2), windows))]

    def _share_of(self, group: np.ndarray, weight: float, epoch: int) -> np.ndarray:
        if weight == 1:
            return group
        walk = group[np.argsort(mix(group, self.order.seed, 0, 3))]
        count = _share(weight, len(group))
        return walk[(np.arange(count) + epoch * count) % len(group)]

    def _pools(self, places: np.ndarray, head: int) -> np.ndarray:
        """Pool number of each place of an epoch; -1 for the head."""
        return np.maximum(places - head, -1) // (max(1, self.order.bucket_batches) * self.order.batch_size)

    def _shuffle_batches(self, ids: np.ndarray, ends: np.ndarray, epoch: int, head: int):
        """Shuffle whole batches within a pool; the head stays first, a short last batch last."""
        starts = np.append(0, ends[:-1])
        pools = self._pools(starts, head)
        ranks = mix(np.arange(len(ends)), self.order.seed, epoch, 4)
        if self.order.batch_seconds is None and ends[-1] - starts[-1] < self.order.batch_size:
            pools[-1] = pools[-1] + 1
        turn = np.lexsort((ranks, pools))
        sizes = (ends - starts)[turn]
        rows = np.repeat(starts[turn] - np.append(0, np.cumsum(sizes)[:-1]), sizes) + np.arange(len(ids))
        return ids[rows], np.cumsum(sizes)


def mix(values: np.ndarray, *salts: int) -> np.ndarray:
    """uint64 hash of each value: splitmix64 (Steele, Lea, Flood 2014) over the value and the salts."""
    hashed = values.astype(np.uint64)
    for salt in salts:
        hashed = hashed + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
        hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashed = hashed ^ (hashed >> np.uint64(31))
    return hashed


def _share(weight: float, count: int) -> int:
    return round(weight * count)


def _cut_by_seconds(seconds: np.ndarray, pools: np.ndarray, most: float, most_samples: int) -> np.ndarray:
    """Where batches end so that each lies in one pool and, padded to its longest clip, holds at most `most` seconds."""
    ends, longest, count, last_pool = [], 0.0, 0, 0
    for row, (length, pool) in enumerate(zip(seconds.tolist(), pools.tolist())):
        longest, count = max(longest, length), count + 1
        if count > 1 and (longest * count > most or count > most_samples or pool != last_pool):
            ends.append(row)
            longest, count = length, 1
        last_pool = pool
    return np.array([*ends, len(seconds)], np.int64)
