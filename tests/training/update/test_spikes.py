"""Steps that are left out: which are, what becomes of the run, and that an interrupted one knows it."""

import pytest
import torch

from distill.config import TrainConfig
from distill.training.update.spikes import BadSteps, BadStepsError
from teachers.files.loading import own_tensors

NAN = float("nan")


def test_bad_steps_name_the_samples_of_every_rank():
    told = []
    steps = BadSteps(TrainConfig(max_bad_steps=2), told.append)
    assert not steps.note(7, steps.find_fault(NAN, 1.0), lambda: ["a", "b"])
    assert not steps.note(8, steps.find_fault(1.0, 1.0), lambda: pytest.fail("a good step needs no keys"))
    steps.note(9, steps.find_fault(1.0, float("inf")), lambda: ["a", "b"])
    with pytest.raises(
        BadStepsError, match=r"loss is nan for 2 steps in a row, .* look at samples k0, .*k7 and 4 more"
    ):
        steps.note(10, steps.find_fault(NAN, 1.0), lambda: [f"k{number}" for number in range(12)])
    assert told[:2] == ["step 7 is skipped: loss nan, keys a, b", "step 9 is skipped: grad_norm inf, keys a, b"]
    assert steps.counts == {"skipped": 3, "returns": 0}


@pytest.mark.parametrize(("loss", "norm", "name"), [(9.0, 1.0, "loss"), (2.0, 9.0, "grad_norm"), (2.0, 1.0, None)])
def test_a_spike_is_a_loss_or_a_norm_far_above_the_steps_before(loss, norm, name):
    steps = BadSteps(TrainConfig(spike_deviations=4.0), print)
    for number in range(40):
        assert steps.find_fault(2.0 + 0.1 * (number % 2), 1.0 + 0.1 * (number % 3)) is None
    known = steps.state_dict()
    fault = steps.find_fault(loss, norm)
    assert (fault and fault.name) == name
    assert (steps.state_dict() == known) == (fault is not None)  # a spike is no part of the statistic
    assert BadSteps(TrainConfig(), print).find_fault(1e9, 1e9) is None  # nothing is known yet, and none is asked for


def test_a_step_with_a_loss_that_is_not_finite_changes_no_weight_though_its_gradient_is(make_run, keys, monkeypatch):
    run = make_run("run", steps=1)
    find_fault = BadSteps.find_fault
    monkeypatch.setattr(BadSteps, "find_fault", lambda self, loss, norm: find_fault(self, float("inf"), norm))
    before = {name: tensor.clone() for name, tensor in own_tensors(run.student).items()}
    (record,) = run.fit().metrics
    assert record["skipped"] == 1 and record["grad_norm"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in own_tensors(run.student).items())


def test_a_run_that_skips_a_spike_and_is_interrupted_goes_on_as_if_it_had_not_been(make_run, keys, capsys):
    options = {"spikes": keys[2], "spike_deviations": 5.0, "max_bad_steps": 9}
    whole = make_run("whole", **options).fit()
    assert f"step 3 is skipped: loss {whole.losses[2]:.6g}, which is a spike above " in capsys.readouterr().err
    assert whole.metrics[1].keys() & {"skipped"} == set() and whole.metrics[2]["skipped"] == 1
    assert whole.losses[:3] == make_run("without", **options | {"spike_deviations": 0.0}, steps=3).fit().losses
    for stop in (3, 4):
        make_run(f"part {stop}", **options, stop_after=stop).fit()
        again = make_run(f"part {stop}", **options).fit()
        assert again.losses == whole.losses
        assert [r.get("skipped") for r in again.metrics] == [r.get("skipped") for r in whole.metrics]


def test_a_run_goes_back_to_its_last_good_checkpoint_and_on_with_other_clips(make_run, twice, tmp_path, capsys):
    options = {"spikes": twice, "spike_deviations": 5.0, "max_bad_steps": 2, "save_every": 1, "keep": 9}
    with pytest.raises(
        BadStepsError, match=r"for 2 steps in a row, but is a spike above .* train\.max_returns above 0"
    ):
        make_run("ends", **options).fit()
    result = make_run("returns", **options, max_returns=1, steps=5).fit()
    assert "goes back to step 2, and on with the clips that come next" in capsys.readouterr().err
    assert [record.get("returns", 0) for record in result.metrics] == [0, 0, 1, 1, 1]
    skips = make_run("skips", **options | {"max_bad_steps": 9}).fit()
    assert result.losses[:2] == skips.losses[:2]
    assert result.losses[2] == skips.losses[4]  # the same weights, on the clips of the fifth batch
    assert sorted(path.name[-1] for path in (tmp_path / "returns" / "checkpoints").iterdir()) == list("12345")


@pytest.mark.parametrize("kill_at", ["going back", "the step after"])
def test_a_run_that_dies_while_it_goes_back_goes_back_again(make_run, twice, tmp_path, monkeypatch, kill_at):
    options = {"spikes": twice, "spike_deviations": 5.0, "max_bad_steps": 2, "save_every": 2,
               "max_returns": 1, "steps": 5}  # fmt: skip
    whole = make_run("whole", **options).fit()
    run = make_run("part", **options)
    name, real = ("_go_back", None) if kill_at == "going back" else ("_step", type(run)._step)

    def die(self, *step_and_batches):
        if real is None or self.update.bad_steps.returns:
            raise KeyboardInterrupt
        return real(self, *step_and_batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(run), name, die)
        run.fit()
    again = make_run("part", **options).fit()
    assert again.losses == whole.losses
    assert [r.get("skipped") for r in again.metrics] == [r.get("skipped") for r in whole.metrics]


def test_a_run_without_a_good_checkpoint_cannot_go_back(make_run, keys):
    with pytest.raises(BadStepsError, match=r"max_returns is 1, but .*checkpoints holds no good checkpoint to go back"):
        make_run("run", spikes=keys[0] + keys[1], factor=NAN, max_bad_steps=2, max_returns=1, save_every=1).fit()
