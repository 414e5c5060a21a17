"""Products in fp16: what is scaled and what becomes of an overflow. What a card without bf16 does waits for one."""

import json

import pytest
import torch

from distill.training import ranks
from distill.training.ranks import resolve_precision
from distill.training.update import scaling
from distill.training.update.scaling import LossScale

FP16 = {"precision": "fp16", "steps": 5}


def test_a_gradient_below_fp16_survives_and_has_its_true_value_again():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scale = LossScale(torch.device("cpu"), torch.float16)
    (1e-9 * weight.half().sum()).backward()  # a gradient of 1e-9 is 0 in fp16
    assert weight.grad.abs().max() == 0
    scale.scale(1e-9 * weight.half().float().sum()).backward()
    scale.unscale_(optimizer)
    torch.testing.assert_close(weight.grad, torch.full((4,), 1e-9), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_products_are_not_scaled(dtype):
    scale = LossScale(torch.device("cpu"), dtype)
    loss = torch.tensor(0.3, requires_grad=True)
    assert scale.scale(loss) is loss
    assert scale.find_fault(1.0, float("inf")) is None
    assert scale.state_dict() == {}


def test_an_fp16_run_goes_on_as_if_it_had_not_stopped_and_follows_the_float32_one(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "FIRST", 2.0**10)
    whole = make_run("whole", **FP16).fit()
    assert whole.losses == pytest.approx(make_run("exact", steps=5).fit().losses, rel=1e-2)
    make_run("part", **FP16, stop_after=3).fit()
    state = json.loads((tmp_path / "part" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["update"]["loss_scale"]["_growth_tracker"] == 3
    assert make_run("part", **FP16).fit().losses == whole.losses


def test_a_gradient_that_overflows_halves_the_scale_and_ends_no_run(make_run, keys, capsys):
    options = FP16 | {"spikes": keys[0], "factor": 1e3, "max_bad_steps": 1}
    run = make_run("whole", **options)
    result = run.fit()
    said = capsys.readouterr().err
    assert (
        "step 1 is skipped: grad_norm " in said
        and "overflows fp16 at a loss scale of 65536; half of it is next" in said
    )
    assert run.update.loss_scale.scaler.get_scale() < 65536
    skipped = [record.get("skipped", 0) for record in result.metrics]
    assert skipped[0] == 1 and skipped[-1] < 5
    make_run("part", **options, stop_after=1).fit()
    assert make_run("part", **options).fit().losses == result.losses


def test_a_gradient_that_is_not_finite_at_a_scale_of_one_is_a_bad_step():
    scale = LossScale(torch.device("cpu"), torch.float16)
    scale.load_state_dict(scale.state_dict() | {"scale": 1.0})
    assert scale.find_fault(1.0, float("inf")) is None  # so that whoever counts bad steps judges it
    scale.load_state_dict(scale.state_dict() | {"scale": 2.0})
    assert not scale.find_fault(1.0, float("inf")).is_bad
    assert scale.find_fault(float("nan"), float("inf")) is None and scale.find_fault(1.0, 1.0) is None


@pytest.mark.parametrize(("cuda", "bf16", "dtype"), [
    (False, False, torch.float32), (True, True, torch.bfloat16), (True, False, torch.float16),
])  # fmt: skip
def test_auto_asks_the_card(monkeypatch, cuda, bf16, dtype):
    monkeypatch.setattr(ranks.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(ranks, "has_bf16", lambda: bf16)
    assert resolve_precision("auto") == dtype


@pytest.mark.gpu
def test_an_fp16_run_on_a_gpu_follows_the_bf16_one(make_run):
    result = make_run("fp16", **FP16).fit()
    assert result.losses == pytest.approx(make_run("bf16", steps=5, precision="bf16").fit().losses, rel=5e-2)
