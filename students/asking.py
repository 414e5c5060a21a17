"""Recordings of any length, asked about: read, cut at quiet places, answered in batches. Imports no torch.

Whoever answers pieces of audio is a `Listener`: the student in torch, and the one that was exported for a device.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.audio.decode import hash_waveform, load_audio, pad_to_window, to_waveform
from shards.audio.limits import AudioLimits
from shards.audio.segmentation import segment_at_quiet
from shards.field_types import to_path
from shards.sample import SAMPLE_RATE, Sample

ASR, CAPTION, QUESTION = "asr", "audiocaption", "QA"  # tasks, whose first prompt is asked
BATCH_SIZE = 8  # pieces of audio that are answered at once
MAX_NEW_TOKENS = 200  # of the answer to one piece
LONG = AudioLimits(max_seconds=4 * 3600, max_header_seconds=4 * 3600, max_decoded_bytes=8_000_000_000)  # of a file


@dataclass(frozen=True)
class Segment:
    """A piece of a recording, and what the student says of it."""

    start: float  # seconds, to the millisecond
    end: float
    text: str


@dataclass(frozen=True)
class Answer:
    """What a student says of a recording."""

    text: str  # of all its pieces
    segments: tuple[Segment, ...]

    def __str__(self) -> str:
        return self.text


class Listener(ABC):
    """Asks about audio: a path, an array of float or int16 samples (`rate` says how many a second), or a list of those.

    For a list comes a list, answered in batches. A subclass says how long its pieces may be and how they are answered.
    """

    max_samples: int  # of a piece
    min_samples: int

    @abstractmethod
    def generate(self, samples: Sequence[Sample], *, max_new_tokens: int) -> list[str]:
        """The greedy answers to one batch of clips."""

    def transcribe(self, audio, *, rate: int = SAMPLE_RATE, max_new_tokens: int = MAX_NEW_TOKENS):
        """What is said: an `Answer`, or a list of them for a list."""
        return self.ask(audio, ASR, rate=rate, max_new_tokens=max_new_tokens)

    def describe(self, audio, *, rate: int = SAMPLE_RATE, max_new_tokens: int = MAX_NEW_TOKENS):
        """What is heard, in a sentence a piece: an `Answer`, or a list of them for a list."""
        return self.ask(audio, CAPTION, rate=rate, max_new_tokens=max_new_tokens)

    def answer(self, audio, question: str, *, rate: int = SAMPLE_RATE, max_new_tokens: int = MAX_NEW_TOKENS):
        """The answer to a question, piece by piece: an `Answer`, or a list of them for a list."""
        return self.ask(audio, QUESTION, question=question, rate=rate, max_new_tokens=max_new_tokens)

    def ask(self, audio, task: str, *, question: str | None = None, rate: int = SAMPLE_RATE,
            max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = BATCH_SIZE):  # fmt: skip
        """Any task's first prompt about one recording or a list of them.

        Args:
            audio: see the class.
            task: whose prompt.
            question: the question of a task that asks the sample's own.
            rate: samples a second of arrays.
            max_new_tokens: the most tokens of the answer to one piece.
            batch_size: pieces at once.

        Raises:
            AudioError: a file cannot be decoded, or holds nothing to hear.
            FileNotFoundError: there is no such file.
            ValueError: an array is not one of audio samples; unknown task.
        """
        is_list = isinstance(audio, Sequence) and not isinstance(audio, str)
        waveforms = [load_waveform(one, rate, self.min_samples) for one in (audio if is_list else [audio])]
        cuts = [segment_at_quiet(x_N, self.max_samples, self.min_samples) for x_N in waveforms]
        pieces = [x_N[start:end] for x_N, found in zip(waveforms, cuts) for start, end in found]
        texts = iter(self._say(pieces, task, question, max_new_tokens, batch_size))
        answers = [
            [Segment(round(start / SAMPLE_RATE, 3), round(end / SAMPLE_RATE, 3), next(texts)) for start, end in found]
            for found in cuts
        ]
        joined = [Answer(" ".join(s.text for s in found if s.text), tuple(found)) for found in answers]
        return joined if is_list else joined[0]

    def _say(self, pieces: list[np.ndarray], task: str, question: str | None, max_new_tokens: int,
             batch_size: int) -> list[str]:  # fmt: skip
        """The text of each piece; pieces of like length are answered together."""
        texts = [""] * len(pieces)
        order = sorted(range(len(pieces)), key=lambda number: len(pieces[number]))
        for first in range(0, len(order), batch_size):
            numbers = order[first : first + batch_size]
            samples = [
                Sample(f"audio{n}", pieces[n], None, task, question, "", hash_waveform(pieces[n])) for n in numbers
            ]
            for number, text in zip(numbers, self.generate(samples, max_new_tokens=max_new_tokens)):
                texts[number] = text
        return texts


def load_waveform(audio, rate: int, min_samples: int) -> np.ndarray:
    """A path or an array as float32 at SAMPLE_RATE, at least as long as the ears need.

    Raises:
        AudioError, FileNotFoundError, ValueError: see `Listener.ask`.
    """
    if isinstance(audio, str | Path):
        path = to_path(audio)
        if not path.is_file():
            raise FileNotFoundError(f"audio is {audio}, but there is no such file; give a wav, flac, ogg or mp3 file.")
        waveform_N = load_audio([path], limits=LONG)
    else:
        waveform_N = pad_to_window(to_waveform(as_channels(audio), rate))
    return np.pad(waveform_N, (0, max(0, min_samples - len(waveform_N))))


def as_channels(audio) -> np.ndarray:
    """An array or tensor of audio as float32 samples_NC.

    Raises:
        ValueError: it is empty, not finite, of another type, or has more than two dimensions.
    """
    array = np.asarray(audio)
    is_sound = array.ndim in (1, 2) and array.size and (array.dtype.kind == "f" or array.dtype == np.int16)
    if not is_sound or not np.isfinite(array).all():
        raise ValueError(
            f"audio is an array of {array.dtype} and shape {array.shape}, but must hold finite float or int16 samples "
            f"in one or two dimensions; give a path or such an array."
        )
    samples = array.astype(np.float32) / (32768 if array.dtype == np.int16 else 1)
    if samples.ndim == 1:
        return samples[:, None]
    return samples.T if samples.shape[0] < samples.shape[1] else samples
