"""One process's part of a job that goes over the training shards and keeps a record of every sample, see `cache.py`.

Knows no teacher: what makes the records is given.
"""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from distill.caching.batches import open_shard
from distill.caching.capture import captured_mass, feature_dtypes
from distill.config import Config
from distill.training.monitoring.progress import Progress
from shards.files.lock import read_holder
from shards.sample import Sample
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from shards.targets.record import TargetRecord
from shards.targets.store import TargetShard, TargetWriter, read_done

Capture = Callable[[Sequence[Sample]], dict[str, TargetRecord]]  # makes the records of a batch, by key
POLL_SECONDS = 1.0  # between looks at whether other ranks have finished the last shards
FIGURES = ("samples", "tokens", "payload_bytes", "captured_mass", "own_answers", "cross_entropy", "entropy")


class Job:
    """One process's part of a caching job: whatever shards it can get.

    Args:
        config: the configuration of the run.
        capture: makes the records of a batch.
        writer: writes into the cache.
        missing: the shards to do, by this process or another.
        accelerator: whose main process shows the progress of all.
        share: the share of each shard's samples that are captured, at least one; which ones, seed and round decide.
    """

    def __init__(self, config: Config, capture: Capture, writer: TargetWriter, missing: Sequence[str], accelerator,
                 share: float = 1.0):  # fmt: skip
        self.config, self.capture, self.writer, self.missing = config, capture, writer, list(missing)
        self.share = share
        sizes = np.bincount(ShardStream(self.missing, Order(batch_size=1, shuffle=False, epochs=1)).catalog.shards)
        total = sum(math.ceil(share * size) for size in sizes.tolist())
        self.progress = Progress(writer.folder.name, total, accelerator=accelerator, unit="samples")
        self.began, self.finished = time.monotonic(), dict.fromkeys(FIGURES, 0)
        self.counted: set[str] = set()

    def run(self, first: int = 0) -> None:
        """Do shards, from the `first` on, until all are done; the others' last ones are waited for, or taken over."""
        left = self.missing[first:] + self.missing[:first]
        with self.progress:
            while left:
                num_done = len(self.counted)
                for shard in left:
                    with self.writer.claim(shard, self._expect_bytes()) as target:
                        if target is not None:
                            self._write(target, shard)
                    self._count_finished()
                left = [shard for shard in left if not self.writer.is_done(shard)]
                if left and len(self.counted) == num_done:
                    self.progress.advance(f"waits for {read_holder(self.writer.lock_path(left[0]))}", units=0)
                    time.sleep(POLL_SECONDS)

    def _write(self, target: TargetShard, shard: str) -> None:
        """Run the teacher over one audio shard, longest clips first, and write the records as they come."""
        stream = open_shard(self.config, shard, self.share)
        target.figures |= dict.fromkeys(FIGURES, 0)
        for samples in stream:
            for key, record in self.capture(samples).items():
                target.add(key, record.pack(feature_dtypes(self.config.cache, record)))
                tally_(target.figures, record)
            self._show(target)
        if target.rows < stream.num_samples:
            raise ValueError(
                f"{shard} holds {stream.num_samples - target.rows} samples that cannot be read (the messages above "
                f"name them), but every sample needs targets; find them with `distill pack --verify` and pack again."
            )

    def _show(self, target: TargetShard) -> None:
        """Bring the line up to date: what all processes have finished, and this one's part of a shard."""
        figures = {name: self.finished[name] + target.figures[name] for name in FIGURES}
        rate = figures["tokens"] / (time.monotonic() - self.began)
        size = sum(read_done(self.writer.folder, s)["bytes"] for s in self.counted) + target.tar.size
        note = f"{rate:,.0f} tokens/s, {size / 1e6:,.1f} MB, {target.name}"
        self.progress.advance(note, units=figures["samples"] - self.progress.done)

    def _count_finished(self) -> None:
        for shard in set(self.missing) - self.counted:
            done = read_done(self.writer.folder, shard)
            if done is not None and self.writer.is_done(shard):
                self.counted.add(shard)
                self.finished = {name: self.finished[name] + done["figures"][name] for name in FIGURES}

    def _expect_bytes(self) -> int:
        """What a shard took on average; 0 before the first."""
        sizes = [read_done(self.writer.folder, shard)["bytes"] for shard in self.counted]
        return sum(sizes) // max(1, len(sizes))


def tally_(figures: dict[str, float], record: TargetRecord) -> None:
    """Add a record to its shard's totals: tokens, bytes, the mass kept, own answers, the teacher's doubt in nats."""
    figures["samples"] += 1
    for part in (record, record.other):
        if part is not None:
            figures["tokens"] += len(part.answer_ids_S)
            figures["payload_bytes"] += len(part.payload)
            figures["captured_mass"] += captured_mass(part.payload)
            figures["own_answers"] += part.answer_source == "teacher"
            figures["cross_entropy"] -= float(part.label_logprobs_S.sum(dtype="f8"))
            figures["entropy"] += float(part.entropy_S.sum(dtype="f8"))
