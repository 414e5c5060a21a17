"""One record as the stream yields it, and the two numbers every part agrees on. Knows no file format and no model."""

from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 16_000  # Hz, of every waveform after it was decoded
MAX_SECONDS = 30.0  # the most a sample holds: Whisper's encoder sees no more


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
    targets: bytes | None = None  # the key's KEY.targets.safetensors, when a target cache is joined
    clean_N: np.ndarray | None = (
        None  # before augmentation, when that is what the teacher hears; else it hears waveform_N
    )

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.waveform_N) / SAMPLE_RATE
