"""Prove a target cache: re-read every record, and let the teacher say a random share of them again.

Run with `distill cache-verify CONFIG [--share 0.01] [key=value …]`; exit code 1 where anything is damaged, belongs to
another sample, or differs from what the teacher says now by more than the codec's own error.

Shapes: S supervised positions, V vocabulary.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from distill.caching.batches import open_shard
from distill.caching.capture import Capturer
from distill.caching.identity import describe_teacher
from distill.config import Config
from distill.teacher import load_to_keep
from distill.training.monitoring.progress import Progress
from distill.training.ranks import build_accelerator, resolve_precision
from shards.sample import Sample
from shards.targets.codecs.table import decode, find_codec
from shards.targets.distributions import HiddenStates
from shards.targets.record import TargetRecord
from shards.targets.store import TargetReader
from shards.tars.source import expand_shards
from teachers.logits import logit_transform
from teachers.targets import identify_row

# Largest difference allowed, at float32 and at 16 bits, where the other kernels of another batch or device round too.
# Distributions: total variation of a position, at float32 the codec's own `error`; features: of a row's largest.
FEATURE_ERRORS = {"int8": 1.5 / 127, "float16": 2e-3}
LOGPROB_ERROR, ENTROPY_ERROR = 1e-2, 2e-2  # nats
HALF_PRECISION = {"distribution": 0.05, "label_logprobs": 0.2, "entropy": 0.2, "features": 0.05}
NUM_SHOWN = 10  # problems that are printed

Records = dict[str, TargetRecord | None]  # by key; None: damaged


def verify(config: Config, share: float, seed: int = 0) -> int:
    """Check the whole cache and print what was found.

    Args:
        config: the configuration of the run whose cache it is.
        share: the share of the batches that are computed again, 0 to 1.
        seed: the seed of the choice.

    Returns:
        0 where all is well, else 1.

    Raises:
        ValueError: the cache is not there, or is of another teacher; `share` is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"--share is {share}, but it is a share from 0 to 1; correct it.")
    teacher = load_to_keep(config, build_accelerator().device)
    reader = TargetReader(config.cache_folder, describe_teacher(teacher.model, config))
    shards = expand_shards(config.shards("train"))
    reader.check_shards(shards)
    capture, chance = Capturer(teacher, config), random.Random(seed)
    problems: list[str] = []
    differences = defaultdict(list)
    num_records = 0
    with Progress("cache-verify", len(shards), unit="shards") as progress:
        for shard in shards:
            records: Records = dict(read_all(reader, shard, problems))
            num_records += len(records)
            problems += check_identities(config, shard, records, capture)
            for samples in choose_batches(config, shard, share, chance):
                compare_batch_(differences, records, samples, capture)
            progress.advance()
    limits = allowed_differences(config)
    problems += [
        f"{name} differs by {max(values):.3g}, but at most {limits[name]:.3g} is the codec's error; cache again."
        for name, values in differences.items()
        if max(values) > limits[name]
    ]
    print(format_report(num_records, len(shards), differences, limits, problems))
    return 1 if problems else 0


def read_all(reader: TargetReader, shard: str, problems: list[str]) -> Iterator[tuple[str, TargetRecord | None]]:
    """Every record of a shard, None where it is not what was written; what is wrong then goes to `problems`."""
    try:
        keys = reader.keys(shard)
    except ValueError as error:
        problems.append(str(error))
        return
    for key in keys:
        try:
            record = reader.read_record(shard, key)
            num_decoded = len(decode(record.payload).ids_SK)
            if num_decoded != len(record.answer_ids_S):
                raise ValueError(
                    f"{shard}: {key} has a distribution at {num_decoded} positions, but an answer of "
                    f"{len(record.answer_ids_S)} tokens; cache this shard again."
                )
            yield key, record
        except ValueError as error:
            problems.append(str(error))
            yield key, None


def check_identities(config: Config, shard: str, records: Records, capture: Capturer) -> list[str]:
    """What is wrong between a shard's samples as they are read now and the records made for them."""
    problems, unread = [], dict(records)
    for samples in open_shard(config, shard):
        for sample in samples:
            if sample.key not in unread:
                problems.append(f"{shard}: {sample.key} has no targets, but every sample needs some; cache it again.")
                continue
            record = unread.pop(sample.key)
            for part in (record, record.other) if record is not None else ():
                problems += check_identity(shard, sample, part, capture) if part is not None else []
    problems += [f"{shard}: {key} has targets, but its audio cannot be read; pack it again." for key in unread]
    return problems


def check_identity(shard: str, sample: Sample, record: TargetRecord, capture: Capturer) -> list[str]:
    """The refusal that training would meet, if any."""
    if record.answer_source == "teacher":
        sample = replace(sample, text=record.answer)
    row = capture.model.rows.row(sample, with_answer=True, first_prompt=False)
    try:
        record.check(identify_row(sample, row), f"{shard}: {sample.key}")
    except ValueError as error:
        return [str(error)]
    return []


def choose_batches(config: Config, shard: str, share: float, chance: random.Random) -> Iterator[Sequence[Sample]]:
    """A random share of the batches that the job made of a shard, one of each shard's at least while there is a share.

    The same batches give the same rounding, so that on the same device nothing differs at all.
    """
    stream = open_shard(config, shard)
    start, count = stream.state_dict(), stream.batches_per_epoch
    chosen = [number for number in range(count) if chance.random() < share]
    if share and not chosen and count:
        chosen = [chance.randrange(count)]
    for number in chosen:
        stream.load_state_dict(start | {"offset": number * config.cache.batch_size})
        yield next(iter(stream))


def compare_batch_(
    differences: dict[str, list[float]], records: Records, samples: Sequence[Sample], capture: Capturer
) -> None:
    """Let the teacher say a batch again, and add how far the records are from that."""
    for key, fresh in capture(samples).items():
        if records.get(key) is not None:
            compare_(differences, records[key], fresh, capture)


def compare_(differences: dict[str, list[float]], cached: TargetRecord, fresh: TargetRecord, capture: Capturer) -> None:
    """Add how far a record is from what the teacher says now, by kind."""
    differences["answers"].append(float(cached.identity != fresh.identity))
    if cached.identity != fresh.identity:
        return
    differences["label_logprobs"].append(spread(cached.label_logprobs_S - fresh.label_logprobs_S))
    differences["entropy"].append(spread(cached.entropy_S - fresh.entropy_S))
    theirs, ours = (to_dense(record.payload, capture) for record in (cached, fresh))
    differences["distribution"].append(float(0.5 * (theirs - ours).abs().sum(1).max()))
    for name, values in cached.features.items():
        largest = np.abs(fresh.features[name]).max(-1, keepdims=True).clip(1e-6)
        differences[name.split("_")[0]].append(spread((values - fresh.features[name]) / largest))
    if cached.other is not None:
        compare_(differences, cached.other, fresh.other, capture)


def to_dense(payload: bytes, capture: Capturer) -> Tensor:
    """Probabilities over the V ids, and one bucket for what is outside those that were kept."""
    decoded = decode(payload)
    if isinstance(decoded, HiddenStates):
        head_VD = capture.model.llm.get_output_embeddings().weight
        transform = logit_transform(capture.model.llm.config.get_text_config())
        decoded = decoded.to(head_VD.device).with_head(head_VD, **transform)
    ids_SK, logprobs_SK, log_residual_S = decoded.at(1.0)
    dense_SV = logprobs_SK.new_zeros(len(logprobs_SK), decoded.vocab_size + 1)
    dense_SV.scatter_add_(1, ids_SK, logprobs_SK.exp())
    dense_SV[:, -1] = log_residual_S.exp()
    return dense_SV.cpu()


def allowed_differences(config: Config) -> dict[str, float]:
    """The largest difference of each kind that rounding explains."""
    cache, is_half = config.cache, resolve_precision(config.precision) != torch.float32
    states = FEATURE_ERRORS["int8" if cache.features == "none" else cache.features]
    limits = {"queries": states, "hidden": states, "frames": FEATURE_ERRORS.get(cache.frames, 0.0)}
    if is_half:
        limits = {name: max(limit, HALF_PRECISION["features"]) for name, limit in limits.items()}
    exact = {"distribution": find_codec(cache.codec).error, "label_logprobs": LOGPROB_ERROR, "entropy": ENTROPY_ERROR}
    own = {name: max(limit, HALF_PRECISION[name]) if is_half else limit for name, limit in exact.items()}
    return {"answers": 0.0} | own | limits


def format_report(num_records: int, num_shards: int, differences, limits, problems: Sequence[str]) -> str:
    """What `distill cache-verify` prints."""
    lines = [f"{num_records:,} records in {num_shards:,} shards read again, {len(problems):,} problems"]
    if differences:
        lines.append(f"{len(differences['answers']):,} answers computed again; difference to the cache:")
        lines.append(f"  {'':<16}{'mean':>12}{'largest':>12}{'allowed':>12}")
        lines += [f"  {name:<16}{np.mean(values):>12.3g}{max(values):>12.3g}{limits[name]:>12.3g}"
                  for name, values in differences.items()]  # fmt: skip
    lines += problems[:NUM_SHOWN]
    if len(problems) > NUM_SHOWN:
        lines.append(f"… and {len(problems) - NUM_SHOWN:,} more")
    return "\n".join(lines)


def spread(values: np.ndarray) -> float:
    """The largest absolute value; 0 of none."""
    return float(np.abs(values).max(initial=0.0))


def main(args: argparse.Namespace) -> int:
    """Run `distill cache-verify`."""
    return verify(args.config, args.share, args.seed)
