"""One record as the stream yields it, and the two numbers every part agrees on. Knows no file format and no model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shards.lazy_imports import late

if TYPE_CHECKING:
    from shards.targets.record import TargetRecord

np = late("numpy")

SAMPLE_RATE = 16_000  # Hz, of every waveform after it was decoded
MAX_SECONDS = 30.0  # the most a sample holds: Whisper's encoder sees no more


@dataclass(frozen=True)
class MelMask:
    """What SpecAugment hides of a clip's log-mel: (start, end) of each part, as shares of bins and of time."""

    bands: tuple[tuple[float, float], ...]
    spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """A clip, what is to be said about it, and where it came from."""

    key: str  # unique in its shards, stable over runs, holds no dot
    waveform_N: np.ndarray  # float32 mono at SAMPLE_RATE, within [-1, 1]
    text: str | None  # the answer; None: the clip is unlabelled
    task: str  # names the prompt
    question: str | None  # fills the prompt of a question-answering task
    source: str  # name of the data set
    sha256: str  # of the decoded int16 samples, before any augmentation
    epoch: int = 0  # which pass over the data this is
    targets: TargetRecord | None = None  # the key's, when a target cache is joined; its features as they are stored
    clean_N: np.ndarray | None = None  # before augmentation, when the teacher hears that; else it hears waveform_N
    mel_mask: MelMask | None = None  # what is hidden of the log-mel that waveform_N gives
    weight: float = 1.0  # what it counts in the losses
    student_answer: TargetRecord | None = None  # the student's own answer with its targets, where that is learned
    answer_ids: tuple[int, ...] | None = None  # the answer's ids with the end token, where `text` alone tells others
    is_said_now: bool = False  # whether both are what the student said within the step

    @property
    def is_students(self) -> bool:
        """Whether the answer is the student's own, of a round or of the step: learned, but not the truth."""
        return self.is_said_now or self.student_answer is not None

    @property
    def as_the_teacher_hears_it(self) -> Sample:
        """The sample itself, or the clean clip where that is what the teacher hears."""
        return self if self.clean_N is None else replace(self, waveform_N=self.clean_N, clean_N=None, mel_mask=None)

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.waveform_N) / SAMPLE_RATE
