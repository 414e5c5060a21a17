"""The run's log files: lines and TensorBoard events say the same."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.runlog import EVENTS, METRICS, VALIDATION, RunLog


def read_events(folder, tag):
    events = EventAccumulator(str(folder / EVENTS))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_events_hold_what_the_lines_hold(tmp_path):
    with RunLog(tmp_path, 0, is_main=True) as log:
        log.step({"step": 1, "loss": 2.5})
        log.step({"step": 2, "loss": 1.5})
        log.validation(2, 0.25, {"asr": 0.25})
    assert [json.loads(line)["loss"] for line in (tmp_path / METRICS).read_text().splitlines()] == [2.5, 1.5]
    assert json.loads((tmp_path / VALIDATION).read_text()) == {"step": 2, "error": 0.25, "asr": 0.25}
    assert read_events(tmp_path, "train/loss") == [(1, 2.5), (2, 1.5)]
    assert read_events(tmp_path, "valid/asr") == [(2, 0.25)]


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    with RunLog(tmp_path, 0, is_main=True) as log:
        for step in (1, 2, 3):
            log.step({"step": step, "loss": 9.0})
    with RunLog(tmp_path, 1, is_main=True) as log:
        log.step({"step": 2, "loss": 1.0})
    assert read_events(tmp_path, "train/loss") == [(1, 9.0), (2, 1.0)]


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path, 0, is_main=False) as log:
        log.step({"step": 1, "loss": 2.5})
    assert list(tmp_path.iterdir()) == []
