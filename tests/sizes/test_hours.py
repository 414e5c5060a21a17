"""Hours and disk planned before there is a machine: a record foretold is the record that the job writes."""

import json
from pathlib import Path

import pytest
import tiny

from distill.caching.capture import Capturer, feature_dtypes
from distill.cli import main
from distill.config import load_config
from distill.sizes.cards import CARDS, find_card
from distill.sizes.costs import Usage
from distill.sizes.hours import Corpus, Stay, Work, count_work, find_corpus, plan_hours, plan_ways, record_bytes
from distill.teacher import load_to_keep
from shards.tars.archive import BLOCK

WORK = Work(
    student_flops=2e12, ear_flops=3e12, own_ear_flops=1e12, teacher_flops=7e12, teacher_bytes=6e9, trained_bytes=1e8
)
CLIP = Usage(seconds=2.0, answer_tokens=10)
STAY = Stay(CARDS["RTX4090"], 2, 0.5)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return tiny.make_toys(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize("words", [
    [],
    ["cache.features=none"],
    ["cache.frames=int8", "student.windows=all"],
    ["cache.frames=float16", "student.ears_seconds=clip"],
    ["cache.hidden_layers=[1]", "cache.codec=hidden"],
    ["cache.codec=dense"],
    ["cache.codec=sampled"],
], ids=" ".join)  # fmt: skip
def test_the_record_foretold_takes_the_bytes_of_the_one_that_is_cached(toys, words):
    config = load_config(toys, words)
    (record,) = Capturer(load_to_keep(config, "cpu"), config)(
        [tiny.make_sample(text="two three", seconds=2.0)]
    ).values()
    size = len(record.pack(feature_dtypes(config.cache, record)))
    foretold = record_bytes(config, Usage(seconds=2.0, answer_tokens=len(record.answer_ids_S)))
    assert foretold == pytest.approx(BLOCK + size, abs=2 * BLOCK)  # whole blocks, and texts of another length


def test_a_card_is_found_by_what_torch_calls_it_and_an_unknown_one_is_refused():
    assert find_card("NVIDIA H100 80GB HBM3") is CARDS["H100"]
    assert find_card("NVIDIA GeForce RTX 4090") is CARDS["RTX4090"]
    assert find_card("Tesla V100-SXM2-32GB") is CARDS["V100"]
    assert find_card("NVIDIA L40S") is CARDS["L40S"]
    with pytest.raises(ValueError, match=r"card is 'Radeon', but figures are known of T4, .*H200; name one of them\."):
        find_card("Radeon")


def test_hours_are_the_work_over_the_rate_of_all_cards(toys):
    config = load_config(toys, ["data.labelled_share=0.25", "cache.batch_size=6"])
    corpus = Corpus(hours=1000, num_clips=1_800_000, shard_bytes=7e10)
    plan = plan_hours(config, STAY, corpus, corpus.usage(CLIP), WORK)
    rate = 2 * 165e12 * 0.5 * 3600
    assert plan.cache_hours == pytest.approx(1_800_000 * 7e12 / rate)
    assert plan.epoch_hours == pytest.approx(1_800_000 * (2e12 + 3e12) / rate)  # frames are not cached: ears run
    steps = config.train.steps * config.train.batch_size
    assert plan.train_hours == pytest.approx(steps * 5e12 / rate)
    answered = 1_800_000 * 0.75 * CLIP.answer_tokens / 6 * 6e9
    assert plan.answer_hours == pytest.approx(answered / (2 * 1e12 * 3600))
    assert plan.shards_gb == 70 and plan.cache_gb == pytest.approx(1_800_000 * record_bytes(config, CLIP) / 1e9)


def test_cached_frames_cost_disk_and_spare_the_ears_and_an_online_teacher_costs_its_own_time(toys):
    corpus, rate = Corpus(10, 18_000, 7e8), 2 * 165e12 * 0.5 * 3600
    as_it_is, frames = plan_ways(load_config(toys), STAY, corpus, corpus.usage(CLIP)).values()
    assert frames.cache_gb > as_it_is.cache_gb and frames.epoch_hours < as_it_is.epoch_hours
    assert frames.cache_hours == as_it_is.cache_hours
    (online,) = plan_ways(load_config(toys, ["teacher.online=true"]), STAY, corpus, corpus.usage(CLIP)).values()
    assert (online.cache_gb, online.cache_hours, online.answer_hours) == (0, 0, 0)
    assert online.epoch_hours > as_it_is.epoch_hours
    direct = plan_hours(load_config(toys, ["teacher.online=true"]), STAY, corpus, CLIP, WORK)
    assert direct.epoch_hours == pytest.approx(18_000 * (2e12 + 7e12 + 1e12) / rate)  # shared ears run once
    some = plan_hours(load_config(toys, ["on_policy.step_share=0.25"]), STAY, corpus, CLIP, WORK)
    assert some.epoch_hours == pytest.approx(18_000 * (2e12 + 3e12 + 7e12 / 4) / rate)


def test_ears_that_are_the_teachers_own_are_none_of_the_students(toys):
    cases = [], ["student.train_ears=true"], ["student.ears_lora_rank=2"]
    shared, whole, lora = (count_work(load_config(toys, words), CLIP) for words in cases)
    assert shared.own_ear_flops == 0 and whole.own_ear_flops == whole.ear_flops == 3 * shared.ear_flops
    assert lora.own_ear_flops == lora.ear_flops == pytest.approx(2 * shared.ear_flops, rel=0.1)  # and LoRA's own
    assert shared.trained_bytes < lora.trained_bytes < whole.trained_bytes


def test_plan_counts_what_is_packed_and_says_where_nothing_is(toys, capsys, tmp_path):
    config = load_config(toys)
    found = find_corpus(config.shards("train"), None, CLIP)
    assert found.num_clips == 12 and found.mean_seconds == pytest.approx(0.75)
    assert found.shard_bytes == sum(tar.stat().st_size for tar in Path(config.shards("train")).glob("*.tar"))
    words = ["plan", str(toys), "--gpus", "2", "--card", "L4"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["hours"]
    assert (plan["card"], plan["gpus"], plan["reached"]) == ("L4", 2, 0.3)
    assert plan["ways"]["as it is"]["train_hours"] > 0
    assert main([*words, "--audio-hours", "1000"]) == 0
    text = capsys.readouterr().out
    assert "on 2 x L4 at 30% of the published rate; 1,000.0 h of audio in 360,000 clips of 10.0 s" in text
    assert "cache.frames=int8" in text and "of 24 GB" in text  # the card's own
    assert main([*words, f"data.folder={tmp_path}"]) == 1
    assert "--audio-hours is not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--card", "L4"], ["--gpu-gb", "24"], ["--audio-hours", "5"]], ids=lambda words: words[0]
)
def test_what_is_said_of_cards_is_refused_without_their_number(toys, capsys, words):
    assert main(["plan", str(toys), *words]) == 1
    assert f"{words[0]} is given, but cards are planned for with --gpus alone; say how many" in capsys.readouterr().err
