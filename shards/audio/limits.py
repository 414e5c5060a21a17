"""Which audio is accepted, and the error that refuses the rest by a word to count. Opens no file."""

import argparse
from dataclasses import dataclass

from shards.sample import MAX_SECONDS

AUDIO_SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3")  # that a folder's recordings are known by


class AudioError(ValueError):
    """Audio that must not be trained on.

    Attributes:
        reason: one word to count by: decode, truncated, header_mismatch, too_short, too_long, nonfinite, silent,
            impossible_rate, too_large, out_of_range or unreadable.
        numbers: the measured values behind the message, for a report.
    """

    def __init__(self, reason: str, message: str, numbers: dict | None = None):
        super().__init__(reason, message, numbers or {})
        self.reason, self.message, self.numbers = self.args

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class AudioLimits:
    """What is accepted; the defaults are those of `distill pack` and `distill audit`."""

    min_seconds: float = 0.1  # shorter clips are refused as too_short
    max_seconds: float = MAX_SECONDS  # longer clips are refused as too_long, or cut
    cut: bool = False  # keep the first max_seconds of a longer clip instead of refusing it
    max_header_seconds: float = 3600.0  # a file that claims more is refused before it is decoded
    max_decoded_bytes: int = 512_000_000  # of float32 samples over all channels, checked before decoding
    max_file_bytes: int = 2_000_000_000  # of a file as it lies on the disk
    max_header_gap_seconds: float = 0.0  # how far the decoded length may be from the header's

    def __post_init__(self):
        if not 0 <= self.min_seconds < self.max_seconds:
            raise ValueError(
                f"min_seconds is {self.min_seconds:g}, but must be from 0 to below max_seconds, which is "
                f"{self.max_seconds:g}; change one of them."
            )


DEFAULT_LIMITS = AudioLimits()


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """The shortest and longest clip, as `distill audit` and `distill pack` take them."""
    least, most = DEFAULT_LIMITS.min_seconds, DEFAULT_LIMITS.max_seconds
    parser.add_argument("--min-seconds", type=float, default=least, help="of the shortest clip (%(default)g)")
    parser.add_argument("--max-seconds", type=float, default=most, help="of the longest clip (%(default)g, the most)")


def read_limits(args: argparse.Namespace, *, max_header_gap_seconds: float = 0.0) -> AudioLimits:
    """The limits that were asked for.

    Raises:
        ValueError: more than the ears take, or less than nothing.
    """
    if not args.max_seconds <= MAX_SECONDS:
        raise ValueError(
            f"--max-seconds is {args.max_seconds:g}, but a sample holds {MAX_SECONDS:g} at most; give a smaller one."
        )
    return AudioLimits(args.min_seconds, args.max_seconds, max_header_gap_seconds=max_header_gap_seconds)


def too_long_error(name: str, seconds: float, limit: float) -> AudioError:
    """The error for a clip of `seconds` where `limit` are accepted."""
    return AudioError(
        "too_long", f"{name} has {seconds:.1f} s, but at most {limit:g} s is accepted; cut it or drop it.",
        {"seconds": round(seconds, 3)},
    )  # fmt: skip
