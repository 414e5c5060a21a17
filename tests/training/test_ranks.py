"""A run over one process, two under DDP and two under DeepSpeed ZeRO: the same losses for the same global batch."""

import copy
import inspect
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import tiny
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from distill.cache import cache
from distill.config import load_config
from distill.distiller import Distiller
from distill.evaluation.report import read_metrics
from distill.run import run
from distill.training.stopping import PREEMPTED
from distill.training.update import statistic
from distill.training.update.spikes import BadSteps, Fault
from students.quantize import measure_share, quantize_4bit_

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "configs" / "accelerate"

# of losses near 7 after a few steps of AdamW, whose first make a whole step of the smallest gradient and so of its
# rounding; a sum or an average over ranks that were wrong would show in the third digit
SAME = 1e-5


@pytest.fixture(scope="module", autouse=True)
def known_after_two():
    """A running limit of the norms holds from the third step on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistic, "NUM_FIRST", 2)
        yield


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Parts, a teacher, shards and their cached targets."""
    folder = tmp_path_factory.mktemp("toys")
    # a divergence with a moving weight, windows compared with each other, a projector that is trained beside, and a
    # limit of the norms that follows them; what is saved is an average
    config = tiny.make_toys(
        folder,
        loss__kl_kind="jsd",
        loss__kl_parameter=0.5,
        loss__schedules__kl="linear 0.5 warmup 1",
        loss__feature_kind="relation",
        loss__hidden=0.5,
        loss__hidden_kind="mse",
        cache__hidden_layers="[-1]",
        train__clip="running",
        train__clip_deviations=1e-3,
        train__ema=0.5,
    )
    cache(load_config(config))
    return folder


def launch(toys: Path, name: str, *words: str, launch_file: str, program: list[str]):
    """Start a program on two ranks as a user does; returns the finished launcher."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / launch_file)]
    command += ["--main_process_port", "0", *program]
    python_path = f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}"
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run([*command, str(toys / "toy.yaml"), f"name={name}", *words], env=environment,
                          cwd=toys, capture_output=True, text=True, timeout=280)  # fmt: skip


def configure(toys: Path, name: str, *words: str):
    return load_config(toys / "toy.yaml", [f"name={name}", f"runs={toys}/runs", *words])


def train_on_two_ranks(toys: Path, name: str, launch_file: str, *words: str, options: Sequence[str] = (),
                       killed: bool = False) -> list[int]:  # fmt: skip
    """Train as `accelerate launch` lets two ranks do, which are copies of this process: its imports are done.

    Args:
        toys: the folder.
        name: of the run.
        launch_file: of configs/accelerate; accelerate reads it and says what the ranks find in their environment.
        words: further ones of the config.
        options: what the command line of `accelerate launch` says in the file's place.
        killed: whether rank 1 gets kill -9 after step 3.

    Returns:
        The ranks' exit codes.
    """
    config, codes = configure(toys, name, "train.micro_batch_size=1", *words), []

    def fork(args) -> None:
        port, context = tiny.free_port(), multiprocessing.get_context("fork")
        ranks = [context.Process(target=be_rank, args=(rank, port, config, killed)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        codes.extend(rank.exitcode for rank in ranks)

    options = ["--config_file", str(LAUNCH / launch_file), "--main_process_port", "0", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", fork)
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(toys / "compiled"))
        launch_command(launch_command_parser().parse_args([*options, "--module", "distill.run"]))
    assert not (toys / "compiled").exists()  # DeepSpeed exchanges through gloo, and compiles nothing
    return codes


def be_rank(rank: int, port: int, config, killed: bool) -> None:
    tiny.become_rank(rank, port)
    if killed and rank == 1:
        kill_after(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    sys.exit(run(config))


def kill_after(last: int, kill) -> None:
    """Let a run of this process call `kill` when a step is done."""
    after = Distiller._after

    def and_kill(self, step, must_stop):
        after(self, step, must_stop)
        if step == last:
            kill()

    Distiller._after = and_kill


def losses(toys: Path, name: str) -> list[float]:
    """The loss of every step, from the run's metrics; of one that was done again, the last."""
    records, _ = read_metrics(toys / "runs" / name / "metrics.jsonl")
    return [record["loss"] for record in records]


def student(toys: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of the student that a run saved."""
    return load_file(toys / "runs" / name / "student" / "model.safetensors")


def assert_alike(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        torch.testing.assert_close(tensor, others[name], atol=1e-3, rtol=1e-3)


def limits(toys: Path, name: str) -> list[float]:
    """The limit of every step's gradient norm."""
    return [record["grad_limit"] for record in read_metrics(toys / "runs" / name / "metrics.jsonl")[0]]


@pytest.fixture(scope="module")
def alone(toys, on_the_cpu) -> list[float]:
    """Losses of one process with one micro-batch a step."""
    assert run(configure(toys, "alone")) == 0
    return losses(toys, "alone")


def test_losses_of_one_process_fall_and_are_finite(alone):
    assert len(alone) == 4
    assert all(0 < loss < 100 for loss in alone)
    assert alone[-1] < alone[0]


def test_two_ddp_ranks_repeat_the_losses_of_one_process(toys, alone):
    assert train_on_two_ranks(toys, "ddp", "two_cpus_ddp.yaml") == [0, 0]
    assert losses(toys, "ddp") == pytest.approx(alone, rel=SAME)
    assert limits(toys, "ddp") == pytest.approx(limits(toys, "alone"), rel=1e-3)
    assert_alike(student(toys, "ddp"), student(toys, "alone"))


def test_two_ddp_ranks_go_back_to_a_good_checkpoint_together_as_one_process_does(toys, monkeypatch):
    find_fault = BadSteps.find_fault

    def find_two_spikes(self, loss, norm):
        is_spike = self.losses.number == 2 > self.total
        return Fault("loss", loss, "is a spike") if is_spike else find_fault(self, loss, norm)

    monkeypatch.setattr(BadSteps, "find_fault", find_two_spikes)
    words = ["train.max_bad_steps=2", "train.max_returns=1", "train.save_every=1"]
    assert run(configure(toys, "back alone", *words)) == 0
    assert train_on_two_ranks(toys, "back", "two_cpus_ddp.yaml", *words) == [0, 0]
    assert losses(toys, "back") == pytest.approx(losses(toys, "back alone"), rel=SAME)
    records, _ = read_metrics(toys / "runs" / "back" / "metrics.jsonl")
    assert (records[-1]["skipped"], records[-1]["returns"]) == (2, 1)
    assert_alike(student(toys, "back"), student(toys, "back alone"))


STAGE = """
import sys

from distill.command import run_stage

sys.exit(run_stage(print))
"""  # what every stage is to its launcher, without what only its work imports


def test_a_users_error_is_the_last_line_of_the_launchers_report(toys):
    (toys / "stage.py").write_text(STAGE)
    program = [str(toys / "stage.py")]
    process = launch(toys, "wrong", "train.steps=0", launch_file="two_cpus_ddp.yaml", program=program)
    text = f"error: {toys / 'toy.yaml'}: train.steps is 0, but must be above 0; correct it."
    *_, last, border = process.stderr.strip().splitlines()
    assert process.returncode == 1 and last.endswith(text) and set(border) == {"="}


LAUNCHER_KILLED = f"""
import os, signal, sys

from distill.command import run_stage
from distill.distiller import Distiller
from distill.run import run

{inspect.getsource(kill_after)}
if os.environ["RANK"] == "0":
    kill_after(1, lambda: (os.kill(os.getppid(), signal.SIGKILL), signal.pause()))
sys.exit(run_stage(run))
"""


def processes_of(folder: Path) -> list[int]:
    """Those that were started with a path in the folder and still run."""
    lines = ((p.pid, p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return [pid for pid, words in lines if any(str(folder) in word for word in words)]


def test_kill_9_of_a_rank_and_of_the_launcher_of_a_zero2_run_leaves_no_process_and_costs_no_loss(toys, alone):
    (toys / "killed.py").write_text(LAUNCHER_KILLED)
    program = [str(toys / "killed.py")]
    process = launch(toys, "killed", "train.micro_batch_size=1", launch_file="two_cpus_zero2.yaml", program=program)
    assert process.returncode == -signal.SIGKILL, process.stderr
    while processes_of(toys):  # or until the test's own time is over
        time.sleep(0.1)
    stopped = losses(toys, "killed")  # in order, after the step that they were in: another rank may be a step behind
    assert len(stopped) in (1, 2) and stopped == pytest.approx(alone[: len(stopped)], rel=SAME)
    first, second = train_on_two_ranks(toys, "killed", "two_cpus_zero2.yaml", killed=True)
    assert second == -signal.SIGKILL and first != 0
    assert losses(toys, "killed") == pytest.approx(alone[:3], rel=SAME)
    assert train_on_two_ranks(toys, "killed", "two_cpus_zero2.yaml") == [0, 0]
    assert losses(toys, "killed") == pytest.approx(alone, rel=SAME)
    assert_alike(student(toys, "killed"), student(toys, "alone"))


def test_two_zero2_ranks_whose_moments_lie_in_host_memory_repeat_the_losses_of_one_process(toys, alone):
    options = ["--offload_optimizer_device", "cpu"]
    assert train_on_two_ranks(toys, "offload", "two_cpus_zero2.yaml", options=options) == [0, 0]
    assert losses(toys, "offload") == pytest.approx(alone, rel=SAME)
    assert_alike(student(toys, "offload"), student(toys, "alone"))


def test_two_zero3_ranks_repeat_the_losses_of_one_process_and_save_whole_tensors(toys, alone):
    assert train_on_two_ranks(toys, "zero3", "two_cpus_zero3.yaml", "train.ema=0") == [0, 0]
    assert losses(toys, "zero3") == pytest.approx(alone, rel=SAME)
    assert limits(toys, "zero3") == pytest.approx(limits(toys, "alone"), rel=1e-3)
    last = load_file(toys / "runs" / "alone" / "checkpoints" / "step-000004" / "trainable.safetensors")
    assert_alike(student(toys, "zero3"), {name: last[name] for name in last if not name.startswith("projectors.")})


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_two_fsdp2_ranks_hold_a_part_of_the_frozen_weights_each_and_repeat_the_losses_of_one_process(
    toys, alone, on_the_cpu, monkeypatch, tmp_path, quantization
):
    data = shutil.copytree(toys / "data", tmp_path / "data")
    tiny.make_shards(data, split="valid", num_samples=5)  # ranks answer different clips, of different lengths
    words = [f"student.quantization={quantization}", "train.gradient_checkpointing=true"]
    two = [f"fsdp {quantization}", "two_cpus_fsdp2.yaml", *words, f"data.folder={data}", "train.eval_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "_step", step_with_a_part_alone)
        patch.setattr(Distiller, "_finish", finish_whole)
        assert train_on_two_ranks(toys, *two, "train.stop_after=2") == [PREEMPTED] * 2
        assert train_on_two_ranks(toys, *two) == [0, 0]
    if quantization == "none":
        assert run(configure(toys, "whole alone", *words)) == 0
    one = {"nf4": "alone", "none": "whole alone"}[quantization]
    assert losses(toys, two[0]) == pytest.approx(losses(toys, one), rel=SAME)
    weights = [toys / "runs" / name / "checkpoints/step-000004/trainable.safetensors" for name in (two[0], one)]
    assert_alike(*map(load_file, weights))


def step_with_a_part_alone(distiller, *args, step=Distiller._step):
    """A step, before and behind which this rank has half of the frozen weights of the blocks and no more."""
    assert_has_half(distiller.student.llm)
    done = step(distiller, *args)
    assert_has_half(distiller.student.llm)
    return done


def finish_whole(distiller, *args, finish=Distiller._finish):
    """The end of a run, behind which the blocks are ordinary again, and whole to the last bit."""
    finish(distiller, *args)
    mine, fresh = (
        copy.deepcopy(distiller.student.llm),
        AutoModelForCausalLM.from_pretrained(distiller.student.config.llm),
    )
    if measure_share(mine).num_4bit:
        quantize_4bit_(fresh)
    whole = {name.replace("base_layer.", ""): weight for name, weight in mine.model.layers.named_parameters()}
    for name, weight in fresh.model.layers.named_parameters():
        assert type(whole[name]) is type(weight) and torch.equal(whole[name], weight)


def assert_has_half(llm) -> None:
    frozen = [p for block in llm.model.layers for p in block.parameters() if not p.requires_grad]
    assert len(frozen) == 9
    assert all(isinstance(p, DTensor) and 2 * p.to_local().numel() == p.numel() for p in frozen)


def test_two_zero2_ranks_repeat_a_run_whose_student_answers_within_its_steps(toys, on_the_cpu):
    words = ["teacher.online=true", "on_policy.step_share=0.5", "on_policy.temperature=1", "train.steps=2",
             "on_policy.max_new_tokens=6"]  # fmt: skip
    assert run(configure(toys, "own alone", *words)) == 0
    assert train_on_two_ranks(toys, "own", "two_cpus_zero2.yaml", *words) == [0, 0]
    assert losses(toys, "own") == pytest.approx(losses(toys, "own alone"), rel=SAME)
    assert_alike(student(toys, "own"), student(toys, "own alone"))


def test_two_zero2_ranks_train_lora_on_the_ears_as_one_process_does(toys, on_the_cpu):
    words = ["student.ears_lora_rank=2", "train.gradient_checkpointing=true", "train.steps=2"]
    assert run(configure(toys, "ears alone", *words)) == 0
    assert train_on_two_ranks(toys, "ears", "two_cpus_zero2.yaml", *words) == [0, 0]
    assert losses(toys, "ears") == pytest.approx(losses(toys, "ears alone"), rel=SAME)
    assert_alike(student(toys, "ears"), student(toys, "ears alone"))
    assert sum("whisper" in name for name in student(toys, "ears")) == 12


@pytest.mark.parametrize("stage", [2, 3])
def test_two_zero_ranks_train_a_prefix_as_one_process_does(toys, on_the_cpu, stage):
    words = ["student.prefix_tokens=3", "train.gradient_checkpointing=true", "train.steps=2"]
    one, two = f"prefix alone {stage}", f"prefix {stage}"
    assert run(configure(toys, one, *words)) == 0
    assert train_on_two_ranks(toys, two, f"two_cpus_zero{stage}.yaml", *words) == [0, 0]
    assert losses(toys, two) == pytest.approx(losses(toys, one), rel=SAME)
    assert_alike(student(toys, two), student(toys, one))
    prefix = [tensor for name, tensor in student(toys, two).items() if "prefix" in name]
    assert len(prefix) == 2 and all(tensor.any() for tensor in prefix)


def test_a_run_resumed_under_zero1_on_two_ranks_repeats_the_uninterrupted_losses_of_one_process(toys, alone):
    assert run(configure(toys, "moved", "train.stop_after=2")) == PREEMPTED
    assert losses(toys, "moved") == pytest.approx(alone[:2], abs=1e-6)
    assert train_on_two_ranks(toys, "moved", "two_cpus_zero2.yaml", options=["--zero_stage", "1"]) == [0, 0]
    assert losses(toys, "moved") == pytest.approx(alone, rel=SAME)
