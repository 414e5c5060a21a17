"""What `augment:`, buckets, batches by seconds and task weights do to a run: exact, in step, and in training only."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from distill.cache import cache
from distill.config import Config, EvalConfig, TrainConfig, load_config
from distill.distiller import Distiller
from distill.run import open_training_stream, run
from distill.training.microbatch import Collator
from distill.training.ranks import build_accelerator
from shards.audio.augmentation import Augmentation
from shards.audio.decode import encode_flac, hash_waveform
from shards.sample import SAMPLE_RATE
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.tars.archive import ShardError
from shards.tars.tarwriter import TarWriter
from students.hearing import Connector
from students.student import build_student
from teachers.cached import CachedTeacher
from teachers.files.loading import load_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher
from teachers.teacher import NoTeacher

LOUD = ("augment.noise_share=0.8", "augment.gain_share=0.5", "augment.room_share=0.3", "augment.mask_share=0.7")
MIXED = ("precision=float32", "data.bucket_batches=2", "data.batch_seconds=2.5", "data.task_weights.asr=2")
CLEAN = Augmentation(noise_share=1, noise_range=(0, 5), mask_share=1)
SAME = dataclasses.replace(CLEAN, teacher_hears="same")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Parts, a teacher, shards, a validation split and cached targets."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    tiny.make_shards(folder / "data", split="valid", num_samples=3)
    cache(load_config(folder / "toy.yaml"))
    return folder


def run_to(toys: Path, name: str, *words: str) -> list[float]:
    """Losses of every step of a run in this process."""
    run(load_config(toys / "toy.yaml", [f"name={name}", *words]))
    return losses(toys, name)


def losses(toys: Path, name: str) -> list[float]:
    """The loss of every step, from the run's metrics."""
    return [json.loads(line)["loss"] for line in (toys / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def augmented(toys) -> list[float]:
    return run_to(toys, "augmented", *LOUD, *MIXED)


def test_an_augmented_run_has_finite_losses_that_are_not_those_of_clean_clips(toys, augmented):
    assert len(augmented) == 4 and all(math.isfinite(loss) for loss in augmented)
    assert augmented != run_to(toys, "clean", *MIXED)


def test_a_resumed_augmented_run_repeats_the_uninterrupted_losses_bit_by_bit(toys, augmented):
    assert run_to(toys, "resumed", *LOUD, *MIXED, "train.stop_after=2") == augmented[:2]
    assert run_to(toys, "resumed", *LOUD, *MIXED) == augmented


def test_two_ranks_with_batches_by_seconds_repeat_the_losses_of_one_process(toys, augmented):
    config = load_config(toys / "toy.yaml", ["name=ranks", "train.micro_batch_size=1", *LOUD, *MIXED])
    tiny.run_two_ranks(run, config)
    assert losses(toys, "ranks") == pytest.approx(augmented, abs=1e-5)


def test_a_run_is_not_resumed_under_another_augmentation(toys):
    run_to(toys, "changed", *LOUD, "train.stop_after=1")
    with pytest.raises(ValueError, match=r"state has augment \{.*\}, but this stream has none; set augment as it was"):
        run_to(toys, "changed")


def open_stream(toys: Path, augmentation: Augmentation | None, targets: Path | None = None) -> ShardStream:
    """The training shards as one batch an epoch."""
    return ShardStream(
        toys / "data" / "train", Order(12), Selection(targets=targets), augmentation=augmentation, max_seconds=2.0
    )


def test_the_student_hears_the_augmented_clip_and_cached_targets_are_those_of_the_clean_one(toys):
    model, folder = load_salmonn(toys / "teacher"), toys / "data" / "cache"
    collator = Collator(CachedTeacher(folder), model, torch.device("cpu"), torch.float32)
    clean, loud = (collator(next(iter(open_stream(toys, a, targets=folder)))) for a in (None, CLEAN))
    assert clean.batch.labels_S.tolist() == loud.batch.labels_S.tolist()
    assert (clean.batch.waveforms_BN != loud.batch.waveforms_BN).any(1).all() and loud.batch.masks_B is not None
    assert loud.batch.waveforms_BN.isfinite().all() and loud.batch.waveforms_BN.abs().max() <= 1
    assert torch.equal(clean.targets.distribution.ids_SK, loud.targets.distribution.ids_SK)
    assert torch.equal(clean.targets.queries_BWQE, loud.targets.queries_BWQE)


@pytest.mark.parametrize(("augmentation", "is_clean"), [(CLEAN, True), (SAME, False)])
def test_an_online_teacher_hears_what_the_config_says(toys, augmentation, is_clean):
    model = load_salmonn(toys / "teacher")
    student = build_student(model, str(toys / "parts" / "student-llm"), lora=Lora(rank=4), connector=Connector("new"))
    collator = Collator(OnlineTeacher(model), student, torch.device("cpu"), torch.float32)
    assert collator.shares_ears
    clean, loud = (collator(next(iter(open_stream(toys, a)))) for a in (None, augmentation))
    assert torch.equal(clean.targets.queries_BWQE, loud.targets.queries_BWQE) == is_clean
    with torch.no_grad():
        own, shared = student.hear(loud.batch), student.hear(loud.batch, loud.frames)
    assert torch.equal(own.queries_BWQE, shared.queries_BWQE)
    unmasked = dataclasses.replace(
        loud.batch, samples=[dataclasses.replace(s, mel_mask=None) for s in loud.batch.samples]
    )
    with torch.no_grad():
        assert not torch.equal(own.queries_BWQE, student.hear(unmasked).queries_BWQE)


def test_validation_is_never_augmented(toys, tmp_path):
    student = tiny.make_teacher(toys / "parts")
    heard = {True: set(), False: set()}

    def note(module, arguments):
        for waveform_N, length in zip(*arguments[:2]):
            heard[student.training].add(waveform_N[:length].numpy().tobytes())

    student.whisper.register_forward_pre_hook(note)
    Distiller(None, student, train=open_stream(toys, CLEAN), valid=toys / "data" / "valid", run=tmp_path,
              options=TrainConfig(steps=2, batch_size=12, warmup_steps=1, eval_every=1),
              answers=EvalConfig(max_new_tokens=2)).fit()  # fmt: skip
    clips = {
        split: {
            np.pad(s.waveform_N, (0, max(0, SAMPLE_RATE - len(s.waveform_N)))).tobytes()  # as ears hear a short clip
            for s in next(iter(ShardStream(toys / "data" / split, Order(batch_size=12, epochs=1))))
        }
        for split in ("train", "valid")
    }
    assert heard[False] == clips["valid"] and len(clips["valid"]) == 3
    assert len(heard[True]) == 24 and not heard[True] & clips["train"]  # another sound each epoch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["augment.teacher_hears=same", "augment.gain_share=1"], r"teacher_hears is 'same', but cached targets belong"),
        (["augment.speed_share=0.5"], r"speed_share is 0\.5, but loss\.feature is 1\.0 and compares windows"),
        (["augment.gain_share=1", "cache.frames=int8"], r"augment is set, but cache\.frames is 'int8'"),
        (["augment.gain_share=2"], r"augment\.gain_share is 2\.0, but a share is 0 to 1"),
        (["augment.noise=1"], r"noise"),
    ],
)
def test_augmentation_that_would_train_on_targets_of_another_sound_is_refused(toys, words, message):
    with pytest.raises(ValueError, match=message):
        load_config(toys / "toy.yaml", words)


def test_a_member_over_the_limit_of_the_config_is_refused_before_it_is_read(toys, tmp_path):
    (tmp_path / "train").mkdir()
    writer = TarWriter(tmp_path / "train" / "a.tar")
    writer.add("clip.flac", bytes(2**20 + 1))
    writer.close()
    config = load_config(toys / "toy.yaml", [f"data.folder={tmp_path}", "data.max_member_mb=1", "teacher.online=true"])
    teacher, student = NoTeacher(), SimpleNamespace(max_samples=480_000)
    with pytest.raises(ShardError, match=r"clip\.flac is 1048577 bytes, but a member may have 1048576"):
        open_training_stream(config, build_accelerator(), teacher, student)


def write_odd_shard(toys: Path, folder: Path) -> None:
    """Four samples: two in order, one whose JSON cannot be read, and one of a task of its own that is too short."""
    (folder / "train").mkdir()
    writer = TarWriter(folder / "train" / "a.tar")
    for number, seconds, task in ((0, 0.5, "asr"), (1, 0.5, "asr"), (2, 0.5, "asr"), (3, 0.01, "click")):
        waveform_N = tiny.tone(number, seconds)
        fields = {"text": "one", "task": task, "Q": None, "source": "toys", "duration": seconds,
                  "sha256": hash_waveform(waveform_N)}  # fmt: skip
        writer.add(f"k{number}.flac", encode_flac(waveform_N))
        writer.add(f"k{number}.json", b"{" if number == 2 else json.dumps(fields).encode())
    writer.close()


def test_only_clips_that_take_part_and_can_be_read_must_fit_the_ears(toys, tmp_path):
    write_odd_shard(toys, tmp_path)
    words = [f"data.folder={tmp_path}", f"runs={tmp_path}", "name=odd", "teacher.online=true", "train.batch_size=3"]
    (tmp_path / "odd").mkdir()
    model = load_salmonn(toys / "teacher")

    def open_with(*more: str) -> ShardStream:
        return open_training_stream(load_config(toys / "toy.yaml", [*words, *more]), build_accelerator(),
                                    OnlineTeacher(model), model)  # fmt: skip

    with pytest.raises(ValueError, match=r"clips last 0\.01 to 0\.50 s, but the ears of this run take"):
        open_with()
    stream = open_with("data.task_weights.click=0")
    assert sorted(sample.key for sample in next(iter(stream))) == ["k0", "k1"]
    assert '"key": "k2"' in (tmp_path / "odd" / "bad_samples.jsonl").read_text()


def test_what_the_config_says_reaches_the_augmentation(toys):
    words = ["augment.noise_range=[0,10]", "augment.noise_share=0.3", "augment.speed_share=1", "loss.feature=0"]
    config = load_config(toys / "toy.yaml", words)
    assert config.augment == Augmentation(noise_range=(0.0, 10.0), noise_share=0.3, speed_share=1.0)
    assert not Config().augment.is_active and np.isclose(config.augment.noise_range[1], 10)
