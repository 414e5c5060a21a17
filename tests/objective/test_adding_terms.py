"""A further loss term, divergence or distance of features is one file or function, and one line in a dict."""

import dataclasses

import pytest
import tiny
import torch

from distill.config import LossConfig, TrainConfig, load_config
from distill.distiller import Distiller
from distill.doctor.doctor import build_case, run_checks
from distill.evaluation.report import write_report
from distill.objective.divergences import DIVERGENCES, DivergenceKind, plain_kl
from distill.objective.features import FEATURES, FeatureKind
from distill.objective.numerics import expect
from distill.objective.terms import TERMS
from distill.objective.terms.term import SeenTerm, Term
from distill.objective.weighing import count
from distill.training.microbatch import Collator
from students.hearing import Connector
from students.student import build_student
from teachers.files.loading import load_salmonn
from teachers.lora import Lora

OPTIONS = TrainConfig(steps=3, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=1, trackers=())


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, teacher__online="true")
    return folder


def fit(toys, run_folder, loss: LossConfig, **changes) -> Distiller:
    student = build_student(load_salmonn(toys / "teacher"), str(toys / "parts" / "student-llm"), lora=Lora(rank=4),
                            connector=Connector("new"), quantization="none")  # fmt: skip
    run = Distiller(toys / "teacher", student, train=toys / "data" / "train", loss=loss,
                    options=dataclasses.replace(OPTIONS, **changes), run=run_folder)  # fmt: skip
    run.result = run.fit()
    return run


class StateSize(SeenTerm):
    """How large the states that enter the head are; one element a clip."""

    title = "Size of the states"
    weight = 0.5

    def rows(self, m):
        return torch.arange(len(m.batch.rows))

    def values(self, seen):
        size_S, row_S = seen.hidden_SD.square().mean(-1), seen.batch.row_S
        sums_B = size_S.new_zeros(len(seen.batch.rows)).index_add(0, row_S, size_S)
        return sums_B / row_S.bincount()


def test_a_toy_term_is_one_line_and_trains_under_a_schedule_in_log_curve_and_count(toys, tmp_path, monkeypatch):
    monkeypatch.setitem(TERMS, "size", StateSize())
    loss = LossConfig(ce=0, feature=0, schedules={"size": "linear 0"})
    runs = [fit(toys, tmp_path / str(size), loss, micro_batch_size=size) for size in (1, 4)]
    whole, cut = (run.result.metrics for run in runs)
    assert [record["size"] > 0 for record in whole] == [True, True, False], "it ends at 0"
    assert all(record["loss"] == record["kl"] + record["size"] for record in whole)
    assert [record["size"] for record in cut] == pytest.approx([record["size"] for record in whole], abs=1e-5)
    assert "Size of the states" in write_report(tmp_path / "4").read_text()
    samples = [tiny.make_sample(number) for number in range(3)]
    collate = Collator(runs[0].teacher, runs[0].student, torch.device("cpu"), torch.float32)
    assert count(runs[0].terms, collate(samples))["size"] == 3
    assert load_config(toys / "toy.yaml", ["loss.schedules.size=linear 0"]).loss.schedules == loss.schedules


def test_a_term_that_does_not_say_where_its_values_come_from_cannot_be_made():
    for kind, missing in ((Term, "is_of_head"), (SeenTerm, "values")):
        with pytest.raises(TypeError, match=rf"abstract method '?{missing}"):
            type("Mute", (kind,), {})()


def test_the_line_of_a_toy_term_is_needed(toys, tmp_path):
    with pytest.raises(ValueError, match=r"loss\.schedules names size, but the terms are ce, kl, feature"):
        fit(toys, tmp_path, LossConfig(schedules={"size": "linear 0"}))


def test_a_toy_divergence_is_one_line_for_config_training_and_doctor(toys, tmp_path, monkeypatch):
    def jeffreys(student, teacher, share):
        return share * expect(teacher, teacher - student) + (1 - share) * expect(student, student - teacher)

    def plain(q_SC, p_SC, share):
        return share * plain_kl(p_SC, q_SC) + (1 - share) * plain_kl(q_SC, p_SC)

    monkeypatch.setitem(DIVERGENCES, "jeffreys", DivergenceKind(jeffreys, plain, "share"))
    with pytest.raises(ValueError, match=r"jeffreys takes one strictly between 0 and 1 \(its share\)"):
        load_config(toys / "toy.yaml", ["loss.kl_kind=jeffreys"])
    config = load_config(toys / "toy.yaml", ["loss.kl_kind=jeffreys", "loss.kl_parameter=0.4"])
    assert fit(toys, tmp_path, config.loss).result.metrics[0]["kl"] > 0
    ((_, is_right, text),) = run_checks(build_case(config), ["fused = plain"])
    assert is_right, text


def test_a_toy_feature_distance_is_one_line_for_config_training_and_doctor(toys, tmp_path, monkeypatch):
    def l1(student_WQE, teacher_WQE):
        return (student_WQE - teacher_WQE.detach()).abs().flatten(1).mean(1)

    monkeypatch.setitem(FEATURES, "l1", FeatureKind(l1, lambda own, theirs: (own - theirs).abs().flatten(1).mean(1)))
    config = load_config(toys / "toy.yaml", ["loss.feature_kind=l1", "loss.hidden_kind=l1", "loss.hidden=1"])
    record = fit(toys, tmp_path, config.loss).result.metrics[0]
    assert record["feature"] > 0 and record["hidden"] > 0
    ((_, is_right, text),) = run_checks(build_case(config), ["fused = plain"])
    assert is_right and "feature" in text and "hidden" in text, text
