"""Loss-weight schedules at their corners."""

import pytest

from distill.objective.schedule import Schedule, sample_weight


def weights(schedule: Schedule) -> list[float]:
    return [schedule.weight(step) for step in range(schedule.num_steps)]


def test_a_constant_weight_never_moves():
    assert weights(Schedule("constant", 0.7, 0.1, 0, 4)) == [0.7] * 4


def test_a_linear_weight_moves_by_equal_steps_and_ends_at_its_end():
    assert weights(Schedule("linear", 1.0, 0.0, 0, 5)) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_a_cosine_weight_is_half_way_in_the_middle_and_flat_at_the_ends():
    values = weights(Schedule("cosine", 0.0, 2.0, 0, 101))
    assert (values[0], values[50], values[100]) == pytest.approx((0, 1, 2))
    assert values[1] - values[0] < 0.001 and values[100] - values[99] < 0.001


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_warm_up_climbs_by_equal_steps_to_the_start(kind):
    values = weights(Schedule(kind, 0.8, 0.4, 3, 10))
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values[-1] == pytest.approx(0.8 if kind == "constant" else 0.4)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps, num_steps", [(0, 0), (0, 1), (1, 1), (5, 5)])
def test_a_run_of_no_or_one_step_has_a_weight(kind, warmup_steps, num_steps):
    schedule = Schedule(kind, 1.0, 0.5, warmup_steps, num_steps)
    assert all(0 < schedule.weight(step) <= 1 for step in range(num_steps + 2))


def test_the_weight_stays_at_its_end_after_the_run():
    assert Schedule("linear", 1.0, 0.25, 2, 10).weight(1000) == 0.25


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("step", 1.0, 0.0, 0, 5), "schedule is 'step'"),
        (("linear", -1.0, 0.0, 0, 5), "start is -1.0"),
        (("linear", 1.0, float("nan"), 0, 5), "end is nan"),
        (("linear", 1.0, 0.0, 6, 5), "warmup_steps is 6"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_a_sample_counts_its_task_times_its_own_weight():
    assert sample_weight("asr", {"asr": 0.5}, 0.25) == 0.125
    assert sample_weight("aac", {"asr": 0.5}) == 1.0
    with pytest.raises(ValueError, match=r"weight of a sample of task asr is -0\.5"):
        sample_weight("asr", {"asr": 0.5}, -1.0)
