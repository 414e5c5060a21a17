"""A run that validation has long found nothing better in: when it ends, with which weights, and that it knows it."""

import dataclasses
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from distill.config import EvalConfig, TrainConfig
from distill.distiller import Distiller, Own
from distill.evaluation.validation import Best
from shards.packing.pack import pack
from students.student import build_student
from teachers.files.loading import load_salmonn, own_tensors
from teachers.lora import Lora

OPTIONS = TrainConfig(steps=6, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=0, save_every=100,
                      eval_every=1, early_stop=2, trackers=())  # fmt: skip
HALF = {"asr": lambda prediction: 0.5}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    return folder


def make_run(toys, run_folder, valid="train", quality=HALF, **changes) -> Distiller:
    """A run whose answers are as good as `quality` says by task: by default none is better than the first."""
    student = build_student(load_salmonn(toys / "teacher"), str(toys / "parts" / "student-llm"), lora=Lora(rank=4),
                            quantization="none")  # fmt: skip
    return Distiller(None, student, train=toys / "data" / "train", valid=valid and toys / "data" / valid,
                     options=dataclasses.replace(OPTIONS, **changes), answers=EvalConfig(max_new_tokens=1),
                     run=run_folder, own=Own(metrics=quality))  # fmt: skip


def test_a_run_ends_when_validations_in_a_row_are_not_better_and_keeps_the_best_weights(toys, tmp_path, capsys):
    run = make_run(toys, tmp_path)
    result = run.fit()
    assert (result.steps, result.best_step, result.preempted, len(result.losses)) == (3, 1, False, 3)
    assert "ends after step 3: 2 validations in a row were not better than that of step 1" in capsys.readouterr().err
    best = load_file(tmp_path / "checkpoints" / "step-000001" / "trainable.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in own_tensors(run.student).items())


def test_an_ended_run_is_done_and_one_with_more_patience_goes_on_as_if_it_had_not_ended(toys, tmp_path):
    first = make_run(toys, tmp_path / "ended").fit()
    assert make_run(toys, tmp_path / "ended").fit().losses == first.losses  # nothing is trained again
    longer = make_run(toys, tmp_path / "ended", early_stop=4).fit()
    assert longer.steps == 5
    assert longer.losses == make_run(toys, tmp_path / "whole", early_stop=0).fit().losses[:5]


def test_a_run_that_was_interrupted_ends_at_the_step_where_the_uninterrupted_one_does(toys, tmp_path):
    make_run(toys, tmp_path, stop_after=2).fit()
    assert make_run(toys, tmp_path).fit().steps == 3


def test_patience_counts_validations_and_not_steps():
    best = Best(step=30, error=0.5)
    assert [best.is_stale(step, every=10, patience=2) for step in (30, 40, 49, 50, 60)] == [False] * 3 + [True] * 2
    assert not best.is_stale(1000, every=10, patience=0)
    assert not Best().is_stale(1000, every=10, patience=2)


@pytest.mark.parametrize(("best_metric", "error"), [("mean", 0.7), ("audiocaption", 0.9)])
def test_the_named_task_alone_chooses_the_best_step(toys, tmp_path, best_metric, error):
    rows = [{"path": str(toys / "data" / "audio" / "train-000.wav"), "text": "one", "task": task}
            for task in ("asr", "audiocaption")]  # fmt: skip
    (tmp_path / "valid.json").write_text(json.dumps({"annotation": rows}))
    pack(tmp_path / "valid.json", tmp_path / "valid", workers=1)
    quality = {"asr": lambda prediction: 0.5, "audiocaption": lambda prediction: 0.1}
    run = make_run(toys, tmp_path, tmp_path / "valid", quality, best_metric=best_metric, steps=1)
    run.fit()
    (line,) = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert json.loads(line)["error"] == pytest.approx(error)


def test_a_task_that_is_not_validated_or_was_not_chosen_by_is_refused(toys, tmp_path):
    with pytest.raises(
        ValueError, match=r"best_metric is 'QA', but valid is .* with answers to asr; name one of these"
    ):
        make_run(toys, tmp_path, best_metric="QA")
    make_run(toys, tmp_path, best_metric="asr", steps=1).fit()
    with pytest.raises(ValueError, match=r"best_metric: asr there, mean here"):
        make_run(toys, tmp_path)


def test_a_stop_that_no_validation_could_cause_is_refused(toys, tmp_path):
    with pytest.raises(ValueError, match=r"train\.early_stop is 2, but there is no validation split; pack one"):
        make_run(toys, tmp_path, valid=None)
    with pytest.raises(ValueError, match=r"early_stop is 2, but train\.eval_every is 0 and validates at the end alone"):
        dataclasses.replace(OPTIONS, eval_every=0)
