"""What a teacher is to a student: the one protocol, what stands for none, and whose answer to a clip is learned.

Knows no model, no cache and no loss. Implementations: `teachers.online` (computes), `teachers.cached` (reads),
`NoTeacher`, and `distill.objective.crossteacher` (of another tokenizer, around one of the others).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from shards.sample import Sample
from shards.targets.header import CacheHeader
from teachers.salmonn import Salmonn
from teachers.targets import Targets
from teachers.words.batch import Batch
from teachers.words.rows import RowTokenizer
from teachers.words.vocabulary import Vocabulary


class Teacher(ABC):
    """What a student learns from: whose answers, and what is said at each of their tokens.

    A teacher of one's own says `vocab`, `rows` and `identity`, and has `label` and `targets`; all else stands here as
    it is for one without a model and without a cache (docs/extending.md).
    """

    has_targets = True  # False: it says nothing, and cross-entropy alone is learned
    is_crossed = False  # whether its tokens are another tokenizer's, so that its targets have a `cross`
    model: Salmonn | None = None  # that runs behind it: goes to the device, may share its ears, bounds the clips
    header: CacheHeader | None = None  # of the cache that it reads
    cache_folder: str | Path | None = None  # which the stream joins
    needs_audio = True  # of a student with its frozen ears; False: it brings the encoders' frames
    labelled_share: float | None = None  # of the clips, whose texts its targets were made with; None: as may be
    widths: Mapping[str, int] = MappingProxyType({})  # of its features, by term, for a student of other widths

    @property
    def scores_any_answer(self) -> bool:
        """Whether it has a word on answers that were not there before: one that computes, not one that reads."""
        return self.has_targets and self.header is None and self.needs_audio

    @property
    @abstractmethod
    def vocab(self) -> Vocabulary | None:
        """What its ids mean; None where it has none."""

    @property
    @abstractmethod
    def rows(self) -> RowTokenizer | None:
        """Makes its own rows of a sample, for a student with another tokenizer; None: it is for its own alone."""

    @property
    @abstractmethod
    def identity(self) -> dict | None:
        """All that its targets depend on, as plain data: what must stay as it was when a run goes on; None: nothing."""

    @abstractmethod
    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """The samples with the text to learn, and for each whether that is the teacher's own answer."""

    @abstractmethod
    def targets(self, batch: Batch, frames: list[Tensor] | None = None) -> Targets | None:
        """What it says at every supervised position of a batch of labelled samples, on the batch's device.

        Args:
            batch: of the student's rows.
            frames: of ears that it shares with the student, when they have run already.
        """

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, whose answers a student has only just given, with what `targets` needs to speak of them."""
        return list(samples)

    def kept_frames(self, batch: Batch) -> list[Tensor] | None:
        """The ears' frames of a batch's clips, of one that brings them; its targets have the same."""
        return None

    def ask_as(self, template: str) -> None:  # noqa: B027 (one that is asked itself need not know)
        """Learn in which form the student is asked, which may be another than its own."""

    def check_shards(self, shards: Sequence[str]) -> None:  # noqa: B027 (nothing is an answer)
        """Refuse audio shards that it has no targets of; one that computes them has those of all."""


class NoTeacher(Teacher):
    """Stands where there is none: nothing but the clips' own labels is learned."""

    has_targets = False
    vocab = rows = identity = None

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """The samples as they are."""
        return list(samples), [False] * len(samples)

    def targets(self, batch: Batch, frames: list[Tensor] | None = None) -> None:
        """Nothing."""


def take_student_answer(sample: Sample) -> Sample:
    """The sample with the student's answer in the place of its text, token by token, where it comes with one."""
    if sample.student_answer is None:
        return sample
    record = sample.student_answer
    return replace(sample, text=record.answer, answer_ids=tuple(record.answer_ids_S.tolist()))


def learns_own_answer(sample: Sample, policy: str) -> bool:
    """Whether a sample's answer is to be the teacher's own: "both" takes turns, the label in epochs 0, 2, 4 …"""
    if sample.student_answer is not None:
        return False
    return sample.text is None or policy == "teacher" or (policy == "both" and sample.epoch % 2 == 1)
