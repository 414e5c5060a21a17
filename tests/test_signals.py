"""A training process that is asked to stop, or killed, in the middle: what it leaves, and what goes on from there."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import tiny
from accelerate.state import AcceleratorState

from distill import stopping
from distill.cache import cache
from distill.checkpoint import find_checkpoint
from distill.config import Config, load_config
from distill.run import run
from distill.runlog import RunLog
from distill.stopping import StopRequest

NUM_STEPS = 16  # that are compared, of a run that is to have many more


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Processes are forked here, which a GPU in use would not survive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Parts, a teacher, shards, cached targets, and a run `whole` that nothing interrupted."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_parts(folder / "parts")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    tiny.make_shards(folder / "data")
    tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts", train__steps=1000,
                      precision="float32", student__quantization="none")  # fmt: skip
    cache(configure(folder, "whole"))
    assert run(configure(folder, "whole", f"train.stop_after={NUM_STEPS}")) == 143
    return folder


def configure(toys: Path, name: str, *words: str) -> Config:
    return load_config(toys / "toy.yaml", [f"name={name}", *words])


def losses(toys: Path, name: str) -> list[float]:
    """The loss of every step; of a step that was done again, the last one."""
    lines = (toys / "runs" / name / "metrics.jsonl").read_text().splitlines()
    found = {record["step"]: record["loss"] for record in map(json.loads, lines)}
    assert list(found) == list(range(1, NUM_STEPS + 1))
    return list(found.values())


def train(config: Config, lines) -> None:
    """A training process that also says when a step's line is in metrics.jsonl."""
    write = RunLog.step

    def step(self, record: dict) -> None:
        write(self, record)
        lines.send(record["step"])

    RunLog.step = step
    sys.exit(run(config))


def interrupt(config: Config, number: int, after_step: int) -> int:
    """Send a signal to a training process when it has done so many steps; returns its exit code."""
    context = multiprocessing.get_context("fork")
    lines, end = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(config, end))
    process.start()
    try:
        while True:
            assert lines.poll(60)
            if lines.recv() == after_step:
                break
        os.kill(process.pid, number)
        process.join(60)
        return process.exitcode
    finally:
        process.kill()
        process.join()


def test_signals_at_once_are_one_request_and_a_later_one_ends_the_process(monkeypatch):
    with StopRequest() as stop:
        assert not stop
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # of the queue, of a launcher, of the terminal
            signal.raise_signal(number)
        assert stop
        monkeypatch.setattr(stopping, "SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_ends_training_with_a_checkpoint_that_the_same_command_goes_on_from(toys):
    config = configure(toys, "stopped", "train.save_every=500")
    assert interrupt(config, signal.SIGTERM, after_step=2) == 143
    assert 2 <= find_checkpoint(config.run_folder / "checkpoints", print).step < NUM_STEPS
    assert run(configure(toys, "stopped", "train.save_every=500", f"train.stop_after={NUM_STEPS}")) == 143
    assert losses(toys, "stopped") == losses(toys, "whole")


def test_kill_9_costs_only_the_steps_since_the_last_checkpoint(toys):
    config = configure(toys, "killed", "train.save_every=3")
    assert interrupt(config, signal.SIGKILL, after_step=5) == -signal.SIGKILL
    assert 3 <= find_checkpoint(config.run_folder / "checkpoints", print).step < NUM_STEPS
    assert run(configure(toys, "killed", "train.save_every=3", f"train.stop_after={NUM_STEPS}")) == 143
    assert losses(toys, "killed") == losses(toys, "whole")
