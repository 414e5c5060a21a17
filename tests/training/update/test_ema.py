"""The average of what is trained: its value, that training does not feel it, and that it becomes the student."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill.distiller import Distiller
from distill.training.update import update
from distill.training.update.ema import Ema
from distill.training.update.spikes import BadSteps
from teachers.files.loading import own_tensors

WHOLE = {"ema": 0.5, "save_every": 1, "keep": 9}


def weights(run: Distiller) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in own_tensors(run.student).items()}


def assert_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def test_an_average_begins_with_a_low_decay_and_fades_as_its_formula_says():
    named = {"w": nn.Parameter(torch.zeros(3))}
    ema = Ema(named, decay=0.3)
    expected = 0.0
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):
        named["w"].data.fill_(step + 1.0)
        ema.add(step)
        expected = decay * expected + (1 - decay) * (step + 1)
        torch.testing.assert_close(ema.average["w"], torch.full((3,), expected))
    with ema.worn():
        torch.testing.assert_close(named["w"].data, torch.full((3,), expected))
    assert named["w"].tolist() == [5.0] * 3


def test_a_run_trains_bit_by_bit_as_without_and_its_student_is_the_average_of_its_weights(make_run, tmp_path):
    run, plain = make_run("run", **WHOLE), make_run("plain", save_every=1, keep=9)
    start = weights(run)
    assert run.fit().losses == plain.fit().losses
    saved = [load_file(tmp_path / "plain" / "checkpoints" / f"step-{step:06d}" / "trainable.safetensors")
             for step in range(1, 7)]  # fmt: skip
    for name, tensor in weights(run).items():
        for step, there in enumerate(saved):
            decay = min(0.5, (1 + step) / (10 + step))
            start[name] = decay * start[name] + (1 - decay) * there[name]
        torch.testing.assert_close(tensor, start[name])
    assert any(not torch.equal(tensor, saved[-1][name]) for name, tensor in weights(run).items())


def test_a_resumed_run_has_the_average_of_the_uninterrupted_one(make_run):
    whole = make_run("whole", **WHOLE)
    whole.fit()
    make_run("part", **WHOLE, stop_after=3).fit()
    again = make_run("part", **WHOLE)
    again.fit()
    assert_equal(weights(again), weights(whole))
    other = make_run("part", **WHOLE)
    assert other.fit().steps == 6  # nothing is trained again
    assert_equal(weights(other), weights(whole))


def test_validation_hears_the_average_and_the_best_one_becomes_the_student(make_run, toys, tmp_path, monkeypatch):
    heard, qualities = [], iter([0.1, 0.9, 0.5, 0.2, 0.2, 0.2])
    validate = Distiller._validate

    def note_and_validate(self, step):
        with self.update.averaged():
            heard.append(weights(self))
        self.quality = next(qualities)
        validate(self, step)

    monkeypatch.setattr(Distiller, "_validate", note_and_validate)
    run = make_run("run", valid=toys / "data" / "train", metrics={"asr": lambda prediction: run.quality},
                   **WHOLE, eval_every=1)  # fmt: skip
    result = run.fit()
    assert result.best_step == 2
    assert_equal(weights(run), heard[1])
    assert any(not torch.equal(tensor, heard[2][name]) for name, tensor in weights(run).items())
    assert run.fit().losses == result.losses  # the same object, whose student is an average now
    assert_equal(weights(run), heard[1])


def test_a_step_that_is_left_out_is_no_part_of_the_average(make_run, monkeypatch):
    once = make_run("once", ema=0.5, steps=1)
    before = weights(once)
    once.fit()
    faults = iter([None, *[update.Fault("loss", 9.0, "is left out")] * 2])
    monkeypatch.setattr(BadSteps, "find_fault", lambda self, loss, norm: next(faults))
    run = make_run("run", ema=0.5, steps=3, max_bad_steps=9)
    run.fit()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(run).items())
    assert_equal(weights(run), weights(once))  # or the average has come nearer to the last weights


def test_an_average_that_is_asked_for_later_begins_with_the_weights_of_then(make_run, tmp_path):
    make_run("run", stop_after=3).fit()
    with pytest.raises(ValueError, match=r"train\.ema: 0\.0 there, 0\.5 here"):
        make_run("run", ema=0.5)
    run = make_run("run", ema=0.5, allow_change=["train.ema"], stop_after=3)
    run._prepare()
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "trainable.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in run.update.ema.average.items())
