"""Train a student: `accelerate launch -m distill.run CONFIG [key=value …]`. A thin caller of `Distiller`."""

if __name__ == "__main__":  # before what takes seconds to import
    from distill.commandline.starting import end_at_signals

    end_at_signals()

import argparse
import sys
from pathlib import Path

import yaml

from distill.answers import check_answers
from distill.caching.capture import Capturer
from distill.caching.filter import load_weights
from distill.caching.identity import describe_teacher
from distill.caching.scoring import ScoredCache
from distill.command import run_stage
from distill.config import SPLITS, Config, to_yaml
from distill.config.files import Loader
from distill.distiller import Distiller, Run
from distill.inputs import check_clips
from distill.student import lora_of, make_student, student_llm, tell_ears_error
from distill.teacher import load_teacher, precision_name, teach_online
from distill.training.identity import identify_settings
from distill.training.monitoring.trackers import check_trackers
from distill.training.ranks import build_accelerator, resolve_precision, say
from distill.training.resuming import report_changes
from distill.training.runlock import RunLock
from distill.training.stopping import PREEMPTED
from shards.files.write import write_atomically
from shards.sample import SAMPLE_RATE
from shards.streaming.catalog import check_channels, is_packed
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.codecs.table import find_codec
from shards.tars.source import expand_shards
from students.student import save_student
from teachers.cached import CachedTeacher
from teachers.salmonn import Salmonn
from teachers.teacher import Teacher


def run(config: Config) -> int:
    """Distill the config's teacher into its student; returns the exit code."""
    with RunLock(config.run_folder):
        return train_student(config)


def train_student(config: Config) -> int:
    """As `run`, in a folder that nobody else writes into."""
    check_trackers(config.train.trackers)
    check_channels(config.shards(split) for split in SPLITS)
    accelerator = build_accelerator()
    folder = config.run_folder / "student"
    # a cache of what enters the head is known by the head
    needs_llm = speaks_in_steps(config) or find_codec(config.cache.codec).needs_head
    ears = "" if config.teacher.online else precision_name(config)  # the student's alone, once targets are cached
    model = load_teacher(config, llm_weights=needs_llm, ears=ears)
    if speaks_in_steps(config):
        model.to(accelerator.device)
    student = make_student(config, model, resolve_precision(config.precision), lambda text: say(accelerator, text))
    student.to(accelerator.device)
    tell_ears_error(config, model, student, lambda text: say(accelerator, text))
    teacher = wrap_teacher(config, model)
    del model  # of a cached teacher that need not score only the ears live on, in the student
    distiller = Distiller(
        teacher,
        student,
        train=open_training_stream(config, accelerator, teacher, student),
        valid=find_valid(config, student, accelerator),
        loss=config.loss,
        options=config.train,
        answers=config.eval,
        run=Run(
            config.run_folder,
            config.seed,
            config.precision,
            accelerator,
            identify_run(config, teacher),
            config.on_policy,
        ),
    )
    if not is_trained(config, distiller):
        return PREEMPTED
    if accelerator.is_main_process:
        save_student(student, folder, lora=lora_of(config), quantization=config.student.quantization)
        say(accelerator, f"student: {folder}")
    accelerator.wait_for_everyone()
    return 0


def is_trained(config: Config, distiller: Distiller) -> bool:
    """Train until the last step, with the config written beside it; False where the run was told to stop before."""
    if distiller.accelerator.is_main_process:  # now that the folder proved to be this run's
        if distiller.saved is not None:
            report_changed_fields(config)
        write_atomically(config.run_folder / "config.yaml", to_yaml(config))
    return not distiller.fit().preempted


def report_changed_fields(config: Config) -> None:
    """Say which settings of a run that goes on are not those that its folder holds."""
    path = config.run_folder / "config.yaml"
    try:
        there = yaml.load(path.read_text(), Loader)
    except (OSError, ValueError, yaml.YAMLError):
        there = None
    if not isinstance(there, dict):
        return say(None, f"{path} cannot be read, so what changed since the run began is not known")
    here = yaml.load(to_yaml(config), Loader)
    report_changes(there, here, config.train.allow_change, lambda text: say(None, f"{config.run_folder} {text}"))


def speaks_in_steps(config: Config) -> bool:
    """Whether the teacher itself hears and speaks in the steps: of all clips, or of what the student says of some."""
    return config.teacher.online or config.on_policy.step_share > 0


def wrap_teacher(config: Config, model: Salmonn) -> Teacher:
    """The teacher's targets: computed now, or read from the cache once it proved to be this teacher's.

    Where the student answers within the steps, the teacher stays beside its cache and scores those answers alone.
    """
    if config.teacher.online:
        return teach_online(config, model)
    cached = config.cache_folder, describe_teacher(model, config)
    if config.on_policy.step_share:
        teacher = ScoredCache(*cached, Capturer(teach_online(config, model), config))
    else:
        teacher = CachedTeacher(*cached)
    teacher.check_shards(expand_shards(config.shards("train")))
    return teacher


def identify_run(config: Config, teacher: Teacher) -> dict:
    """What a config says of a run's models, over what `training.identity` finds itself: by contents, not by places."""
    return {
        "student": identify_settings(config.student, student_llm(config)),
        "teacher": {"online": config.teacher.online},
        "targets": (teacher.header or describe_teacher(teacher.model, config, is_kept=False)).identity,
    }


def open_training_stream(config: Config, accelerator, teacher: Teacher, student: Salmonn) -> ShardStream:
    """The training samples of this rank, augmented, with their targets when those are cached.

    Raises:
        ValueError: a clip is shorter or longer than student and online teacher hear, or see `ShardStream`.
    """
    stream = ShardStream(
        config.shards("train"),
        Order(
            batch_size=config.train.batch_size,
            seed=config.seed,
            task_weights=config.data.task_weights,
            batch_seconds=config.data.batch_seconds or None,
            bucket_batches=config.data.bucket_batches,
        ),
        Selection(
            targets=teacher.cache_folder,
            student_answers=find_answers(config, teacher),
            student_share=config.on_policy.share,
            labelled_share=config.data.labelled_share,
            labelled_only=config.data.labelled_only,
            sample_weights=load_weights(Path(config.data.weights), teacher.header) if config.data.weights else {},
        ),
        Limits(
            workers=config.data.workers,
            max_bad=config.data.max_bad,
            max_member_bytes=config.data.max_member_mb * 2**20,
            bad_samples=config.run_folder / "bad_samples.jsonl",
        ),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        augmentation=config.augment,
        decode=speaks_in_steps(config) or config.cache.frames == "none" or config.student.hearing.trains_ears,
        max_seconds=student.max_samples / SAMPLE_RATE,
    )
    check_clips(stream, student, teacher)
    return stream


def find_answers(config: Config, teacher: Teacher) -> Path | None:
    """The folder of the answers that the run learns from, once proved to be its student's; None without a round."""
    if not config.on_policy.share:
        return None
    return check_answers(config, teacher.header or describe_teacher(teacher.model, config))


def find_valid(config: Config, student: Salmonn, accelerator) -> str | Path | None:
    """The validation split's folder, once the student can hear its clips; None where there is none."""
    folder = config.shards("valid")
    if not is_packed(folder):
        if config.train.eval_every:
            every = config.train.eval_every
            say(accelerator, f"train.eval_every is {every}, but {folder} holds no shards: nothing is validated")
        return None
    check_clips(ShardStream(folder, Order(batch_size=1, shuffle=False, epochs=1)), student)
    return folder


def main(args: argparse.Namespace) -> int:
    """Run `distill run`."""
    return run(args.config)


if __name__ == "__main__":
    sys.exit(run_stage(run))
