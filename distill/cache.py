"""The caching job: the teacher's targets for every training sample, beside the shards, once.

Run with `accelerate launch -m distill.cache CONFIG [key=value …]`. Ranks claim shards one by one, so any number,
started and killed at any time, ends in the same files.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from distill.commandline.starting import end_at_signals

    end_at_signals()

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distill.caching.capture import Capturer
from distill.caching.identity import describe_teacher
from distill.caching.job import FIGURES, Capture, Job
from distill.command import run_stage
from distill.config import Config
from distill.teacher import load_to_keep
from distill.training.ranks import build_accelerator, say
from shards.status import print_status
from shards.streaming.catalog import hash_shards
from shards.targets.codecs.table import find_codec
from shards.targets.store import TargetWriter, read_done
from shards.tars.source import expand_shards
from teachers.files.cacheparts import save_parts


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
        print_status(
            f"warning: the teacher's cross-entropy on the answers is {mean:.2f} nats a token, but guessing among "
            f"{vocab_size:,} ids gives {math.log(vocab_size):.2f}; check the prompts, the texts and teacher.path."
        )


def main(args: argparse.Namespace) -> int:
    """Run `distill cache`."""
    return cache(args.config)


if __name__ == "__main__":
    sys.exit(run_stage(cache))
