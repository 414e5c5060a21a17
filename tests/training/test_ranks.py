"""A run over one process, two under DDP and two under DeepSpeed ZeRO: the same losses for the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

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
    from distill.cache import cache
    from distill.config import load_config

    cache(load_config(config))
    return folder


def launch(
    toys: Path, name: str, *words: str, launch_file: str | None = None, check: bool = True, module="distill.run"
):
    """Run a stage as a user does; returns its finished process."""
    command = [sys.executable, "-m"]
    if launch_file is not None:
        command += ["accelerate.commands.launch", "--config_file", str(LAUNCH / launch_file)]
        command += ["--main_process_port", "0", "--module"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([*command, module, str(toys / "toy.yaml"), f"name={name}", *words], env=environment,
                             cwd=toys, capture_output=True, text=True, timeout=240)  # fmt: skip
    assert process.returncode == 0 or not check, process.stderr[-3000:]
    return process


def losses(toys: Path, name: str) -> list[float]:
    """The loss of every step, from the run's metrics."""
    lines = (toys / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(toys) -> list[float]:
    """Losses of one process with one micro-batch a step."""
    launch(toys, "alone")
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


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_whose_optimizer_is_in_parts_repeat_the_losses_of_one_process(toys, alone, tmp_path, stage):
    text = (LAUNCH / "two_cpus_zero2.yaml").read_text()
    (tmp_path / "launch.yaml").write_text(text.replace("zero_stage: 2", f"zero_stage: {stage}"))
    launch(toys, f"zero{stage}", "train.micro_batch_size=1", launch_file=str(tmp_path / "launch.yaml"))
    assert losses(toys, f"zero{stage}") == pytest.approx(alone, abs=1e-5)


def test_two_zero3_ranks_repeat_the_losses_of_one_process_and_save_whole_tensors(toys, alone):
    launch(toys, "zero3", "train.micro_batch_size=1", launch_file="two_cpus_zero3.yaml")
    assert losses(toys, "zero3") == pytest.approx(alone, abs=1e-5)
    one, two = (load_file(toys / "runs" / name / "student" / "model.safetensors") for name in ("alone", "zero3"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-3, rtol=1e-3)


def test_a_run_resumed_under_zero2_repeats_the_uninterrupted_losses_of_one_process(toys, alone):
    stopped = launch(toys, "moved", "train.stop_after=2", check=False)
    assert stopped.returncode == 143
    assert losses(toys, "moved") == pytest.approx(alone[:2], abs=1e-6)
    launch(toys, "moved", "train.micro_batch_size=1", launch_file="two_cpus_zero2.yaml")
    assert losses(toys, "moved") == pytest.approx(alone, abs=1e-5)
