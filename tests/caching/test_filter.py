"""`distill filter`: labels the teacher does not believe are left out or count less, and only in runs of that cache."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch

from distill.caching.filter import Rule, filter_labels, load_weights
from distill.config import load_config
from distill.training.microbatch import Collator
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.header import IDENTITY_FIELDS, CacheHeader
from shards.targets.record import TargetRecord, identify_sample
from shards.targets.store import TargetWriter
from shards.tars.index import load_index
from teachers.teacher import NoTeacher

HEADER = CacheHeader({name: name for name in IDENTITY_FIELDS} | {"answers": {"of": "label", "transcripts": True}})


def write_cache(folder, shards, header=HEADER) -> list[str]:
    """Records whose cross-entropy is the number of the clip in nats, and whose WER is a tenth of it; returns keys."""
    keys = []
    for shard in sorted(shards.glob("*.tar")):
        with TargetWriter(folder, header).claim(str(shard)) as target:
            for key in load_index(shard).keys:
                number = len(keys)
                keys.append(key)
                record = TargetRecord(
                    payload=b"", answer_ids_S=np.arange(2), label_logprobs_S=np.full(2, -float(number)),
                    entropy_S=np.zeros(2), byte_ends_S=np.zeros(2), answer="one",
                    answer_source="teacher" if number == 11 else "label",
                    identity=identify_sample("", [], []), notes={"wer": f"{number / 10}"},
                )  # fmt: skip
                target.add(key, record.pack())
    return keys


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_shards(folder / "data")
    tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts")
    return load_config(folder / "toy.yaml"), write_cache(folder / "data" / "cache", folder / "data" / "train")


@pytest.mark.parametrize(
    ("rule", "first"),
    [(Rule(max_wer=0.75), 8), (Rule(max_ce=4.5), 5), (Rule(max_wer=0.75, max_ce=4.5), 5), (Rule(max_ce=99.0), 11)],
)
def test_labels_over_a_limit_are_left_out_and_the_teachers_own_answers_stay(toys, tmp_path, rule, first):
    config, keys = toys
    said = filter_labels(config, rule, tmp_path / "weights.json")
    weights = load_weights(tmp_path / "weights.json", HEADER)
    assert weights == dict.fromkeys(keys[first:11], 0.0)
    assert said.startswith(f"{11 - first} of 11 labels") and f"data.weights={tmp_path}/weights.json" in said
    content = json.loads((tmp_path / "weights.json").read_text())
    assert content["rule"] == dataclasses.asdict(rule) and content["fingerprint"] == HEADER.fingerprint


def test_a_clip_of_weight_zero_is_never_read_and_the_epoch_is_shorter(toys, tmp_path):
    config, keys = toys
    filter_labels(config, Rule(max_ce=4.5), tmp_path / "weights.json")
    weights = load_weights(tmp_path / "weights.json", HEADER)
    stream = ShardStream(config.shards("train"), Order(batch_size=2, epochs=1), Selection(sample_weights=weights))
    read = [sample.key for batch in stream for sample in batch]
    assert sorted(read) == sorted(keys[:5] + keys[11:]) and stream.num_samples == 6
    other = ShardStream(config.shards("train"), Order(batch_size=2, epochs=1))
    with pytest.raises(ValueError, match=r"state has sample_weights [0-9a-f]{16}, but this stream has none"):
        other.load_state_dict(stream.state_dict())


def test_a_clip_that_counts_half_enters_every_term_with_half_its_weight(toys, tmp_path):
    config, keys = toys
    filter_labels(config, Rule(max_ce=4.5, weight=0.5), tmp_path / "weights.json")
    weights = load_weights(tmp_path / "weights.json", HEADER)
    assert set(weights.values()) == {0.5}
    tiny.make_parts(tmp_path / "parts")
    collate = Collator(NoTeacher(), tiny.make_teacher(tmp_path / "parts"), torch.device("cpu"), torch.float32)
    stream = ShardStream(
        config.shards("train"), Order(batch_size=12, shuffle=False, epochs=1), Selection(sample_weights=weights)
    )
    micro_batch = collate(next(iter(stream)))
    assert micro_batch.sample_weights == [0.5 if key in keys[5:11] else 1.0 for key in keys]


def test_weights_of_another_cache_are_refused_with_both_fingerprints(toys, tmp_path):
    config, _ = toys
    filter_labels(config, Rule(max_ce=4.5), tmp_path / "weights.json")
    other = CacheHeader(HEADER.identity | {"dtype": "another"})
    with pytest.raises(
        ValueError, match=f"cache {HEADER.fingerprint[:16]}, but this run's is {other.fingerprint[:16]}"
    ):
        load_weights(tmp_path / "weights.json", other)


@pytest.mark.parametrize("text", ["", "[]", '{"weights": {}}', '{"fingerprint": "a", "weights": {"k": "x"}}'])
def test_a_damaged_or_missing_file_of_weights_is_refused(tmp_path, text):
    with pytest.raises(FileNotFoundError, match=r"data\.weights is .*weights\.json, but there is no such file"):
        load_weights(tmp_path / "weights.json", HEADER)
    (tmp_path / "weights.json").write_text(text)
    with pytest.raises(ValueError, match=r"weights\.json cannot be read"):
        load_weights(tmp_path / "weights.json", HEADER)


def test_error_rates_that_were_not_cached_and_rules_without_a_limit_are_refused(toys, tmp_path):
    config, _ = toys
    header = CacheHeader(HEADER.identity | {"answers": {"of": "label", "transcripts": False}})
    write_cache(tmp_path, config.shards("train"), header)
    bare = dataclasses.replace(config, cache=dataclasses.replace(config.cache, folder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"--max-wer is 0\.1, but .* was cached with cache\.transcripts=false"):
        filter_labels(bare, Rule(max_wer=0.1), tmp_path / "weights.json")
    with pytest.raises(ValueError, match="max_wer and max_ce are None, but a filter needs a limit"):
        Rule()
    with pytest.raises(ValueError, match=r"weight is 1\.0, but"):
        Rule(max_ce=1.0, weight=1.0)
