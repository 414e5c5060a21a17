"""A step's samples cut into micro-batches, collated, with the teacher's targets beside them. Knows no optimizer."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from distill.objective.schedule import sample_weight
from distill.objective.weighing import MicroBatch
from distill.training.onpolicy import StepAnswers
from shards.sample import SAMPLE_RATE, Sample
from shards.targets.header import CacheHeader
from students.ears import EARS, describe_ears
from teachers.files.loading import hash_frozen_parts
from teachers.salmonn import Salmonn
from teachers.teacher import Teacher
from teachers.words.batch import Batch


class Collator:
    """Makes micro-batches of samples.

    Args:
        teacher: whose targets go along.
        student: whose rows the batches are.
        device: where the tensors go.
        dtype: the data type of the products of what runs here: shared ears, an online teacher.
        task_weights: what the samples of a task count; 1 for one that is not named.
        step_answers: lets the student answer some of the samples first; None: none.
    """

    def __init__(self, teacher: Teacher, student: Salmonn, device: torch.device, dtype: torch.dtype,
                 task_weights: Mapping[str, float] = MappingProxyType({}),
                 step_answers: StepAnswers | None = None):  # fmt: skip
        self.teacher, self.student, self.device, self.dtype = teacher, student, device, dtype
        self.task_weights, self.step_answers = task_weights, step_answers
        model = teacher.model
        self.takes_frames = not teacher.needs_audio and not trains_ears(student)  # cached ones, as its own
        self.shares_ears = (
            model is not None
            and student.config.ears_seconds == model.config.ears_seconds
            and all(own is theirs for own, theirs in ((student.whisper, model.whisper), (student.second, model.second)))
        )

    def __call__(self, samples: Sequence[Sample], step: int = 0) -> MicroBatch:
        """Collate, and fetch or compute the targets; no samples make a stand-in of a moment of silence.

        Args:
            samples: of one micro-batch.
            step: from 0; the student's own answers depend on it.
        """
        if not samples:
            return MicroBatch(
                self.student.collate([self._silence()]).to(self.device), None, [False], [0.0], False, None
            )
        weights = [sample_weight(sample.task, self.task_weights, sample.weight) for sample in samples]
        samples, frames = self._answered(samples, step)
        with self._products():
            samples, is_pseudo = self._labelled(samples)
        batch = self.student.collate(samples).to(self.device)
        hears_the_same = self.shares_ears and all(sample.clean_N is None for sample in samples)
        if frames is None and hears_the_same:
            frames = self._frames(batch)
        with self._products():
            targets = self.teacher.targets(batch, frames if hears_the_same else None)
        if frames is None and targets is not None and self.takes_frames:
            frames = targets.frames
        return MicroBatch(batch, targets, is_pseudo, weights, True, frames)

    def _answered(self, samples: Sequence[Sample], step: int) -> tuple[Sequence[Sample], list[Tensor] | None]:
        """The samples, some with what the student says now, and the frames of frozen ears that it says so from."""
        chosen = [] if self.step_answers is None else self.step_answers.choose(samples, step)
        if not chosen:
            return samples, None
        batch = self.student.collate(samples, with_answer=False).to(self.device)
        if self.takes_frames:
            frames = self.teacher.kept_frames(batch)
        else:
            frames = None if trains_ears(self.student) else self._frames(batch)
        return self.step_answers(samples, chosen, step, frames), frames

    def _labelled(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """The samples with the text to learn, and whether that is the teacher's; what the student said now stays."""
        labelled, is_pseudo = self.teacher.label([sample for sample in samples if not sample.is_said_now])
        others = zip(labelled, is_pseudo)
        pairs = [(sample, False) if sample.is_said_now else next(others) for sample in samples]
        return [sample for sample, _ in pairs], [is_own for _, is_own in pairs]

    @torch.no_grad()
    def _frames(self, batch: Batch) -> list[Tensor]:
        """The frozen ears run once, for teacher and student."""
        with self._products():
            return self.student.frames(batch.waveforms_BN, batch.num_samples_B, batch.masks_B)

    def _products(self) -> torch.autocast:
        """The precision of whatever runs here, which is the caching job's too."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _silence(self) -> Sample:
        task = next(task for task, prompts in self.student.rows.prompts.by_task.items() if "{}" not in prompts[0])
        return Sample(
            "silence", np.zeros(max(SAMPLE_RATE // 10, self.student.min_samples), np.float32), "", task, None, "", ""
        )


def check_frames(header: CacheHeader | None, student: Salmonn) -> None:
    """Refuse cached frames that another encoder made than the student hears with, or of another length of the clips.

    Raises:
        ValueError: naming the encoders, or both lengths.
    """
    if header is None or header.identity["features"]["frames"] == "none" or trains_ears(student):
        return
    cached, heard = header.section("features")["ears_seconds"], student.config.ears_seconds
    if cached != heard:
        raise ValueError(
            f"ears_seconds of the student is {heard!r}, but the cache keeps frames of {cached!r}; cache again with "
            f"student.ears_seconds={heard}, or build the student with ears_seconds={cached!r}."
        )
    theirs, own = header.identity["teacher_weights"], hash_frozen_parts(student, EARS)
    other = [name for name in EARS if own.get(name) != theirs.get(name)]
    if has_other_form(header, student):
        other = list(EARS)
    if other:
        raise ValueError(
            f"cache.frames is {header.identity['features']['frames']!r}, but this student's ears are not the teacher's "
            f"({describe_ears(student.config, other)}); cache again with cache.frames=none, or set teacher.online=true."
        )


def has_other_form(header: CacheHeader, student: Salmonn) -> bool:
    """Whether a student's ears have other layers, bits or LoRA than those whose frames are cached."""
    teacher = header.section("teacher_config")
    return any(teacher[name] != own for name, own in student.config.ears_form.items())


def trains_ears(student: Salmonn) -> bool:
    """Whether a student's Whisper, or LoRA on it, is trained: it hears itself, and cached frames are but targets."""
    return any(p.requires_grad for p in student.whisper.parameters())


def split(samples: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    """Cut a list into `parts` runs whose lengths differ by one at most; some are empty when there are too few."""
    bounds = [round(i * len(samples) / parts) for i in range(parts + 1)]
    return [samples[a:b] for a, b in pairwise(bounds)]
