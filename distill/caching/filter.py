"""Leave out, or count for less, the clips whose labels the teacher does not believe: `distill filter CONFIG …`.

Reads what the cache keeps of every label: the teacher's cross-entropy and, with `cache.transcripts`, the error rate of
its own transcript. Writes a file of weights by key that training reads (`data.weights`); a weight of 0 leaves a clip
out. Distil-Whisper's gain from such a filter was larger than from its KL term.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.config import Config
from shards.files.write import open_atomically
from shards.jsonfile import ShapeError, is_a, read_object, show
from shards.targets.header import CacheHeader
from shards.targets.record import TargetRecord
from shards.targets.store import TargetReader
from shards.tars.source import expand_shards

WEIGHTS = "weights.json"


@dataclass(frozen=True)
class Rule:
    """What a label must keep to, and what a clip counts whose label does not."""

    max_wer: float | None = None  # of the teacher's own transcript against the label, a fraction
    max_ce: float | None = None  # the teacher's mean cross-entropy on the label, nats a token
    weight: float = 0.0  # of a clip that breaks it

    def __post_init__(self):
        if self.max_wer is None and self.max_ce is None:
            raise ValueError("max_wer and max_ce are None, but a filter needs a limit; give --max-wer or --max-ce.")
        if not 0 <= self.weight < 1:
            raise ValueError(
                f"weight is {self.weight}, but a clip that is filtered counts from 0 to below 1; lower it."
            )

    def breaks(self, record: TargetRecord) -> bool:
        """Whether a labelled clip is over a limit; the teacher's own answers are not labels, and stay."""
        if record.answer_source != "label":
            return False
        has_errors = self.max_wer is not None and "wer" in record.notes and float(record.notes["wer"]) > self.max_wer
        return has_errors or (self.max_ce is not None and record.teacher_ce > self.max_ce)


def filter_labels(config: Config, rule: Rule, path: Path) -> str:
    """Judge every label of a cache and write the weights; returns what happened.

    Raises:
        ValueError: there is no cache, it lacks a shard, or it holds no error rates though the rule limits them.
    """
    reader = TargetReader(config.cache_folder, None)
    shards = expand_shards(config.shards("train"))
    reader.check_shards(shards)
    if rule.max_wer is not None and not reader.header.identity["answers"]["transcripts"]:
        raise ValueError(
            f"--max-wer is {rule.max_wer}, but {config.cache_folder} was cached with cache.transcripts=false; cache "
            f"again with cache.transcripts=true, or use --max-ce."
        )
    num_labels, over, ces = 0, {}, []
    for shard in shards:
        for key in reader.keys(shard):
            record = reader.read_record(shard, key)
            num_labels += record.answer_source == "label"
            if rule.breaks(record):
                over[key] = rule.weight
                ces.append(record.teacher_ce)
    content = {"fingerprint": reader.header.fingerprint, "cache": str(config.cache_folder), "rule": asdict(rule)}
    with open_atomically(path) as file:
        json.dump(content | {"num_labels": num_labels, "weights": over}, file, indent=1, sort_keys=True)
    share = len(over) / max(1, num_labels)
    verb = "left out" if rule.weight == 0 else f"counted {rule.weight:g}"
    worst = f"; their mean cross-entropy is {sum(ces) / len(ces):.2f} nats a token" if ces else ""
    return f"{len(over):,} of {num_labels:,} labels ({share:.1%}) are {verb}{worst}\nset data.weights={path}"


def load_weights(path: Path, header: CacheHeader | None) -> Mapping[str, float]:
    """Weights by key; a key that is not there counts 1.

    Args:
        path: the path of a file that `distill filter` wrote.
        header: the header of the cache that is trained from; None where the teacher is online.

    Raises:
        ValueError: the file is damaged, or was made from another cache.
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.weights is {path}, but there is no such file; make it with distill filter.")
    try:
        content = read_object(path, {"fingerprint": str, "weights": dict})
        fingerprint, weights = content["fingerprint"], content["weights"]
        wrong = next((key for key, weight in weights.items() if not is_a(weight, float)), None)
        if wrong is not None:
            raise ShapeError(f"has the weight {show(weights[wrong])} for {wrong}, but a number is needed")
    except ShapeError as error:
        raise ValueError(
            f"{path} cannot be read (it {error}), but must be whole; make it with distill filter."
        ) from error
    if header is not None and fingerprint != header.fingerprint:
        raise ValueError(
            f"{path} judges the labels of cache {fingerprint[:16]}, but this run's is {header.fingerprint[:16]}; run "
            f"distill filter again."
        )
    return {key: float(weight) for key, weight in weights.items()}


def main(args: argparse.Namespace) -> int:
    """Run `distill filter`."""
    config = args.config
    print(
        filter_labels(
            config,
            Rule(args.max_wer, args.max_ce, args.weight),
            args.out or TargetReader(config.cache_folder, None).folder / WEIGHTS,
        )
    )
    return 0
