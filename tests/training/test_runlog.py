"""The run's log files and trackers say the same, and are read again as a table."""

import json
import os

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from distill.config import load_config
from distill.run import run
from distill.training.monitoring.runlog import METRICS, VALIDATION, RunLog, read_table
from distill.training.monitoring.trackers import TENSORBOARD, TRACKERS, Trackers, check_trackers


@pytest.fixture(autouse=True)
def first_numbers(monkeypatch):
    """Files of one process and second are read by their numbers' letters, 10 before 9; a run has its own process."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def read_events(folder, tag):
    events = EventAccumulator(str(folder / TENSORBOARD))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def follow(folder, start, steps, loss, names=(TENSORBOARD,)):
    """Tell a log and trackers of some steps."""
    said = []
    logs = RunLog(folder), Trackers(names, folder, lambda: {"loss": {"kl": 1.0}}, said.append)
    for log in logs:
        log.on_start(None, start)
        for step in steps:
            log.on_step(None, {"step": step, "loss": loss})
        log.on_validation(None, steps[-1], 0.25, {"asr": 0.25})
    logs[1].on_close(None)
    return said


def test_trackers_hold_what_the_lines_hold(tmp_path):
    assert follow(tmp_path, 0, [1, 2], 2.5) == []
    assert [json.loads(line)["loss"] for line in (tmp_path / METRICS).read_text().splitlines()] == [2.5, 2.5]
    assert json.loads((tmp_path / VALIDATION).read_text()) == {"step": 2, "error": 0.25, "asr": 0.25}
    assert read_events(tmp_path, "train/loss") == [(1, 2.5), (2, 2.5)]
    assert read_events(tmp_path, "valid/asr") == [(2, 0.25)]


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    follow(tmp_path, 0, [1, 2, 3], 9.0)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 4, "lo')  # of a process that was killed
    follow(tmp_path, 1, [2], 1.0)
    assert read_events(tmp_path, "train/loss") == [(1, 9.0), (2, 1.0)]
    table = read_table(tmp_path, 2)
    assert table == [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 1.0, "valid/error": 0.25, "valid/asr": 0.25}]


def test_a_tracker_that_fails_is_left_off_and_named_without_its_secret(tmp_path, monkeypatch):
    secret = "hf" + "_" + "a" * 24

    class Failing(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "trackio", False, None

        def __init__(self, run_name):
            super().__init__()

        def log(self, values, step=None, **kwargs):
            raise ConnectionError(f"no way to the server with {secret}")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Failing)
    monkeypatch.setitem(TRACKERS, "trackio", "json")  # a package that is here
    said = follow(tmp_path, 0, [1, 2], 2.5, ("trackio", TENSORBOARD))
    assert (
        len(said) == 1
        and said[0].startswith("tracker trackio failed (ConnectionError: no way")
        and "aaa" not in said[0]
    )
    assert read_events(tmp_path, "train/loss") == [(1, 2.5), (2, 2.5)]


def test_a_tracker_whose_package_is_not_here_is_refused_with_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(TRACKERS, "mlflow", "a_package_that_is_nowhere")
    with pytest.raises(
        ValueError, match=r"train\.trackers names mlflow, but .* run `pip install a_package_that_is_now"
    ):
        check_trackers(["mlflow"])
    monkeypatch.setattr("distill.run.load_teacher", lambda *_, **__: pytest.fail("a teacher was loaded"))
    with pytest.raises(ValueError, match=r"train\.trackers names mlflow"):
        run(load_config("demo", [f"runs={tmp_path}", "train.trackers=[mlflow]"]))


def test_the_rules_know_accelerates_trackers():
    assert set(TRACKERS) == set(tracking.LOGGER_TYPE_TO_CLASS)


def test_mlflow_writes_into_each_runs_own_folder_unless_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("a", "b"):
        Trackers((), tmp_path / name, dict, print)._stay_here("mlflow")
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/{name}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ours")
    Trackers((), tmp_path / "c", dict, print)._stay_here("mlflow")
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://ours"
