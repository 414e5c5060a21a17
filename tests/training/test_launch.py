"""The launcher: its exit codes are those of the ranks, signals reach them, and they end when it does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill.command import LAST_WORDS, StoppedError, guard
from distill.commandline.launch import OF_OTHERS, PARENT, launch
from distill.commandline.starting import STOPPED
from distill.training.stopping import PREEMPTED, STOP_SIGNALS
from shards.pool import map_in_order

ROOT = Path(__file__).resolve().parents[2]
TWO = ["--config_file", str(ROOT / "configs" / "accelerate" / "two_cpus_ddp.yaml"), "--main_process_port", "0"]
ONE = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Signals and environment are the launcher's own process' affair."""
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGQUIT)}
    before = dict(os.environ)
    for name in (PARENT, *OF_OTHERS):
        monkeypatch.delenv(name, raising=False)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


def write_script(folder: Path, text: str) -> str:
    (folder / "rank.py").write_text(f"import os, signal, sys\n{text}\n")
    return str(folder / "rank.py")


def test_a_killed_rank_is_named_with_what_to_do_and_its_exit_code_is_the_launchers(tmp_path, capfd):
    script = write_script(
        tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else signal.pause()"
    )
    assert launch([*TWO, script]) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert "error: rank 1 (process " in said and "was killed by SIGKILL" in said
    assert "the same command goes on from what is finished" in said


def test_a_run_that_stopped_in_order_ends_the_launcher_with_its_own_exit_code(tmp_path):
    assert launch([*TWO, write_script(tmp_path, f"sys.exit({PREEMPTED})")]) == PREEMPTED
    assert launch([*ONE, write_script(tmp_path, "sys.exit(2)")]) == 2
    assert launch([*ONE, write_script(tmp_path, "")]) == 0


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_the_launcher_of_one_process_reaches_it_and_its_end_is_waited_for(tmp_path, number):
    script = write_script(
        tmp_path,
        f"signal.signal({int(number)}, lambda *_: sys.exit({PREEMPTED}))\n"
        f"os.kill(os.getppid(), {int(number)})\nsignal.pause()",
    )
    assert launch([*ONE, script]) == PREEMPTED


INTERRUPTED_BY_ITSELF = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{package}":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
"""  # Python runs it at its start, where it lies beside the packages as sitecustomize.py


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 128 + signal.SIGINT), (signal.SIGTERM, PREEMPTED)])
@pytest.mark.parametrize("stage", ["run", "cache", "teach", "answers", "commandline.launch"])
def test_a_signal_while_a_stage_or_launcher_still_imports_ends_it_with_one_line(tmp_path, stage, number, code):
    package = "accelerate" if stage == "commandline.launch" else "torch"
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_BY_ITSELF.format(package=package, number=int(number)))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.run([sys.executable, "-m", f"distill.{stage}", "config.yaml"], env=environment, text=True,
                             capture_output=True, timeout=60)  # fmt: skip
    assert (process.returncode, process.stderr) == (code, f"{STOPPED}\n")


def test_a_process_tells_torchruns_report_how_to_go_on_before_it_can_be_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def work() -> int:
        assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == LAST_WORDS
        raise ValueError("x is 1, but must be 2; correct it.")

    assert guard(work, debug=False) == 1
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"].startswith("error: x is 1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_a_command_in_order_and_is_ignored_where_nohup_says_so(number, capsys):
    put_away = []

    def work() -> int:
        try:
            signal.raise_signal(number)
        finally:
            put_away.append(number)
        return 0

    assert guard(work, debug=False) == PREEMPTED and put_away == [number]
    assert "the same command goes on from them" in capsys.readouterr().err
    signal.signal(number, signal.SIG_IGN)
    assert guard(work, debug=False) == 0
    assert issubclass(StoppedError, KeyboardInterrupt)


CHILD = """
import os, signal, sys
from distill.commandline.launch import bind_to_launcher

bind_to_launcher()
print("bound", flush=True)
signal.pause()
"""
LAUNCHER = f"""
import os, subprocess, sys
from distill.commandline.launch import name_parent

child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env={{**os.environ, **ENVIRONMENT}})
if GONE:
    os._exit(0)
child.wait()
"""


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("environment", ["name_parent()", "{'TORCHELASTIC_RUN_ID': 'x'}"])
def test_a_process_ends_with_its_launcher_and_at_once_if_that_is_gone_when_it_starts(environment, gone):
    if gone and environment != "name_parent()" and not sys.platform.startswith("linux"):
        return  # who adopted an orphan can be seen on Linux alone
    program = LAUNCHER.replace("ENVIRONMENT", environment).replace("GONE", str(gone))
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=path, stdout=subprocess.PIPE, text=True)
    if not gone:
        assert launcher.stdout.readline() == "bound\n"
        launcher.kill()
    launcher.communicate(timeout=60)  # ends when nobody holds stdout any more


def test_a_process_of_a_shell_is_bound_to_nothing():
    program = (
        "import threading; from distill.commandline.launch import bind_to_launcher as b; b(); "
        "print(threading.active_count())"
    )
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True).stdout == "1\n"


def name_process(_) -> int:
    return os.getpid()


def has_ended(process: int) -> bool:
    """Whether a process is gone, or waits for nothing but to be reaped."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return not psutil.pid_exists(process)


def test_workers_of_a_killed_command_end_with_it():
    read_end, write_end = os.pipe()
    command = os.fork()
    if command == 0:
        os.close(read_end)
        os.set_inheritable(write_end, True)
        results = map_in_order(name_process, range(100), workers=2)
        os.write(write_end, f"{next(results)}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write_end)
    os.waitpid(command, 0)
    worker = int(os.read(read_end, 100))
    while not has_ended(worker):  # or until the test's own time is over
        time.sleep(0.01)
    assert has_ended(worker)
