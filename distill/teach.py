"""Train a SALMONN of given parts, as SALMONN is trained: frozen ears and LLM, new Q-Former, projection and LoRA.

`distill teach CONFIG` with `teacher.llm` and `teacher.whisper`, in the loop that `train` describes; its two stages are
two configs, the second with `teach.start`. With `scratch.steps` the demo's teacher is made instead, from nothing: then
ears and LLM learn too.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from distill.commandline.starting import end_at_signals

    end_at_signals()

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from distill.caching.frames import KeptFrames, keep_frames
from distill.command import run_stage
from distill.config import Config, LossConfig, ScratchConfig, TeachConfig, TrainConfig
from distill.config.rules import HEAD_WIDTH
from distill.demo import scratch
from distill.distiller import Distiller, FitResult, Run
from distill.inputs import check_clips
from distill.run import find_valid, is_trained
from distill.teacher import resolve_ears
from distill.training.monitoring.trackers import check_trackers
from distill.training.ranks import build_accelerator, resolve_precision, say
from distill.training.runlock import RunLock
from distill.training.stopping import PREEMPTED
from shards.sample import SAMPLE_RATE
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from students.start import load_start_weights_
from students.student import train_own_
from teachers.files.checkpoint import save_checkpoint
from teachers.files.loading import build_salmonn, save_salmonn
from teachers.lora import Lora
from teachers.salmonn import Salmonn, SalmonnConfig
from teachers.words.templates import SALMONN_TEMPLATE

ONLY_CE = LossConfig(kl=0.0, feature=0.0)
FOLDER, CHECKPOINT = "teacher", "teacher.pth"  # inside the run's folder


def teach(config: Config) -> int:
    """Train the teacher that a config describes; what is done already is used again. Returns the exit code."""
    with RunLock(config.run_folder):
        return make_from_nothing(config) if config.scratch.steps else train_on_parts(config)


def train_on_parts(config: Config) -> int:
    """As `teach`, on parts that are given, in a folder that nobody else writes into.

    Raises:
        ValueError: the config names no parts, or a teacher that is trained already.
    """
    check_parts(config)
    check_trackers(config.train.trackers)
    accelerator = build_accelerator()
    teacher = build_teacher(config).to(accelerator.device)
    kept = keep_frames(config, teacher, accelerator) if config.cache.frames != "none" else None
    identity = {"teach": dataclasses.asdict(config.teach) | {"start": ""}}  # whose weights are the student's own
    distiller = Distiller(
        kept,
        teacher,
        train=open_stream(config, accelerator, teacher, kept),
        valid=find_valid(config, teacher, accelerator),
        loss=ONLY_CE,
        options=config.train,
        answers=config.eval,
        run=Run(config.run_folder, config.seed, config.precision, accelerator, identity),
    )
    if not is_trained(config, distiller):
        return PREEMPTED
    if accelerator.is_main_process:
        save_teacher(teacher, config)
    accelerator.wait_for_everyone()
    return 0


def check_parts(config: Config) -> None:
    """Refuse a config that does not say of what a teacher is to be made.

    Raises:
        ValueError: naming the field.
    """
    if config.teacher.path:
        raise ValueError(
            f"teacher.path is {config.teacher.path}, but `distill teach` makes a teacher and {FOLDER} of the run's "
            f"folder is where it goes; leave teacher.path out, or set teach.start to go on from that one."
        )
    if config.teacher.quantization != "none":
        raise ValueError(
            f"teacher.quantization is {config.teacher.quantization}, but a teacher is made of whole weights; leave it "
            f"out here, and set it where the teacher is asked."
        )
    for name in ("llm", "whisper"):
        if not getattr(config.teacher, name):
            raise ValueError(
                f"teacher.{name} is empty, but a teacher is made of parts; give a folder or a hub id, or set "
                f"scratch.steps above 0 for one from nothing."
            )


def build_teacher(config: Config) -> Salmonn:
    """The SALMONN of these parts at its start: LoRA and connector trainable, the rest frozen.

    Raises:
        FileNotFoundError, ValueError: a part, or the teacher to go on from, is not there or does not fit.
    """
    torch.manual_seed(config.seed)
    lora = lora_of(config.teach)
    teacher = build_salmonn(
        salmonn_config(config),
        lora=lora,
        dtype=resolve_precision(config.precision),
        ear_precision=resolve_ears(config, is_kept=config.cache.frames != "none"),
    )
    if config.teach.start:
        load_start_weights_(teacher, config.teach.start, lora=lora, quantization=None, field="teach.start")
    return train_own_(teacher)


def salmonn_config(config: Config) -> SalmonnConfig:
    """What the teacher is made of."""
    parts, teach = config.teacher, config.teach
    named = ("llm", "whisper", "second", "second_kind", "end_token", "bos_token", "prompts", "front_end")
    sizes = (
        "window_seconds",
        "num_queries",
        "windows",
        "ears_seconds",
        "qformer_width",
        "qformer_layers",
        "qformer_dropout",
    )
    return SalmonnConfig(
        **{name: getattr(parts, name) for name in named},
        **{name: getattr(teach, name) for name in sizes},
        template=parts.template or SALMONN_TEMPLATE,
        stride_seconds=teach.window_seconds,
        qformer_heads=teach.qformer_width // HEAD_WIDTH,
        qformer_ffn=4 * teach.qformer_width,
    )


def lora_of(teach: TeachConfig) -> Lora:
    """The teacher's LoRA settings."""
    return Lora(teach.lora_rank, teach.lora_alpha, teach.lora_dropout, tuple(teach.lora_targets))


def open_stream(config: Config, accelerator, teacher: Salmonn, kept: KeptFrames | None) -> ShardStream:
    """The labelled training samples of this rank, with their frames when those are kept.

    Raises:
        ValueError: a clip is shorter or longer than the ears hear, or see `ShardStream`.
    """
    data = config.data
    stream = ShardStream(
        config.shards("train"),
        Order(
            batch_size=config.train.batch_size,
            seed=config.seed,
            task_weights=data.task_weights,
            batch_seconds=data.batch_seconds or None,
            bucket_batches=data.bucket_batches,
        ),
        Selection(targets=kept and kept.cache_folder, labelled_share=data.labelled_share, labelled_only=True),
        Limits(
            workers=data.workers,
            max_bad=data.max_bad,
            max_member_bytes=data.max_member_mb * 2**20,
            bad_samples=config.run_folder / "bad_samples.jsonl",
        ),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        augmentation=config.augment,
        decode=kept is None,
        max_seconds=teacher.max_samples / SAMPLE_RATE,
    )
    check_clips(stream, teacher)
    return stream


def save_teacher(teacher: Salmonn, config: Config) -> Path:
    """Write the teacher's folder, and SALMONN's own file beside it where that is asked for."""
    folder, path = config.run_folder / FOLDER, config.run_folder / CHECKPOINT
    save_salmonn(teacher, folder, settings={"lora": dataclasses.asdict(lora_of(config.teach))})
    say(None, f"teacher: {folder}")
    if config.teach.checkpoint:
        save_checkpoint(teacher, path)
        say(None, f"teacher: {path}, SALMONN's own format")
    return folder


def make_from_nothing(config: Config) -> int:
    """As `teach`, from nothing, in a folder that nobody else writes into."""
    accelerator = build_accelerator(takes_deepspeed=False)
    folder = config.run_folder / "scratch"
    mark = scratch.completion_mark(config)
    if scratch.is_done(folder, mark):
        say(accelerator, f"teacher: {folder / 'teacher'} exists, used again")
        return 0
    is_there = scratch.has_parts(folder, mark)
    accelerator.wait_for_everyone()  # until every rank has looked
    if not is_there:
        scratch.make_parts(config, folder, accelerator)
    teacher = scratch.build_teacher(config, folder)
    if train_whole(config, teacher, accelerator, folder / "run").preempted:
        return PREEMPTED
    if accelerator.is_main_process:
        save_salmonn(teacher, folder / "teacher")
        scratch.write_mark(folder / scratch.DONE, mark)
    accelerator.wait_for_everyone()
    return 0


def train_whole(config: Config, teacher: Salmonn, accelerator, folder: Path) -> FitResult:
    """Cross-entropy on the labelled clips; connector and LLM learn, and the ears where their frames are not kept."""
    kept = keep_frames(config, teacher, accelerator) if config.cache.frames != "none" else None
    stream = ShardStream(
        config.shards("train"),
        Order(
            batch_size=config.scratch.batch_size,
            seed=config.seed,
            task_weights=config.data.task_weights,
            bucket_batches=config.data.bucket_batches,
        ),
        Selection(targets=kept and kept.cache_folder, labelled_only=True),
        Limits(workers=config.data.workers),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        decode=kept is None,
    )
    identity = {"scratch": dataclasses.asdict(config.scratch), "corpus": dataclasses.asdict(config.corpus)}
    return Distiller(
        kept,
        teacher,
        train=stream,
        loss=ONLY_CE,
        options=train_options(config.scratch, accelerator.num_processes),
        run=Run(folder, config.seed, config.precision, accelerator, identity),
    ).fit()


def train_options(scratch: ScratchConfig, num_ranks: int) -> TrainConfig:
    """The teacher's training loop."""
    return dataclasses.replace(
        TrainConfig(),
        steps=scratch.steps,
        batch_size=scratch.batch_size,
        micro_batch_size=-(-scratch.batch_size // num_ranks),
        learning_rate=scratch.learning_rate,
        warmup_steps=50,
        save_every=200,
    )


def main(args: argparse.Namespace) -> int:
    """Run `distill teach`."""
    return teach(args.config)


if __name__ == "__main__":
    sys.exit(run_stage(teach))
