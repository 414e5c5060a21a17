"""The objective as a run sees it: every term, weight, schedule and target kind, whole or split."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from distill.cache import cache
from distill.config import LossConfig, TrainConfig, load_config
from distill.distiller import Distiller
from distill.objective.schedule import build_schedules
from distill.objective.terms import TERMS
from distill.objective.weighing import active_terms, count, weigh
from distill.training.microbatch import Collator, split
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.codecs.table import find_codec
from students.hearing import Connector
from students.student import build_student, save_student
from teachers.cached import CachedTeacher
from teachers.files.loading import load_salmonn, read_names
from teachers.lora import Lora
from teachers.online import OnlineTeacher
from teachers.teacher import NoTeacher

OPTIONS = TrainConfig(steps=4, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=1, save_every=100)
LORA = Lora(rank=4)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    return folder


def make_run(toys, run_folder, loss: LossConfig, teacher=None, stream=None, **changes) -> Distiller:
    model = load_salmonn(toys / "teacher")
    student = build_student(
        model, str(toys / "parts" / "student-llm"), lora=LORA, connector=Connector("new"), quantization="none"
    )
    teacher = teacher or OnlineTeacher(model, k=16, temperatures=(1.0, 2.0), hidden_layers=[1])
    return Distiller(teacher, student, train=stream or toys / "data" / "train", loss=loss,
                     options=dataclasses.replace(OPTIONS, **changes), run=run_folder)  # fmt: skip


def gradients(run: Distiller, samples, parts: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of a step cut in so many micro-batches, dropout off."""
    collate = Collator(run.teacher, run.student, torch.device("cpu"), torch.float32, run.loss.task_weights)
    micro_batches = [collate(part) for part in split(samples, parts)]
    counts = [count(run.terms, m) for m in micro_batches]
    totals = {name: sum(found[name] for found in counts) for name in run.terms}
    weights = {name: run.schedules[name].start for name in run.terms}
    loss = sum(run.objective(m, weigh(run.terms, m, run.loss, weights, totals))[0] for m in micro_batches)
    names = list(run.named)
    found = torch.autograd.grad(loss, [run.named[name] for name in names], allow_unused=True)
    return float(loss.detach()), {n: torch.zeros_like(run.named[n]) if g is None else g for n, g in zip(names, found)}


EVERY_TERM = [
    LossConfig(kl_kind="jsd", kl_parameter=0.3, feature_kind="relation", temperature=2.0),
    LossConfig(kl_kind="reverse_kl", feature_kind="cosine", hidden=0.5, task_weights={"asr": 0.7}, pseudo_ce=0.5),
    LossConfig(kl_kind="total_variation", feature_kind="smooth_l1", hidden=0.5, hidden_kind="relation"),
    LossConfig(kl_kind="skewed_kl", kl_parameter=0.1, hidden=1.0, hidden_kind="mse", hidden_layers={-1: -1, 1: 1}),
    LossConfig(kl_kind="skewed_reverse_kl", kl_parameter=0.1, ce=0.0),
]


@pytest.mark.parametrize("loss", EVERY_TERM)
def test_the_gradient_of_every_term_does_not_depend_on_micro_batches(toys, tmp_path, loss):
    run = make_run(toys, tmp_path, loss)
    run.objective.eval()
    samples = [
        tiny.make_sample(i, text=" ".join(tiny.WORDS[: 1 + 2 * (i % 3)]), seconds=0.5 + 0.2 * i) for i in range(5)
    ]
    samples[1] = dataclasses.replace(samples[1], weight=0.25)
    whole, expected = gradients(run, samples, 1)
    for parts in (2, 7):
        value, found = gradients(run, samples, parts)
        assert value == pytest.approx(whole, rel=1e-5)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, atol=2e-6, rtol=1e-3)


def test_a_sample_of_weight_zero_changes_no_gradient(toys, tmp_path):
    run = make_run(toys, tmp_path, LossConfig(hidden=0.5))
    run.objective.eval()
    samples = [tiny.make_sample(i) for i in range(3)]
    silent = [*samples[:2], dataclasses.replace(samples[2], weight=0.0)]
    other = [*samples[:2], dataclasses.replace(samples[2], weight=0.0, text="two one")]
    expected, found = (gradients(run, rows, 1)[1] for rows in (silent, other))
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-7, rtol=0)


@pytest.mark.parametrize("codec, atol", [("topk", 2e-2), ("dense", 5e-3), ("hidden", 2e-2), ("adaptive", 5e-2)])
def test_every_cached_target_kind_gives_the_kl_of_the_online_teacher(toys, tmp_path, codec, atol):
    words = [f"cache.codec={codec}", f"cache.folder={tmp_path / 'cache'}", "cache.hidden_layers=[-1]"]
    words += ["cache.k=64"] * ("k" in find_codec(codec).settings)
    cache(load_config(toys / "toy.yaml", words))
    teacher = CachedTeacher(tmp_path / "cache")
    loss = LossConfig(ce=0.0, feature=0.0, hidden=1.0, temperature=2.0)
    stream = ShardStream(toys / "data" / "train", Order(batch_size=4), Selection(targets=tmp_path / "cache"))
    cached = make_run(toys, tmp_path / "cached", loss, teacher, stream, steps=1, warmup_steps=0).fit().losses
    whole = OnlineTeacher(load_salmonn(toys / "teacher"), k=None if codec in ("dense", "hidden") else 64,
                          temperatures=(2.0,))  # fmt: skip
    online = make_run(toys, tmp_path / "online", loss, whole, steps=1, warmup_steps=0).fit().losses
    assert cached == pytest.approx(online, abs=atol)


def test_draws_of_the_teacher_train_with_the_forward_kl_and_are_refused_with_another(toys, tmp_path):
    words = ["cache.codec=sampled", "cache.draws=20", f"cache.folder={tmp_path / 'cache'}"]
    cache(load_config(toys / "toy.yaml", words))
    teacher = CachedTeacher(tmp_path / "cache")
    stream = ShardStream(toys / "data" / "train", Order(batch_size=4), Selection(targets=tmp_path / "cache"))
    losses = make_run(toys, tmp_path / "run", LossConfig(ce=0.0, feature=0.0), teacher, stream).fit().losses
    assert all(math.isfinite(loss) for loss in losses)
    with pytest.raises(ValueError, match=r"draws of the teacher .* give forward_kl at temperature 1 alone"):
        make_run(toys, tmp_path / "other", LossConfig(kl_kind="jsd", kl_parameter=0.5), teacher, stream)


def test_a_projector_trains_resumes_and_stays_out_of_the_student(toys, tmp_path):
    loss = LossConfig(hidden=1.0, hidden_kind="mse")
    whole = make_run(toys, tmp_path / "whole", loss).fit().losses
    first = make_run(toys, tmp_path / "run", loss, stop_after=2)
    before = first.objective.projectors["hidden-1"].weight.clone()
    assert first.fit().losses == whole[:2]
    assert not torch.equal(first.projectors["projectors.hidden-1.weight"], before)
    second = make_run(toys, tmp_path / "run", loss)
    assert second.fit().losses == whole
    save_student(second.student, tmp_path / "student", lora=LORA, quantization="none")
    assert not any("projector" in name for name in read_names(tmp_path / "student" / "model.safetensors"))


def test_a_schedule_moves_a_terms_weight_and_a_resumed_run_goes_on_with_it(toys, tmp_path):
    loss = LossConfig(feature=0.0, schedules={"kl": "linear 0.0", "feature": "linear 2.0 warmup 1"})
    result = make_run(toys, tmp_path / "whole", loss, learning_rate=1e-9).fit()
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [records[0]["feature"], records[-1]["kl"]] == [0.0, 0.0]
    assert records[0]["kl"] > records[2]["kl"] > 0 and records[-1]["feature"] > records[2]["feature"] > 0
    make_run(toys, tmp_path / "part", loss, learning_rate=1e-9, stop_after=2).fit()
    assert make_run(toys, tmp_path / "part", loss, learning_rate=1e-9).fit().losses == result.losses


def test_schedules_give_each_step_its_weights():
    loss = LossConfig(ce=1.0, kl=0.5, schedules={"kl": "cosine 1.5", "ce": "constant warmup 3"})
    schedules = build_schedules(TERMS, loss, 101)
    assert schedules["kl"].weight(50) == pytest.approx(1.0)
    assert [schedules["ce"].weight(step) for step in (0, 1, 2, 3, 100)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert schedules["feature"].weight(7) == loss.feature

    def names(loss, teacher):
        return set(active_terms(TERMS, build_schedules(TERMS, loss, 101), teacher))

    teacher = SimpleNamespace(has_targets=True, is_crossed=False)
    crossed = SimpleNamespace(has_targets=True, is_crossed=True)
    assert names(loss, teacher) == {"ce", "kl", "feature"}
    assert names(loss, crossed) == {"ce", "kl", "feature", "chunk"}
    assert names(loss, NoTeacher()) == {"ce"}
    assert "kl" not in names(LossConfig(kl=0.0, schedules={"kl": "constant warmup 2"}), teacher)


@pytest.mark.parametrize(
    "loss, message",
    [
        ({"schedules": {"kll": "linear 1"}}, r"loss\.schedules names kll, but the terms are ce, kl"),
        ({"schedules": {"kl": "linear"}}, r"loss\.schedules\.kl is 'linear', but must read"),
        ({"schedules": {"kl": "slowly 1"}}, r"loss\.schedules\.kl: schedule is 'slowly'"),
        ({"schedules": {"kl": "constant warmup 99"}}, r"loss\.schedules\.kl: warmup_steps is 99, but it must lie"),
        (
            {"ce": 0, "kl": 0, "feature": 0},
            r"loss\.hidden, loss\.frames are all 0, but a student",
        ),
        ({"task_weights": {"asrr": 1.0}}, r"loss\.task_weights names asrr, but the tasks are"),
        ({"kl_kind": "jsd"}, r"loss\.kl_parameter is None, but jsd takes one strictly between 0 and 1"),
        ({"temperature": 0.0}, r"loss\.temperature is 0\.0, but must be above 0"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_before_anything_starts(toys, tmp_path, loss, message):
    with pytest.raises(ValueError, match=message):
        make_run(toys, tmp_path, LossConfig(**loss))


@pytest.mark.parametrize(
    "loss, message",
    [
        (LossConfig(hidden=1.0, feature=0.0), r"loss\.hidden is above 0, but the teacher's targets hold no states"),
        (LossConfig(feature=1.0), r"loss\.feature is above 0, but the teacher's targets hold no Q-Former queries"),
    ],
)
def test_a_term_without_targets_is_an_error_and_not_zero(toys, tmp_path, loss, message):
    words = [f"cache.folder={tmp_path / 'cache'}", "cache.features=none", "loss.feature=0"]
    cache(load_config(toys / "toy.yaml", words))
    stream = ShardStream(toys / "data" / "train", Order(batch_size=4), Selection(targets=tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        make_run(toys, tmp_path, loss, CachedTeacher(tmp_path / "cache"), stream).fit()
