"""A run of toys whose update is changed, and clips whose gradient is a spike: three steps of four clips an epoch."""

import dataclasses
from collections.abc import Callable

import pytest
import tiny

from distill.config import EvalConfig, LossConfig, TrainConfig
from distill.distiller import Distiller, Own, Run
from distill.objective.terms.term import OwnTerm
from distill.training.ranks import resolve_precision
from distill.training.update import statistic
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from students.student import build_student
from teachers.files.loading import load_salmonn
from teachers.lora import Lora

OPTIONS = TrainConfig(steps=6, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=0,
                      schedule="constant", save_every=100, trackers=())  # fmt: skip


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    return folder


@pytest.fixture(scope="session")
def keys(toys) -> list[list[str]]:
    """The keys of each step's clips, of two epochs."""
    batches = iter(ShardStream(toys / "data" / "train", Order(batch_size=4, seed=0)))
    return [[sample.key for sample in next(batches)] for _ in range(6)]


@pytest.fixture(scope="session")
def twice(keys) -> set[str]:
    """The clips of both the third step and the fourth, which begins an epoch: no other one up to six has them."""
    return set(keys[2]) & set(keys[3])


@pytest.fixture
def make_run(toys, tmp_path, monkeypatch) -> Callable[..., Distiller]:
    """Makes a run in a folder of that name, on cross-entropy and a small term that some clips have `factor` times.

    A statistic is known after two values.
    """
    monkeypatch.setattr(statistic, "NUM_FIRST", 2)
    model = load_salmonn(toys / "teacher")

    def make(name: str, valid=None, spikes=(), factor=1e3, metrics=None, precision="float32", **changes) -> Distiller:
        def energy(seen):
            factor_B = [factor if sample.key in spikes else 1.0 for sample in seen.batch.samples]
            return seen.hidden_SD[:, 0].square() * seen.hidden_SD.new_tensor(factor_B)[seen.batch.row_S]

        student = build_student(model, str(toys / "parts" / "student-llm"), lora=Lora(rank=4), quantization="none",
                                dtype=resolve_precision(precision))  # fmt: skip
        return Distiller(None, student, train=toys / "data" / "train", valid=valid, loss=LossConfig(feature=0.0),
                         options=dataclasses.replace(OPTIONS, **changes), run=Run(tmp_path / name, precision=precision),
                         answers=EvalConfig(max_new_tokens=2),
                         own=Own({"energy": OwnTerm(0.1, energy)}, metrics or {}))  # fmt: skip

    return make
