"""What a walk over a container finds: stretches that a decoder reads whole, or the damage. Decodes nothing.

Decoders believe headers. libsndfile gives the first of two files joined in one, as many samples of a FLAC as its header
names, and for a variable-rate MP3 a length guessed from its first frame, all without a word. So `shards.audio.mpeg`,
`ogg`, `flac` and `chunks` beside it count what is there by themselves, and hand a decoder bytes that say so.
"""

import io
import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

Data = bytes | mmap.mmap  # a whole file


class DamageError(ValueError):
    """A container that lost something, or holds what cannot be placed.

    Attributes:
        reason: one word, as `AudioError` has it.
        problem: the end of a sentence that begins with the file's name.
        numbers: the measured values behind it.
    """

    def __init__(self, reason: str, problem: str, numbers: dict | None = None):
        super().__init__(reason, problem, numbers or {})
        self.reason, self.problem, self.numbers = self.args


@dataclass(frozen=True)
class Part:
    """One stream of a file, complete in itself.

    Attributes:
        pieces: its bytes in order, never copied: slices of the file and, where the file's own mislead, a new header.
        frames: samples a channel that the walk counts; None: not counted.
        rate: Hz that `frames` counts at; None: the decoder's.
        slack_frames: how far a right decoder may be from `frames`: its delay, which some containers do not tell.
        md5: the hash of the samples as integers, where the file tells.
    """

    pieces: tuple[bytes | memoryview, ...]
    frames: int | None = None
    rate: int | None = None
    slack_frames: int = 0
    md5: bytes | None = None


class Container(NamedTuple):
    """A family of containers.

    Attributes:
        walk: finds the parts of a file, told where its tags end; None where the file is of another family. Raises
            `DamageError`.
        formats: libsndfile's names of what it walks over, whose length the walk vouches for.
    """

    walk: Callable[[Data, int], list[Part] | None]
    formats: tuple[str, ...]


class Joined(io.RawIOBase):
    """Pieces as one file to read."""

    def __init__(self, pieces: Sequence[bytes | memoryview]):
        self._pieces = [memoryview(piece) for piece in pieces]
        self._starts = [0, *accumulate(map(len, self._pieces))]
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._starts[-1])[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and self._position < self._starts[-1]:
            number = bisect_right(self._starts, self._position) - 1
            start = self._position - self._starts[number]
            piece = self._pieces[number][start : start + len(view) - filled]
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._position += len(piece)
        return filled

    def read(self, size: int = -1) -> bytes:
        return super().read(size)
