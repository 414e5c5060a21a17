"""A student beside its teacher, token by token."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from distill.config import EvalConfig
from distill.evaluation import agreement
from distill.evaluation.agreement import (
    calibration_error,
    compare_predictions,
    measure_agreement,
    predict_answers,
)
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from shards.targets.distributions import Sparse
from students.student import build_student
from teachers.files.loading import load_salmonn
from teachers.lora import Lora


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    tiny.make_shards(folder / "data", split="test", num_samples=5)
    return folder


@pytest.fixture(scope="module")
def models(toys):
    teacher = load_salmonn(toys / "teacher").eval()
    student = build_student(teacher, str(toys / "parts" / "student-llm"), lora=Lora(rank=4), quantization="none")
    return teacher, student.eval()


def plain_logprobs(model, toys):
    """Log-probabilities and labels of every clip, one at a time, through the model's own forward."""
    logprobs, labels = [], []
    for samples in ShardStream(toys / "data" / "test", Order(batch_size=1, shuffle=False, epochs=1)):
        batch = model.collate(samples, first_prompt=True)
        with torch.no_grad():
            logprobs.append(model(batch)[0].double().log_softmax(-1).numpy())
        labels.append(batch.labels_S.numpy())
    return np.concatenate(logprobs), np.concatenate(labels)


def plain_ece(logprobs_SV, labels_S):
    confidence_S, right_S = np.exp(logprobs_SV.max(1)), logprobs_SV.argmax(1) == labels_S
    total = 0.0
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15):
        inside = (confidence_S > low) & (confidence_S <= high)
        if inside.any():
            total += inside.mean() * abs(right_S[inside].mean() - confidence_S[inside].mean())
    return total


def test_agreement_is_what_its_definitions_give_on_whole_distributions(toys, models, monkeypatch):
    (theirs_SV, labels_S), (ours_SV, _) = (plain_logprobs(model, toys) for model in models)
    dense_kl = (np.exp(theirs_SV) * (theirs_SV - ours_SV)).sum(1).mean()
    assert 0 < measure_agreement(*models, toys / "data" / "test").kl < dense_kl  # of 64 tokens and the others as one
    monkeypatch.setattr(agreement, "KEPT", theirs_SV.shape[1])
    found = measure_agreement(*models, toys / "data" / "test", EvalConfig(batch_size=2))
    assert found.num_positions == len(labels_S)
    assert found.top1 == (theirs_SV.argmax(1) == ours_SV.argmax(1)).mean()
    assert found.kl == pytest.approx(dense_kl, rel=1e-5)
    assert found.teacher_ece == pytest.approx(plain_ece(theirs_SV, labels_S), abs=1e-6)
    assert found.student_ece == pytest.approx(plain_ece(ours_SV, labels_S), abs=1e-6)


def test_a_model_agrees_with_itself(toys, models):
    found = measure_agreement(models[0], models[0], toys / "data" / "test")
    assert found.top1 == 1 and abs(found.kl) < 1e-6 and found.teacher_ece == found.student_ece


def test_of_models_with_other_tokens_only_calibration_is_told(toys, models):
    theirs = predict_answers(models[0], toys / "data" / "test", EvalConfig())
    others = replace(theirs, vocabulary="another vocabulary")
    of_student = predict_answers(models[1], toys / "data" / "test", EvalConfig(), others)
    found = compare_predictions(others, of_student)
    assert found.top1 is None and found.kl is None and found.student_ece > 0


def test_the_same_tokens_cut_otherwise_are_not_compared(toys, models):
    theirs = predict_answers(models[0], toys / "data" / "test", EvalConfig())
    cut = replace(theirs, labels_S=theirs.labels_S.flip(0))
    assert predict_answers(models[1], toys / "data" / "test", EvalConfig(), cut).divergence_S is None


@pytest.mark.parametrize(
    "confidence, is_right, error",
    [
        ([1.0, 1.0], [True, True], 0.0),  # sure and right
        ([1.0, 1.0], [True, False], 0.5),  # as sure as wrong
        ([0.9, 0.1], [True, False], 0.1),  # two bins, each off by a tenth
        ([1 / 15, 1 / 15], [False, True], 0.5 - 1 / 15),  # a bin's upper end is in it
    ],
)
def test_calibration_error_is_the_gap_between_confidence_and_the_share_of_right_ones(confidence, is_right, error):
    assert calibration_error(np.array(confidence), np.array(is_right)) == pytest.approx(error)


def test_sparse_predictions_hold_the_whole_mass(toys, models):
    sparse = predict_answers(models[0], toys / "data" / "test", EvalConfig()).sparse
    assert isinstance(sparse, Sparse)
    mass_S = sparse.logprobs_SK.double().exp().sum(1) + sparse.log_residual_S.double().exp()
    torch.testing.assert_close(mass_S, torch.ones_like(mass_S), atol=1e-6, rtol=0)
