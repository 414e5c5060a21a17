"""How a teacher and a student meet: id by id, up to the ids they share, or through the bytes of the answers.

A `CrossTeacher` looks like any other teacher; its targets are a cache's or an online teacher's, in the student's ids.
It holds two tokenizers and no model of its own, so a cache is enough.

Shapes: S supervised positions of the student, K kept ids.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from distill.objective.alignment import NO_CHUNK, Alignment
from distill.objective.crosstokenizer import CrossTargets, Translator
from distill.objective.vocabulary import shared_vocab_size, splits_text_alike
from shards.sample import Sample
from teachers.salmonn import Salmonn
from teachers.targets import Targets
from teachers.teacher import Teacher
from teachers.words.batch import Batch
from teachers.words.rows import RowTokenizer
from teachers.words.vocabulary import Vocabulary, check_vocabularies


@dataclass(frozen=True)
class CrossedTargets(Targets):
    """A teacher's own targets, at its own tokens, and what they say about the student's."""

    cross: CrossTargets = field(kw_only=True)


class CrossTeacher(Teacher):
    """A teacher whose tokenizer is another than the student's.

    Args:
        teacher: any that knows its `rows`.
        student: the model that learns.
        temperature: the temperature of the divergence where the tokens match.
    """

    is_crossed = True

    def __init__(self, teacher: Teacher, student: Salmonn, temperature: float):
        self.teacher, self.student, self.temperature = teacher, student, temperature
        self.model, self.header, self.cache_folder = teacher.model, teacher.header, teacher.cache_folder
        self.needs_audio, self.labelled_share, self.widths = teacher.needs_audio, teacher.labelled_share, teacher.widths
        self.translator = Translator(self.rows.tokenizer, student.tokenizer, self.rows.end, student.rows.end)
        self.num_unaligned = 0  # answers that one side's tokens do not spell: cross-entropy alone learns from them

    @cached_property
    def vocab(self) -> Vocabulary:
        """The student's, whose ids its targets are in."""
        return Vocabulary.of(self.student.tokenizer)

    @property
    def rows(self) -> RowTokenizer:
        """The teacher's own."""
        return self.teacher.rows

    @property
    def identity(self) -> dict:
        """The teacher's."""
        return self.teacher.identity

    @property
    def scores_any_answer(self) -> bool:
        """As the teacher's own."""
        return self.teacher.scores_any_answer

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """As the teacher's own, of the text of each answer."""
        return self.teacher.score(samples)

    def kept_frames(self, batch: Batch) -> list[Tensor] | None:
        """As the teacher's own."""
        return self.teacher.kept_frames(batch)

    def check_shards(self, shards: Sequence[str]) -> None:
        """As the teacher's own."""
        self.teacher.check_shards(shards)

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """Give clips without text the teacher's answer, and say which those are; ids are each side's own."""
        labelled, is_pseudo = self.teacher.label(samples)
        return [replace(sample, answer_ids=None) for sample in labelled], is_pseudo

    def targets(self, batch: Batch, frames: list[Tensor] | None = None) -> CrossedTargets:
        """The teacher's targets of its own tokens, and translated to the student's; arguments as any teacher's."""
        rows = [self.rows.row(sample, with_answer=True, first_prompt=False) for sample in batch.samples]
        labels_S = torch.tensor([token for row in rows for token in row.answer], device=batch.labels_S.device)
        said = self.teacher.targets(replace(batch, rows=rows, labels_S=labels_S), frames)
        alignment = Alignment.concatenate(
            [self._align(s, theirs.answer, own.answer) for s, theirs, own in zip(batch.samples, rows, batch.rows)]
        ).to(labels_S.device)
        sparse = said.distribution.at(self.temperature)
        cross = self.translator.translate(alignment, labels_S, batch.labels_S, said.label_logprobs_S, sparse)
        return CrossedTargets(
            **{f.name: getattr(said, f.name) for f in fields(said)} | {"hidden": None, "hidden_by_layer": {}},
            cross=cross,
        )

    def _align(self, sample: Sample, teacher_ids: list[int], student_ids: list[int]) -> Alignment:
        try:
            return self.translator.align(sample.text, teacher_ids, student_ids)
        except ValueError as error:
            self.num_unaligned += 1
            warnings.warn(f"sample {sample.key} is learned by cross-entropy alone: {error}", stacklevel=2)
            return unaligned(len(teacher_ids), len(student_ids))


def unaligned(num_teacher_tokens: int, num_student_tokens: int) -> Alignment:
    """An answer without a chunk."""
    none = torch.zeros(0, dtype=torch.long)
    sides = [torch.full((size,), NO_CHUNK) for size in (num_teacher_tokens, num_student_tokens)]
    return Alignment(*sides, 0, none, none)


def match_vocab(teacher: Teacher, student: Salmonn, cross_tokenizer: str, temperature: float) -> tuple[Teacher, int]:
    """The teacher as this student can learn from it, and how many leading ids take part in the losses.

    Ids that mean the same tokens are compared as they are; a padded head, or tokens that only one side has added
    behind the others, take no part. Where they mean other tokens, or the same tokens are cut in another way, the
    teacher is translated if that is asked for. If it is not, tables that differ are refused here, and answers that are
    cut in another way when they come, each by its key (`vocabulary.check_answer_ids`).

    Args:
        teacher: in its own tokens.
        student: the model that learns.
        cross_tokenizer: "refuse" or "chunk".
        temperature: the temperature of the divergence.

    Raises:
        ValueError: the ids mean other tokens and `cross_tokenizer` is "refuse".
    """
    own_ids = student.tokenizer.get_vocab()
    num_rows = student.llm.config.get_text_config().vocab_size
    own_size = min(shared_vocab_size(own_ids, own_ids), num_rows)
    if not teacher.has_targets:
        return teacher, own_size
    is_same = Vocabulary.of(student.tokenizer).sha256 == teacher.vocab.sha256
    shared = own_size if is_same else _count_shared(teacher.rows.tokenizer.get_vocab(), own_ids, num_rows)
    means_the_same = is_same or max(student.rows.end_ids) < shared
    if cross_tokenizer == "chunk" and not (means_the_same and _reads_alike(teacher.rows, student.rows, shared)):
        return CrossTeacher(teacher, student, temperature), own_size
    if not means_the_same:
        check_vocabularies(teacher.vocab, student.tokenizer)
    return teacher, shared


def _count_shared(teacher_ids, own_ids, num_rows: int) -> int:
    """Leading ids that mean the same to both and have a row in the student's head; 0 where one of them differs."""
    try:
        return min(shared_vocab_size(teacher_ids, own_ids), num_rows)
    except ValueError:
        return 0


def _reads_alike(teacher: RowTokenizer, student: RowTokenizer, shared: int) -> bool:
    """Whether both make the same ids of every answer, where these mean the same."""
    return teacher.end_ids == student.end_ids and splits_text_alike(teacher.tokenizer, student.tokenizer, shared)
