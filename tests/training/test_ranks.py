"""A run over one process, two under DDP and two under DeepSpeed ZeRO: the same losses for the same global batch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file

from distill.cache import cache
from distill.config import load_config
from distill.run import run
from distill.training.stopping import PREEMPTED

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "configs" / "accelerate"


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Parts, a teacher, shards and their cached targets."""
    folder = tmp_path_factory.mktemp("toys")
    # a divergence with a moving weight, windows compared with each other, and a projector that is trained beside
    config = tiny.make_toys(
        folder,
        loss__kl_kind="jsd",
        loss__kl_parameter=0.5,
        loss__schedules__kl="linear 0.5 warmup 1",
        loss__feature_kind="relation",
        loss__hidden=0.5,
        loss__hidden_kind="mse",
        cache__hidden_layers="[-1]",
    )
    cache(load_config(config))
    return folder


def launch(
    toys: Path, name: str, *words: str, launch_file: str, check: bool = True, program=("--module", "distill.run")
):
    """Train on two ranks as a user does; returns the finished launcher."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / launch_file)]
    command += ["--main_process_port", "0", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([*command, str(toys / "toy.yaml"), f"name={name}", *words], env=environment,
                             cwd=toys, capture_output=True, text=True, timeout=240)  # fmt: skip
    assert process.returncode == 0 or not check, process.stderr[-3000:]
    return process


def losses(toys: Path, name: str) -> list[float]:
    """The loss of every step, from the run's metrics."""
    lines = (toys / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(toys, on_the_cpu) -> list[float]:
    """Losses of one process with one micro-batch a step."""
    assert run(load_config(toys / "toy.yaml", ["name=alone", f"runs={toys}/runs"])) == 0
    return losses(toys, "alone")


def test_losses_of_one_process_fall_and_are_finite(alone):
    assert len(alone) == 4
    assert all(0 < loss < 100 for loss in alone)
    assert alone[-1] < alone[0]


def test_two_ddp_ranks_repeat_the_losses_of_one_process(toys, alone):
    launch(toys, "ddp", "train.micro_batch_size=1", launch_file="two_cpus_ddp.yaml")
    assert losses(toys, "ddp") == pytest.approx(alone, abs=1e-5)


def test_a_users_error_is_the_last_line_of_the_launchers_report(toys):
    process = launch(toys, "wrong", "train.steps=0", launch_file="two_cpus_ddp.yaml", check=False)
    text = f"error: {toys / 'toy.yaml'}: train.steps is 0, but must be above 0; correct it."
    *_, last, border = process.stderr.strip().splitlines()
    assert process.returncode == 1 and last.endswith(text) and set(border) == {"="}


KILLED = """
import os, signal, sys

from distill.command import run_stage
from distill.distiller import Distiller
from distill.run import run

who, after = sys.argv.pop(1), Distiller._after

def kill_after_step_3(self, step, record):
    after(self, step, record)
    if step == 3 and who == "rank" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3 and who == "launcher" and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()

Distiller._after = kill_after_step_3
sys.exit(run_stage(run))
"""


def processes_of(folder: Path) -> list[int]:
    """Those that were started with a path in the folder and still run."""
    lines = ((p.pid, p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return [pid for pid, words in lines if any(str(folder) in word for word in words)]


def test_kill_9_of_a_rank_and_of_the_launcher_of_a_zero2_run_leaves_no_process_and_costs_no_loss(toys, alone):
    (toys / "killed.py").write_text(KILLED)
    for who in ("rank", "launcher"):
        words = [str(toys / "killed.py"), who]
        process = launch(toys, "killed", "train.micro_batch_size=1", launch_file="two_cpus_zero2.yaml", check=False,
                         program=words)  # fmt: skip
        assert process.returncode != 0
        while processes_of(toys):  # or until the test's own time is over
            time.sleep(0.1)
        assert losses(toys, "killed")[:3] == pytest.approx(alone[:3], abs=1e-5)
        assert (toys / "runs" / "killed" / "checkpoints" / "step-000002").is_dir()
    launch(toys, "killed", "train.micro_batch_size=1", launch_file="two_cpus_zero2.yaml")
    assert losses(toys, "killed") == pytest.approx(alone, abs=1e-5)


def test_two_zero3_ranks_repeat_the_losses_of_one_process_and_save_whole_tensors(toys, alone):
    launch(toys, "zero3", "train.micro_batch_size=1", launch_file="two_cpus_zero3.yaml")
    assert losses(toys, "zero3") == pytest.approx(alone, abs=1e-5)
    one, two = (load_file(toys / "runs" / name / "student" / "model.safetensors") for name in ("alone", "zero3"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-3, rtol=1e-3)


def test_a_run_resumed_under_zero1_on_two_ranks_repeats_the_uninterrupted_losses_of_one_process(toys, alone, tmp_path):
    words = ["name=moved", f"runs={toys}/runs", "train.stop_after=2"]
    assert run(load_config(toys / "toy.yaml", words)) == PREEMPTED
    assert losses(toys, "moved") == pytest.approx(alone[:2], abs=1e-6)
    text = (LAUNCH / "two_cpus_zero2.yaml").read_text()
    (tmp_path / "launch.yaml").write_text(text.replace("zero_stage: 2", "zero_stage: 1"))
    launch(toys, "moved", "train.micro_batch_size=1", launch_file=str(tmp_path / "launch.yaml"))
    assert losses(toys, "moved") == pytest.approx(alone, abs=1e-5)
