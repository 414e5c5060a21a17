"""The caching job: the teacher's targets for every training sample, beside the shards, once.

Run with `accelerate launch -m distill.cache CONFIG [key=value …]`. Ranks claim shards one by one, so any number,
started and killed at any time, ends in the same files.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from distill.caching.batches import open_shard
from distill.caching.capture import Capturer, captured_mass, feature_dtypes
from distill.caching.identity import describe_teacher
from distill.command import run_stage
from distill.config import Config
from distill.teacher import load_to_keep
from distill.training.monitoring.progress import Progress
from distill.training.ranks import build_accelerator, say
from shards.files.lock import read_holder
from shards.sample import Sample
from shards.streaming.catalog import hash_shards
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from shards.targets.codecs.table import find_codec
from shards.targets.record import TargetRecord
from shards.targets.store import TargetShard, TargetWriter, read_done
from shards.tars.source import expand_shards
from teachers.files.cacheparts import save_parts

Capture = Callable[[Sequence[Sample]], dict[str, TargetRecord]]  # makes the records of a batch, by key
POLL_SECONDS = 1.0  # between looks at whether other ranks have finished the last shards
FIGURES = ("samples", "tokens", "payload_bytes", "captured_mass", "own_answers", "cross_entropy", "entropy")


def cache(config: Config) -> int:
    """Write the targets of every training shard that has none yet; returns the exit code."""
    accelerator, shards = build_accelerator(), expand_shards(config.shards("train"))
    teacher = load_to_keep(config, accelerator.device)
    writer = TargetWriter(config.cache_folder, describe_teacher(teacher.model, config), hash_shards(shards), FIGURES)
    save_parts(writer.folder, teacher.model, with_head=find_codec(config.cache.codec).needs_head)
    if accelerator.is_main_process:
        writer.publish()
    is_new = write_missing(config, Capturer(teacher, config), writer, shards, accelerator)
    if accelerator.is_main_process and is_new:
        writer.publish()  # again: http is told of the new files
        warn_if_answers_are_unlikely(writer.folder, shards, teacher.vocab.size)
    return 0


def write_missing(config: Config, capture: Capture, writer: TargetWriter, shards: Sequence[str], accelerator,
                  share: float = 1.0) -> bool:  # fmt: skip
    """Do the shards that are not done, with whatever processes there are, and print the totals; False: none was left.

    Args:
        capture, writer, accelerator, share: as `Job` takes them.
        shards: all that the cache is to have.
    """
    missing = [shard for shard in shards if not writer.is_done(shard)]
    if not missing:
        say(accelerator, f"cache: {writer.folder} holds the targets of all {len(shards)} shards, used again")
        return False
    began = time.monotonic()
    job = Job(config, capture, writer, missing, accelerator, share)
    job.run(first=accelerator.process_index * len(missing) // accelerator.num_processes)
    if accelerator.is_main_process:
        print(summarize(writer.folder, shards, missing, time.monotonic() - began))
    return True


class Job:
    """One process's part of a caching job: whatever shards it can get.

    Args:
        config: the configuration of the run.
        capture: makes the records of a batch.
        writer: the writer of the cache.
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


def summarize(folder: Path, shards: Sequence[str], written: Sequence[str], seconds: float) -> str:
    """The closing table of a caching job: the whole cache, and how fast the shards just written came."""
    done = {shard: read_done(folder, shard) for shard in shards}
    total = {name: sum(d["figures"][name] for d in done.values()) for name in FIGURES}
    size, tokens = sum(d["bytes"] for d in done.values()), max(1, total["tokens"])
    rate = sum(done[shard]["figures"]["tokens"] for shard in written) / max(seconds, 1e-9)
    rows = {
        "shards": f"{len(done):,} ({len(written):,} in this job)",
        "samples": f"{total['samples']:,} ({total['own_answers']:,} own answers of the teacher)",
        "tokens": f"{total['tokens']:,}",
        "bytes": f"{size:,} ({size / max(1, total['samples']):,.0f} a sample)",
        "bytes a token": f"{total['payload_bytes'] / tokens:.1f} ({size / tokens:,.1f} with all that is kept)",
        "captured mass": f"{total['captured_mass'] / tokens:.4f}",
        "teacher": f"cross-entropy {total['cross_entropy'] / tokens:.3f} of its answers, entropy "
        f"{total['entropy'] / tokens:.3f} nats a token",
        "hours": f"{seconds / 3600:.3f} (this job, {rate:,.0f} tokens/s)",
    }
    return "\n".join(f"  {name:<14} {value}" for name, value in rows.items())


def warn_if_answers_are_unlikely(folder: Path, shards: Sequence[str], vocab_size: int) -> None:
    """Say so where the teacher finds the answers hardly likelier than chance: they may not be what it was asked for."""
    figures = [read_done(folder, shard)["figures"] for shard in shards]
    mean = sum(f["cross_entropy"] for f in figures) / max(1, sum(f["tokens"] for f in figures))
    if mean > 0.5 * math.log(vocab_size):
        print(
            f"warning: the teacher's cross-entropy on the answers is {mean:.2f} nats a token, but guessing among "
            f"{vocab_size:,} ids gives {math.log(vocab_size):.2f}; check the prompts, the texts and teacher.path.",
            file=sys.stderr,
        )


def main(args: argparse.Namespace) -> int:
    """Run `distill cache`."""
    return cache(args.config)


if __name__ == "__main__":
    sys.exit(run_stage(cache))
