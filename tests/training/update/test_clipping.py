"""The limit of a gradient's norm: what it is made of, that it is saved, and that it clips."""

import json
import math

import numpy as np
import pytest

from distill.config import TrainConfig
from distill.config.rules import CHOICES
from distill.training.update.clipping import CLIPS, RunningClip
from distill.training.update.statistic import NUM_FIRST, RECENT, Statistic


def test_the_first_values_of_a_statistic_give_numpys_mean_and_deviation_and_later_ones_fade():
    values = np.random.default_rng(0).normal(5.0, 2.0, NUM_FIRST)
    statistic = Statistic()
    for value in values:
        assert not statistic.is_known
        statistic.add(float(value))
    assert statistic.is_known
    assert statistic.mean == pytest.approx(values.mean())
    assert statistic.above(3) == pytest.approx(values.mean() + 3 * values.std())
    before = statistic.mean
    statistic.add(9.0)
    assert statistic.mean == pytest.approx((1 - RECENT) * before + RECENT * 9.0)
    for _ in range(2000):
        statistic.add(1.0)
    assert (statistic.mean, statistic.above(9)) == pytest.approx((1.0, 1.0))


def test_a_running_limit_follows_the_norms_and_a_spike_hardly_moves_it():
    clip = RunningClip(TrainConfig(clip="running", clip_deviations=2.0, max_grad_norm=7.0))
    norms = [0.9, 1.1] * 20
    for number, norm in enumerate(norms):
        assert (clip.limit == 7.0) == (number < NUM_FIRST)  # until then the fixed one
        clip.add(norm)
    limit = clip.limit
    assert limit == pytest.approx(1.2, abs=0.01)  # deviation 0.1
    clip.add(1000.0)
    assert limit < clip.limit < limit + 0.02
    for _ in range(200):
        clip.add(0.1)
    assert clip.limit < 0.2


def test_every_kind_of_limit_may_be_named_in_a_config():
    assert CHOICES["train.clip"] == tuple(CLIPS)


def test_a_run_with_a_running_limit_is_clipped_by_it_and_goes_on_as_if_it_had_not_stopped(make_run, keys):
    options = {"clip": "running", "clip_deviations": 3.0, "max_grad_norm": 1e9, "spikes": keys[2]}
    whole = make_run("whole", **options).fit()
    norms, limits = ([record[name] for record in whole.metrics] for name in ("grad_norm", "grad_limit"))
    assert limits[:2] == [1e9, 1e9]
    assert limits[2] == pytest.approx(np.mean(norms[:2]) + 3.0 * np.std(norms[:2]))
    assert norms[2] > 10 * limits[2] and limits[3] < 2 * limits[2]  # the spike is cut off, and not taken for a norm
    fixed = make_run("fixed", **options | {"clip": "fixed", "clip_deviations": 2.5}).fit()
    assert whole.losses[:3] == fixed.losses[:3] and whole.losses[4] != fixed.losses[4]
    make_run("part", **options, stop_after=3).fit()
    again = make_run("part", **options).fit()
    assert again.losses == whole.losses
    assert [record["grad_limit"] for record in again.metrics] == limits


def test_a_run_with_the_fixed_limit_saves_nothing_more(make_run, tmp_path):
    run = make_run("run", steps=1)
    assert all(math.isfinite(record["grad_norm"]) and "grad_limit" not in record for record in run.fit().metrics)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state.keys() == {"step", "identity", "stream", "best", "weights"}


def test_a_run_does_not_go_on_with_another_limit_unless_that_is_allowed(make_run):
    make_run("run", steps=3, stop_after=1).fit()
    with pytest.raises(ValueError, match=r"train\.clip: fixed there, running here"):
        make_run("run", steps=3, clip="running")
    allowed = make_run("run", steps=3, clip="running", allow_change=["train.clip"])
    assert len(allowed.fit().losses) == 3
