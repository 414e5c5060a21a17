"""On-policy rounds: the student answers training clips, the teacher scores those answers, and both go to a cache.

Run with `accelerate launch -m distill.answers CONFIG on_policy.round=N [key=value …]`, on as many processes as there
are; like the caching job it ends in the same files however often it was stopped. A student that only ever reads its
teacher's and its labels' prefixes never sees its own mistakes; here it does, and the teacher says what comes next.

Source: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024 (arXiv 2306.13649), by rounds instead of
in every step, as `training/onpolicy.py` does it.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from distill.commandline.starting import end_at_signals

    end_at_signals()

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distill.cache import write_missing
from distill.caching.capture import Capturer
from distill.caching.identity import describe_teacher
from distill.caching.job import FIGURES
from distill.command import run_stage
from distill.config import Config
from distill.config.places import check_student
from distill.objective.crossteacher import match_vocab
from distill.teacher import load_to_keep
from distill.training.onpolicy import OwnAnswers
from distill.training.ranks import build_accelerator, resolve_precision
from distill.training.runlock import RunLock
from shards.sample import Sample
from shards.streaming.catalog import hash_shards
from shards.targets.header import HEADER, CacheHeader, read_header
from shards.targets.record import TargetRecord
from shards.targets.store import TargetReader, TargetWriter, is_of_other_audio, read_done
from shards.tars.source import expand_shards
from students.start import identify_student
from students.student import load_student
from teachers.salmonn import Salmonn

ROUND = "on_policy"  # the field that only the header of a round has


def answers(config: Config) -> int:
    """Let the run's student answer, and write the teacher's targets of its answers; returns the exit code.

    Raises:
        FileNotFoundError: the run has saved no student.
        ValueError: the config names no round.
    """
    if not config.on_policy.round:
        raise ValueError("on_policy.round is 0, but answers belong to a round; set on_policy.round=1, or the next.")
    folder = check_student(config)
    with RunLock(config.run_folder, shared=True):  # others may answer too, but nobody may train what answers
        return answer_shards(config, folder)


def answer_shards(config: Config, folder: Path) -> int:
    """As `answers`, by the student in a folder that nobody writes into."""
    accelerator, dtype = build_accelerator(), resolve_precision(config.precision)
    teacher = load_to_keep(config, accelerator.device)
    header = describe_round(config, describe_teacher(teacher.model, config), folder)
    check_folder(config.answers_folder, header)
    student = load_student(folder, dtype=dtype).to(accelerator.device)
    answerer = Answerer(student, Capturer(teacher, config), config)
    shards = expand_shards(config.shards("train"))
    writer = TargetWriter(config.answers_folder, header, hash_shards(shards), FIGURES)
    write_missing(config, answerer, writer, shards, accelerator, config.on_policy.clips)
    return 0


class Answerer:
    """Makes the records of a batch: the student's answers, and what the teacher says at each of their tokens.

    An answer is drawn from numbers that seed, round and key decide, so it depends on no rank and on no batch.

    Args:
        student: in evaluation mode.
        capture: makes the teacher's records.
        config: the configuration of the run.

    Raises:
        ValueError: the student has other prompts than the teacher, or another vocabulary where that is refused.
    """

    def __init__(self, student: Salmonn, capture: Capturer, config: Config):
        self.student, self.capture, self.config = student, capture, config
        teacher = capture.teacher
        met, num_shared = match_vocab(teacher, student, config.loss.cross_tokenizer, config.loss.temperature)
        if not met.is_crossed and student.rows.prompts != teacher.rows.prompts:
            raise ValueError(
                f"prompts of the student {config.run_folder / 'student'} are not those of the teacher, but both must "
                f"answer the same question; let a student of this teacher answer, or set teacher.prompts."
            )
        self.say = OwnAnswers(student, teacher.rows.end_ids, 0 if met.is_crossed else num_shared, config.on_policy)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, TargetRecord]:
        """Each sample's record, by key."""
        return self.capture.score(self.answer(samples))

    def answer(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the student's answers as their own."""
        names = [f"{self.config.seed}/{self.config.on_policy.round}/{sample.key}" for sample in samples]
        return self.say(samples, names)


def describe_round(config: Config, teacher: CacheHeader, student: Path) -> CacheHeader:
    """The header of a round: the teacher's, the saved student that answers, and how."""
    how = {name: value for name, value in asdict(config.on_policy).items() if name not in ("share", "step_share")}
    return CacheHeader({**teacher.identity, ROUND: {**how, "seed": config.seed, "student": identify_student(student)}})


def check_folder(folder: Path, header: CacheHeader) -> None:
    """Refuse to write beside the answers of another student, or beside answers made in another way.

    Raises:
        ValueError: naming what differs, with both values.
    """
    if not (folder / HEADER).exists():
        return
    stored, own = (flatten(found.identity[ROUND]) for found in (read_header(folder), header))
    if stored != own:
        raise ValueError(
            f"{folder} holds answers with {show(stored, own)}, but this job's have {show(own, stored)}; choose another "
            f"on_policy.round, or remove the folder."
        )


def check_answers(config: Config, teacher: CacheHeader) -> Path:
    """The folder of the round that a run is to learn from, once it proved to be of its teacher and its own student.

    Args:
        config: the configuration of the run.
        teacher: what the run's teacher is.

    Raises:
        FileNotFoundError: there are no answers.
        ValueError: another teacher scored them, another student gave them, or some are missing; both values are named.
    """
    folder, start, number = config.answers_folder, Path(config.student.start), config.on_policy.round
    if not (folder / HEADER).is_file():
        raise FileNotFoundError(
            f"on_policy.round is {number}, but {folder} holds no answers; run `distill answers` with the name= of the "
            f"run that trained {start}."
        )
    stored = read_header(folder)
    CacheHeader({n: value for n, value in stored.identity.items() if n != ROUND}).check(teacher, folder / HEADER)
    gave, own = stored.identity[ROUND]["student"], identify_student(start)
    if gave != own:
        raise ValueError(
            f"{folder} holds answers of a student with {show(gave, own)}, but student.start {start} has "
            f"{show(own, gave)}; start from the student that answered, or let this one answer a round of its own."
        )
    check_whole(folder, stored, expand_shards(config.shards("train")))
    return folder


def check_whole(folder: Path, header: CacheHeader, shards: Sequence[str]) -> None:
    """Refuse a round that lacks the answers to some of these audio shards, or has them to others of their names.

    Raises:
        ValueError: naming the first few, or both sizes of one that is damaged.
    """
    audio, done = hash_shards(shards), {shard: read_done(folder, shard) for shard in shards}
    missing = [shard for shard in shards if done[shard] is None or is_of_other_audio(done[shard], audio, shard)]
    if missing:
        raise ValueError(
            f"{folder} lacks the answers to {len(missing)} of {len(shards)} shards ({', '.join(missing[:5])}), but "
            f"training needs them all; run `distill answers` again, it goes on where it stopped."
        )
    TargetReader(folder, header).check_shards(shards)


def flatten(how: dict) -> dict[str, object]:
    """A round's fields with those of its student beside them."""
    own = {name: value for name, value in how.items() if name != "student"}
    return own | {f"student {name}": value for name, value in how["student"].items()}


def show(values: dict, others: dict) -> str:
    """The fields that differ from the others', in one line, hashes cut."""
    names = [name for name in sorted(values | others) if values.get(name) != others.get(name)]
    return ", ".join(f"{name} {str(values.get(name))[:16]}" for name in names)


def main(args: argparse.Namespace) -> int:
    """Run `distill answers`."""
    return answers(args.config)


if __name__ == "__main__":
    sys.exit(run_stage(answers))
