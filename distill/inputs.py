"""What `Distiller` may be given, as what it works with: teachers, students and samples by object, path or content."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from distill.config import CacheConfig, Config, LossConfig, TeacherConfig
from distill.config.rules import used_terms
from distill.objective.terms.needs import check_needs, held_by_cache
from distill.objective.weighing import Terms
from distill.teacher import load_teacher
from shards.field_types import expand_home
from shards.files.hash import remember_hash
from shards.manifests.manifest import LINES_SUFFIXES, KnownTasks
from shards.packing.items import pack_items
from shards.packing.pack import pack
from shards.sample import SAMPLE_RATE
from shards.streaming.catalog import check_channels
from shards.streaming.stream import ShardStream
from shards.targets.header import HEAD_INPUT, HEADER
from shards.tars.source import expand_shards, is_remote
from students.pretrained import Student
from students.student import load_student, train_own_
from teachers.cached import CachedTeacher
from teachers.online import OnlineTeacher
from teachers.salmonn import Salmonn
from teachers.teacher import NoTeacher, Teacher

NO_TEACHER = NoTeacher()
MANIFEST_SUFFIXES = (".json", *LINES_SUFFIXES)


def as_teacher(teacher, loss: LossConfig, precision: str) -> Teacher:
    """A teacher: none, one of the library's or of one's own, a loaded model, a cache's folder or URL, a saved folder, a
    checkpoint by its `TeacherConfig`.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is none of these, or a checkpoint without its frozen parts.
    """
    teacher = expand_home(teacher)
    if isinstance(teacher, str | Path) and (is_remote(str(teacher)) or (Path(teacher) / HEADER).is_file()):
        return CachedTeacher(teacher)
    if isinstance(teacher, str | Path):
        teacher = TeacherConfig(path=str(teacher))
    if isinstance(teacher, TeacherConfig):
        teacher = load_teacher(Config(teacher=teacher, precision=precision))
    if isinstance(teacher, Student):
        is_changed = teacher.model.only_answers and teacher.folder is not None
        teacher = load_student(teacher.folder) if is_changed else teacher.model  # targets are of what was trained
    if isinstance(teacher, Salmonn):
        return as_online_teacher(teacher, loss)
    if teacher is None:
        return NO_TEACHER
    if isinstance(teacher, Teacher):
        return teacher
    raise ValueError(
        f"teacher is a {type(teacher).__name__}, but must be a model, a path, a TeacherConfig, a Teacher of one's own "
        f"(docs/extending.md) or None; give one of them."
    )


def as_online_teacher(model: Salmonn, loss: LossConfig) -> OnlineTeacher:
    """A model as a teacher that is asked for what the objective needs, as the command line's defaults do it."""
    cache = CacheConfig()
    layers = [layer for layer in loss.layer_pairs if layer != HEAD_INPUT] if "hidden" in used_terms(loss) else []
    return OnlineTeacher(
        model,
        k=cache.k,
        temperatures=sorted({1.0, loss.temperature}),
        answers=cache.answers,
        max_new_tokens=cache.max_new_tokens,
        num_beams=cache.num_beams,
        hidden_layers=layers,
    )


def as_student(student, dtype: torch.dtype) -> Salmonn:
    """A student's model: itself, that of a `Student`, or a saved folder's, which goes on to be trained.

    Raises:
        FileNotFoundError: the folder holds no student.
        ValueError: it is none of these.
    """
    if isinstance(student, Student) and student.model.only_answers and student.folder is not None:
        student = student.folder  # whose weights are those that were trained
    if isinstance(student, Student):
        student = student.model
        return student if any(p.requires_grad for p in student.parameters()) else train_own_(student)
    if isinstance(student, str | Path):
        return train_own_(load_student(student, dtype=dtype))
    if isinstance(student, Salmonn):
        return student
    raise ValueError(
        f"student is a {type(student).__name__}, but must be a model, as build_student makes it, or the folder of a "
        f"saved one; give one of them."
    )


def as_shards(samples: str | Path | Iterable, folder: Path, name: str, student: Salmonn, max_seconds: float,
              say: Callable[[str], None]) -> str | Path:  # fmt: skip
    """Shards: as they are given, or packed into `folder` from a manifest or from samples.

    Args:
        samples: shards' folder, pattern or URL; a manifest; or what `shards.packing.items` packs.
        folder: the folder of the run's own data.
        name: the name of the split.
        student: whose prompts say which tasks there are.
        max_seconds: the longest duration of a clip.
        say: is told what was packed.
    """
    samples = expand_home(samples)
    is_named = isinstance(samples, str | Path)
    if is_named and Path(samples).suffix not in MANIFEST_SUFFIXES:
        return samples
    prompts = student.rows.prompts
    checks = {"tasks": KnownTasks(prompts.by_task.keys(), prompts.asking)}
    if not is_named:
        return pack_items(samples, folder, name, max_seconds=max_seconds, say=say, **checks)
    path = Path(samples)
    stem = re.sub(r"\W", "-", path.stem)
    out = folder / f"{name}-{remember_hash(path)[:16]}" if path.is_file() else folder / name
    say(f"{name}: {pack(path, out, name=stem, **checks)}")
    return out


def check_clips(stream: ShardStream, student: Salmonn, teacher: Teacher = NO_TEACHER) -> None:
    """Refuse a clip of the run that the student or a teacher that runs cannot hear now, and not after hours.

    Raises:
        ValueError: naming the lengths.
    """
    models = [model for model in (student, teacher.model) if model is not None]
    least = max(model.min_samples for model in models) / SAMPLE_RATE
    most = min(model.max_samples for model in models) / SAMPLE_RATE
    seconds = stream.catalog.seconds[stream.plan.rows]
    seconds = seconds[seconds > 0]  # 0: the sample's JSON cannot be read; the stream skips it and says so
    if len(seconds) and (seconds.min() < least - 1e-4 or seconds.max() > most + 1e-4):
        raise ValueError(
            f"clips last {seconds.min():.2f} to {seconds.max():.2f} s, but the ears of this run take {least:g} to "
            f"{most:g} s; pack clips of these lengths, or choose another student.whisper."
        )


def check_heard_alike(stream: ShardStream, valid: str | Path) -> None:
    """Refuse a validation split in which several channels are heard otherwise than in the stream's shards.

    Raises:
        ShardError: naming what was heard in each.
    """
    names = [*stream.catalog.names, *expand_shards(valid)]
    check_channels(dict.fromkeys(name.rpartition("/")[0] or "." for name in names))


def check_cached(teacher: Teacher, loss: LossConfig, terms: Terms, student: Salmonn, stream: ShardStream) -> None:
    """Refuse a run that asks of its cache what that does not hold, or reads its samples otherwise than it was made.

    Raises:
        ValueError: naming both values.
    """
    if teacher.header is None:
        return
    identity, folder = teacher.header.identity, teacher.cache_folder
    check_needs(terms, loss, held_by_cache(identity))
    windows = identity["features"]["windows"]
    if windows not in (None, "all", student.config.windows):  # frames of all windows are those of some too
        raise ValueError(
            f"windows of the student is {student.config.windows!r}, but {folder} keeps the frames of "
            f"{windows!r}; build the student with windows={windows!r}, or cache again."
        )
    if stream.selection.labelled_share != teacher.labelled_share:
        raise ValueError(
            f"labelled_share of the stream is {stream.selection.labelled_share:g}, but {folder} was made with "
            f"{teacher.labelled_share:g}, and a clip's answer was chosen by it; open the stream with that."
        )
