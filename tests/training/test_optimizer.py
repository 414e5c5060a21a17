"""Optimizer, schedules and recomputed blocks: each changes what it says and nothing else."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch

from distill.config import LossConfig, TrainConfig
from distill.distiller import Distiller
from distill.objective.weighing import count, weigh
from distill.training.falls import FALLS
from distill.training.microbatch import Collator
from distill.training.optimizer import build_optimizer, learning_rate
from distill.training.recompute import keep_outputs_, recompute_blocks_
from distill.training.resuming import check_changes, identify_training
from distill.training.zero import check_options, configure_deepspeed
from students.student import build_student
from teachers.files.loading import load_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher

OPTIONS = TrainConfig(steps=4, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=1, save_every=100)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    return folder


def make_run(toys, run_folder, loss=None, quantization="nf4", rank=4, **changes) -> Distiller:
    model = load_salmonn(toys / "teacher")
    lora = Lora(rank=rank, dropout=0.1)
    student = build_student(model, str(toys / "parts" / "student-llm"), lora=lora, quantization=quantization)
    teacher = OnlineTeacher(model, k=16, hidden_layers=[1])
    return Distiller(teacher, student, train=toys / "data" / "train", loss=loss,
                     options=dataclasses.replace(OPTIONS, **changes), run=run_folder)  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "low", "rates"),
    [
        ("cosine", 0.0, [0.5, 1.0, 0.75, 0.25]),
        ("linear", 0.1, [0.5, 1.0, 0.7, 0.4]),
        ("constant", 0.0, [0.5, 1.0, 1.0, 1.0]),
        ("wsd", 0.1, [0.5, 1.0, 1.0, 0.55]),
    ],
)
def test_the_rate_climbs_to_its_peak_and_falls_as_its_schedule_says(schedule, low, rates):
    options = TrainConfig(steps=5, warmup_steps=2, learning_rate=1.0, min_learning_rate=low, schedule=schedule,
                          decay_share=0.4)  # fmt: skip
    assert [learning_rate(step, options) for step in (0, 2, 3, 4)] == pytest.approx(rates)


def test_a_longer_wsd_run_has_the_same_rates_until_the_shorter_one_falls():
    short, long = (TrainConfig(steps=n, warmup_steps=10, schedule="wsd", decay_share=0.2) for n in (100, 200))
    same = [learning_rate(step, short) == learning_rate(step, long) for step in range(100)]
    assert all(same[:81]) and not any(same[81:])


def test_a_toy_fall_is_one_line_for_config_and_rate(monkeypatch):
    monkeypatch.setitem(FALLS, "halfway", lambda progress, decay: float(progress < 0.5))
    options = TrainConfig(steps=5, warmup_steps=1, learning_rate=1.0, schedule="halfway")
    assert [learning_rate(step, options) for step in range(5)] == [1, 1, 1, 0, 0]


def weigh_alone(run: Distiller, made) -> dict[str, torch.Tensor]:
    """What the elements of a step's only micro-batch count."""
    weights = {name: run.schedules[name].start for name in run.terms}
    return weigh(run.terms, made, run.loss, weights, count(run.terms, made))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_gradient_of_recomputed_blocks_is_the_same_to_the_last_bit(toys, tmp_path, quantization):
    run = make_run(toys, tmp_path, LossConfig(hidden=0.5, hidden_layers={1: 1}), quantization)
    samples = next(iter(run.stream))
    made = Collator(run.teacher, run.student, torch.device("cpu"), torch.float32)(samples)
    run.student.train()

    def gradient(change_) -> list[torch.Tensor]:
        change_(run.student)
        torch.manual_seed(5)  # of LoRA's dropout
        loss, _ = run.objective(made, weigh_alone(run, made))
        return torch.autograd.grad(loss, list(run.named.values()), allow_unused=True)

    kept, recomputed = gradient(keep_outputs_), gradient(recompute_blocks_)
    assert run.student.llm.is_activation_checkpointing
    assert any(g is not None and g.abs().sum() > 0 for g in kept)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(kept, recomputed))


def saved_bytes(run: Distiller, made) -> int:
    """Bytes that autograd keeps of one micro-batch for its backward."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run.objective(made, weigh_alone(run, made))
    return sum(sizes.values())


def test_recomputed_blocks_keep_less_and_a_run_with_them_has_the_same_losses(toys, tmp_path):
    run = make_run(toys, tmp_path / "kept")
    made = Collator(run.teacher, run.student, torch.device("cpu"), torch.float32)(next(iter(run.stream)))
    run.student.train()
    whole = saved_bytes(run, made)
    recompute_blocks_(run.student)
    assert saved_bytes(run, made) < 0.8 * whole
    keep_outputs_(run.student)
    losses = make_run(toys, tmp_path / "a").fit().losses
    again = make_run(toys, tmp_path / "b", gradient_checkpointing=True)
    assert again.fit().losses == losses
    assert not again.student.llm.is_activation_checkpointing  # as it was given


def test_a_run_with_moments_in_8_bits_goes_on_as_if_it_had_not_stopped(toys, tmp_path):
    changes = {"optimizer": "adamw_8bit", "steps": 5, "rank": 160}
    whole = make_run(toys, tmp_path / "whole", **changes)
    losses = whole.fit().losses
    dtypes = {state["state1"].dtype for state in whole.optimizer.optimizer.state.values()}
    assert dtypes == {torch.uint8, torch.float32}  # tensors under 4,096 elements stay whole
    make_run(toys, tmp_path / "part", stop_after=3, **changes).fit()
    assert make_run(toys, tmp_path / "part", **changes).fit().losses == losses
    assert losses != make_run(toys, tmp_path / "other", steps=5, rank=160).fit().losses


def test_moments_in_8_bits_take_a_quarter_of_their_bytes():
    named = {"w": torch.nn.Parameter(torch.ones(64, 1024))}

    def moment_bytes(optimizer: str) -> int:
        adam = build_optimizer(named, TrainConfig(optimizer=optimizer))
        named["w"].grad = torch.ones(64, 1024)
        adam.step()
        tensors = [x for x in adam.state[named["w"]].values() if torch.is_tensor(x) and x.numel() > 256]
        return sum(x.numel() * x.element_size() for x in tensors)

    assert moment_bytes("adamw_8bit") < 0.27 * moment_bytes("adamw")


def test_what_deepspeed_cannot_do_is_refused():
    class Launch:
        class state:
            deepspeed_plugin = SimpleNamespace(zero_stage=3)

    with pytest.raises(ValueError, match=r"train\.optimizer is adamw_8bit, but .* set train\.optimizer=adamw, or"):
        check_options(Launch, TrainConfig(optimizer="adamw_8bit"))
    with pytest.raises(
        ValueError, match=r"train\.max_returns is 1, but .* makes its step in the backward, .*returns=0"
    ):
        check_options(Launch, TrainConfig(max_returns=1))
    with pytest.raises(
        ValueError, match=r"train\.ema is 0\.9, but .* under ZeRO-3; set train\.ema=0\.0, or launch with"
    ):
        check_options(Launch, TrainConfig(ema=0.9))
    with pytest.raises(
        ValueError, match=r"precision is fp16, but this launch is DeepSpeed's, .* set precision=bf16 or"
    ):
        check_options(Launch, TrainConfig(), torch.float16)
    Launch.state.deepspeed_plugin.zero_stage = 2
    check_options(Launch, TrainConfig(ema=0.9))
    check_options(Launch, TrainConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "linear"}, r"train\.schedule: cosine there, linear here"),
        ({"optimizer": "adamw_8bit"}, r"train\.optimizer: adamw there, adamw_8bit here"),
    ],
)
def test_a_run_does_not_go_on_with_another_schedule_or_optimizer(toys, tmp_path, changes, said):
    make_run(toys, tmp_path, stop_after=1).fit()
    with pytest.raises(ValueError, match=said):
        make_run(toys, tmp_path, **changes)


@pytest.mark.parametrize(("schedule", "is_refused"), [("cosine", False), ("linear", True)])
def test_an_option_that_a_checkpoint_does_not_know_was_as_its_default_is(tmp_path, schedule, is_refused):
    options = TrainConfig(schedule=schedule)
    there = identify_training(TrainConfig())
    del there["train.schedule"]

    def check() -> None:
        check_changes(there, identify_training(options), checkpoint=tmp_path, done=1, options=options,
                      has_schedules=False, say=print)  # fmt: skip

    if is_refused:
        with pytest.raises(ValueError, match=r"train\.schedule: cosine there, linear here"):
            check()
    else:
        check()


def test_deepspeeds_buffer_of_gradients_is_as_large_as_what_is_trained_unless_a_launch_file_says_otherwise():
    def buffer(**given) -> int:
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": given}, zero_stage=2)
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        configure_deepspeed(accelerator, TrainConfig(), 1, num_trained=1234)
        return plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"]

    assert buffer() == 1234  # DeepSpeed's own default, 500 million, is 2 GB on every rank
    assert buffer(reduce_bucket_size=10**6) == 10**6
