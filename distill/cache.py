"""The caching job: the teacher's targets for every training sample, beside the shards, once.

Run with `accelerate launch distill/cache.py CONFIG [key=value …]`. Ranks claim shards one by one, so any number,
started and killed at any time, ends in the same files.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.cli import add_config_arguments, run_stage
from distill.config import Config, fingerprint, load_config
from distill.progress import Progress
from distill.ranks import build_accelerator, resolve_precision, say
from distill.teacher import load_teacher
from shards.cache import TargetShard, TargetWriter, read_done
from shards.codecs import CODECS, decode
from shards.header import CacheHeader
from shards.sample import Sample
from shards.source import expand_shards
from shards.stream import ShardStream
from shards.targets import TargetRecord
from teachers.loading import hash_frozen_parts, hash_tensors, own_tensors
from teachers.salmonn import Salmonn
from teachers.targets import QUERIES, OnlineTeacher, Vocabulary, identify_row


def describe_teacher(teacher: Salmonn, config: Config) -> CacheHeader:
    """Everything the targets depend on; its hash is the cache's fingerprint."""
    settings = asdict(teacher.config)
    paths = {name: settings.pop(name) for name in ("llm", "whisper", "second", "prompts")}
    return CacheHeader(
        {
            "teacher_weights": {"own": hash_tensors(own_tensors(teacher)), **hash_frozen_parts(teacher)},
            "teacher_config": settings,
            "tokenizer": asdict(Vocabulary.of(teacher.tokenizer)) | {"name": Path(paths["llm"]).name},
            "prompts": fingerprint({t: list(p) for t, p in teacher.rows.prompts.by_task.items()}),
            "front_end": "teachers.frontend 1",
            "dtype": str(resolve_precision(config.precision)),
            "codec": {"name": config.cache.codec, "k": config.cache.k, "temperatures": list(config.cache.temperatures)},
            "features": config.cache.features,
            "answers": {"labelled_share": config.data.labelled_share, "max_new_tokens": config.cache.max_new_tokens},
        }
    )


def cache(config: Config) -> int:
    """Write the targets of every training shard that has none yet; returns the exit code."""
    accelerator = build_accelerator()
    teacher = OnlineTeacher(load_teacher(config).to(accelerator.device), max_new_tokens=config.cache.max_new_tokens)
    writer = TargetWriter(config.cache_folder, describe_teacher(teacher.model, config))
    shards = expand_shards(config.shards("train"))
    missing = [shard for shard in shards if not writer.is_done(shard)]
    if not missing:
        say(accelerator, f"cache: {config.cache_folder} holds the targets of all {len(shards)} shards, used again")
        return 0
    num_samples = ShardStream(missing, batch_size=1, shuffle=False, epochs=1).num_samples
    share = -(-num_samples // accelerator.num_processes)
    began = time.monotonic()
    with Progress("cache", share, accelerator=accelerator, unit="samples") as progress:
        for shard in missing:
            with writer.claim(shard) as target:
                if target is not None:
                    write_shard(target, shard, teacher, config, progress)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(summarise(config.cache_folder, shards, time.monotonic() - began))
    return 0


def write_shard(target: TargetShard, shard: str, teacher: OnlineTeacher, config: Config, progress: Progress) -> None:
    """Run the teacher over one audio shard, longest clips first, and write the records in the shard's own order."""
    stream = ShardStream(
        shard,
        batch_size=config.cache.batch_size,
        shuffle=False,
        epochs=1,
        bucket_batches=10**6,
        num_workers=config.data.workers,
        labelled_share=config.data.labelled_share,
    )
    records: dict[str, TargetRecord] = {}
    for samples in stream:
        records |= make_records(samples, teacher, config)
        progress.advance(f"{Path(shard).name}", units=len(samples))
    keys = [stream.catalog.key(row) for row in range(stream.num_samples)]
    unread = [key for key in keys if key not in records]
    if unread:
        raise ValueError(
            f"{shard} holds {len(unread)} samples that cannot be read ({', '.join(unread[:5])}), but every sample "
            f"needs targets; find them with `distill pack --verify` and pack again."
        )
    dtype = "int8" if config.cache.features == "none" else config.cache.features
    for key in keys:
        target.add(key, records[key].pack(dtype))
    target.figures |= tally(records.values())


@torch.no_grad()
def make_records(samples: Sequence[Sample], teacher: OnlineTeacher, config: Config) -> dict[str, TargetRecord]:
    """One teacher forward; each sample's record by key."""
    model, codec = teacher.model, build_codec(config)
    samples, is_pseudo = teacher.label(samples)
    batch = model.collate(samples).to(model.device)
    dtype = resolve_precision(config.precision)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        logits_SV, heard = model(batch)
    captured = {name: values.cpu().numpy() for name, values in codec.capture(logits_SV).items()}
    label_logprobs_S, entropy_S = judge(logits_SV, batch.labels_S)
    records, start = {}, 0
    for b, (sample, row) in enumerate(zip(samples, batch.rows)):
        part = slice(start, start := start + len(row.answer))
        queries_WQE = heard.queries_BWQE[b, : heard.num_windows_B[b]].float().cpu().numpy()
        records[sample.key] = TargetRecord(
            payload=codec.encode({n: v[part] if v.ndim else v for n, v in captured.items()}),
            answer_ids_S=np.asarray(row.answer, np.int32),
            label_logprobs_S=label_logprobs_S[part],
            entropy_S=entropy_S[part],
            byte_ends_S=np.asarray(model.rows.byte_ends(sample.text, len(row.answer)), np.int32),
            answer=sample.text,
            answer_source="teacher" if is_pseudo[b] else "label",
            identity=identify_row(sample, row),
            features={} if config.cache.features == "none" else {QUERIES: queries_WQE},
        )
    return records


def judge(logits_SV: Tensor, labels_S: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each label and the entropy of each position, nats, float32."""
    logprobs_SV = torch.log_softmax(logits_SV.float(), -1)
    entropy_S = -(logprobs_SV.exp() * logprobs_SV).nan_to_num(0.0).sum(-1)
    return logprobs_SV.gather(1, labels_S[:, None])[:, 0].cpu().numpy(), entropy_S.cpu().numpy()


def build_codec(config: Config):
    """The codec that the config names, with those of its settings that it has."""
    kind = CODECS[config.cache.codec]
    settings = {"k": config.cache.k, "temperatures": tuple(config.cache.temperatures)}
    return kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})


def tally(records: Iterable[TargetRecord]) -> dict[str, float]:
    """Totals for a shard's done record: samples, tokens, bytes of distributions, the mass they keep, own answers."""
    totals = dict.fromkeys(("samples", "tokens", "payload_bytes", "captured_mass", "own_answers"), 0)
    for record in records:
        totals["samples"] += 1
        totals["tokens"] += len(record.answer_ids_S)
        totals["payload_bytes"] += len(record.payload)
        totals["captured_mass"] += float(decode(record.payload).logprobs_SK.exp().sum())
        totals["own_answers"] += record.answer_source == "teacher"
    return totals


def summarise(folder: Path, shards: Sequence[str], seconds: float) -> str:
    """The closing table of a caching job."""
    done = [read_done(folder, shard) for shard in shards]
    total = {name: sum(d["figures"][name] for d in done) for name in done[0]["figures"]}
    size, tokens = sum(d["bytes"] for d in done), max(1, total["tokens"])
    rows = {
        "shards": len(done),
        "samples": f"{total['samples']:,} ({total['own_answers']:,} on the teacher's own answer)",
        "tokens": f"{total['tokens']:,}",
        "bytes": f"{size:,} ({size / max(1, total['samples']):,.0f} a sample)",
        "bytes a token": f"{total['payload_bytes'] / tokens:.1f} (distributions alone)",
        "captured mass": f"{total['captured_mass'] / tokens:.4f}",
        "this job": f"{seconds / 3600:.3f} h",
    }
    return "\n".join(f"  {name:<14} {value}" for name, value in rows.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill cache` takes."""
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run `distill cache`."""
    return cache(load_config(args.config, args.overrides))


if __name__ == "__main__":
    sys.exit(run_stage(cache))
