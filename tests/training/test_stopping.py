"""What ends a training process before its last step: signals, time, a hang, bad steps; and what goes on from there."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from distill.cache import cache
from distill.config import Config, EvalConfig, TrainConfig, load_config
from distill.distiller import Distiller
from distill.run import run
from distill.training import runlock, stopping
from distill.training.checkpoint import find_checkpoint
from distill.training.ranks import build_accelerator
from distill.training.runlock import make_run_folder
from distill.training.stopping import HangWatch, StopRequest, warn_of_slow_save
from distill.training.zero import describe_build_locks, report_build_locks
from students.hearing import Connector
from students.student import build_student
from teachers.files.loading import load_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher

NUM_STEPS = 16  # that are compared, of a run that is to have many more


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Parts, a teacher, shards, cached targets, and a run `whole` that nothing interrupted."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, train__steps=1000, precision="float32", student__quantization="none")
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
    """A training process, of any rank, that also says when a step is logged."""
    log = Distiller._after

    def after(self, step: int, record: dict) -> None:
        log(self, step, record)
        lines.send(step)

    Distiller._after = after
    sys.exit(run(config))


def interrupt(config: Config, number: int, after_step: int, meanwhile=lambda: None) -> int:
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
        meanwhile()
        os.kill(process.pid, number)
        process.join(60)
        return process.exitcode
    finally:
        process.kill()
        process.join()


def test_signals_at_once_are_one_request_and_a_later_one_ends_the_process(monkeypatch):
    with StopRequest() as stop:
        assert not stop
        # of the queue with minutes to go, of it at the end, of a launcher, of the terminal
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.raise_signal(number)
        assert stop
        monkeypatch.setattr(stopping, "SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_signal_that_nohup_ignores_stops_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_signal_ends_training_with_a_checkpoint_that_the_same_command_goes_on_from(toys):
    config = configure(toys, "stopped", "train.save_every=500")
    assert interrupt(config, signal.SIGUSR1, after_step=2) == 143
    assert 2 <= find_checkpoint(config.run_folder / "checkpoints", print).step < NUM_STEPS
    assert run(configure(toys, "stopped", "train.save_every=500", f"train.stop_after={NUM_STEPS}")) == 143
    assert losses(toys, "stopped") == losses(toys, "whole")


def test_kill_9_costs_only_the_steps_since_the_last_checkpoint(toys, monkeypatch):
    config = configure(toys, "killed", "train.save_every=3")
    monkeypatch.setattr(runlock, "PATIENCE_SECONDS", 0.0)

    def start_another_job() -> None:
        with pytest.raises(FileExistsError, match=r"runs/killed is in use by .* \(process \d+ on .*, since "):
            run(configure(toys, "killed", "loss.kl=0.5"))

    assert interrupt(config, signal.SIGKILL, after_step=5, meanwhile=start_another_job) == -signal.SIGKILL
    assert 3 <= find_checkpoint(config.run_folder / "checkpoints", print).step < NUM_STEPS
    assert run(configure(toys, "killed", "train.save_every=3", f"train.stop_after={NUM_STEPS}")) == 143
    assert losses(toys, "killed") == losses(toys, "whole")


def train_as_rank(rank: int, port: int, config: Config, lines) -> None:
    """What a launcher starts twice; the imports are already done here."""
    tiny.become_rank(rank, port)
    train(config, lines)


def test_sigterm_to_one_of_two_ranks_stops_both_after_one_step_and_one_process_goes_on(toys):
    config = configure(toys, "ranks", "train.save_every=500")
    port = tiny.free_port()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [context.Process(target=train_as_rank, args=(rank, port, config, pipes[rank][1])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        while True:
            assert pipes[1][0].poll(60)
            if pipes[1][0].recv() == 2:
                break
        os.kill(ranks[1].pid, signal.SIGTERM)
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [143, 143]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert 2 <= find_checkpoint(config.run_folder / "checkpoints", print).step < NUM_STEPS
    assert run(configure(toys, "ranks", "train.save_every=500", f"train.stop_after={NUM_STEPS}")) == 143
    assert losses(toys, "ranks") == pytest.approx(losses(toys, "whole"), abs=1e-5)


def wait_for_the_others(port: int) -> None:
    tiny.become_rank(1, port)
    build_accelerator()


@pytest.mark.skipif(sys.platform != "linux", reason="reads from /proc that Python's handler is gone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_for_one_that_is_stopped_already_ends_at_its_own_signal(number):
    rank = multiprocessing.get_context("fork").Process(target=wait_for_the_others, args=(tiny.free_port(),))
    rank.start()
    status, began = Path(f"/proc/{rank.pid}/status"), time.monotonic()
    while rank.is_alive() and time.monotonic() - began < 60:
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
        if not caught >> (number - 1) & 1:
            break
        time.sleep(0.01)
    time.sleep(0.5)  # until it waits in C
    os.kill(rank.pid, number)
    rank.join(20)
    code = rank.exitcode
    rank.kill()
    assert code == -number


def test_a_time_that_is_over_is_a_request_to_stop(monkeypatch):
    stop = StopRequest(max_minutes=2)
    began = stopping.time.monotonic()
    assert not stop
    monkeypatch.setattr(stopping.time, "monotonic", lambda: began + 121)
    assert stop
    assert not StopRequest()


def test_a_step_that_hangs_ends_the_process_and_shows_where():
    program = (
        "import threading\n"
        "from distill.training.stopping import HangWatch\n"
        "def wait_for_a_peer():\n"
        "    threading.Event().wait()\n"
        "with HangWatch(minutes=0)('no end'):\n"
        "    pass\n"
        "with HangWatch(minutes=0.2 / 60, explain=lambda: 'utils/lock is there')('saving step 3'):\n"
        "    wait_for_a_peer()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "wait_for_a_peer" in ended.stderr
    assert "error: saving step 3 takes longer than 0.00333333 minutes, but train.hang_minutes" in ended.stderr
    assert "the same command goes on from the last checkpoint. utils/lock is there\n" in ended.stderr


def test_one_thread_watches_all_parts_of_a_run_and_one_that_ends_late_but_ends_lets_the_process_live():
    program = (
        "import threading, time\n"
        "from distill.training.stopping import HangWatch\n"
        "watch = HangWatch(minutes=0.3 / 60)\n"
        "threads = set()\n"
        "with watch('training'):\n"
        "    for step in range(20):\n"
        "        with watch(f'step {step}'):\n"
        "            time.sleep(0.04)\n"
        "        threads |= {thread.ident for thread in threading.enumerate()}\n"
        "    print('in time')\n"
        "    with watch('validation'):\n"
        "        time.sleep(0.6)\n"
        "time.sleep(1.4)\n"  # nothing is watched now
        "print(len(threads), threading.active_count())\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "in time\n2 1\n")
    assert ended.stderr.count("error: ") == ended.stderr.count("error: validation takes longer") == 1


def note_beats(monkeypatch) -> list[str]:
    """The parts that are begun or come back to from now on, one by one."""
    beats, beat = [], HangWatch.beat

    def note(self):
        beats.append(self._part)
        beat(self)

    monkeypatch.setattr(HangWatch, "beat", note)
    return beats


def test_a_block_in_a_watched_block_is_watched_for_itself_and_the_outer_one_again_after_it(monkeypatch):
    beats = note_beats(monkeypatch)
    watch = HangWatch(minutes=1)
    with watch("saving step 3"), watch("on_save of Own"):
        pass
    assert beats == ["saving step 3", "on_save of Own", "saving step 3"]


class Slow:
    """A callback with every event."""

    def on_start(self, run, step): ...
    def on_step(self, run, record): ...
    def on_validation(self, run, step, error, scores): ...
    def on_save(self, run, step, folder): ...
    def on_end(self, run, result): ...
    def on_close(self, run): ...


def test_preparation_steps_validation_saving_and_callbacks_are_each_watched(toys, monkeypatch, tmp_path):
    beats = note_beats(monkeypatch)
    tiny.make_shards(tmp_path, split="valid", num_samples=2)
    model = load_salmonn(toys / "teacher")
    student = build_student(
        model, str(toys / "parts" / "student-llm"), lora=Lora(4), connector=Connector("new"), quantization="none"
    )
    Distiller(
        OnlineTeacher(model),
        student,
        train=toys / "data" / "train",
        valid=tmp_path / "valid",
        options=TrainConfig(steps=1, batch_size=2, micro_batch_size=2, warmup_steps=0, trackers=()),
        answers=EvalConfig(max_new_tokens=2),
        run=tmp_path / "run",
        callbacks=[Slow()],
    ).fit()
    parts = [beat for beat in dict.fromkeys(beats) if not beat.endswith((" of RunLog", " of Trackers", " of Progress"))]
    assert parts == [
        "training", "preparation", "on_start of Slow", "step 1", "on_step of Slow", "validation after step 1",
        "on_validation of Slow", "saving step 1", "on_save of Slow", "on_end of Slow", "on_close of Slow",
    ]  # fmt: skip
    first = beats.index("validation after step 1")
    assert beats[first + 1] == beats[first]  # its one batch is a sign of life


def test_a_lock_that_a_killed_compiler_left_is_named_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    told = []
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "utils.so").touch()
    report_build_locks(told.append)
    assert told == [] and describe_build_locks() == ""
    (tmp_path / "utils" / "lock").touch()
    report_build_locks(told.append)
    assert f"{tmp_path}/utils/lock is there since 2" in told[-1] and "remove the file" in told[-1]


def test_a_slow_checkpoint_is_told_of_and_a_fast_one_not():
    told = []
    warn_of_slow_save(23.0, told.append)
    assert told == []
    warn_of_slow_save(25.0, told.append)
    assert "took 25 s, but queues kill 30 s after" in told[0]


def test_a_run_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"run folder is .*, but nothing can be written there .*; change runs= or its"):
        make_run_folder(tmp_path / "file" / "run")
    make_run_folder(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
