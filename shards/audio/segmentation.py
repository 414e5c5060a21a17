"""Where a long recording can be cut without cutting a word: at its quietest places. Knows no model.

Shape letters: N audio samples, F short-time frames.
"""

import numpy as np

from shards.sample import SAMPLE_RATE

FRAME_SECONDS = 0.02
SMOOTH_SECONDS = 0.2  # of quiet around a cut, that is looked for
EARLIEST = 0.5  # of the longest piece: nothing is cut before


def segment_at_quiet(waveform_N: np.ndarray, max_samples: int, min_samples: int = 1) -> list[tuple[int, int]]:
    """Cut a recording into pieces that follow each other without a gap.

    Each cut is where the loudness over SMOOTH_SECONDS is least in the second half of what a piece may hold; of equal
    places the middle of the last stretch.

    Args:
        waveform_N: at SAMPLE_RATE.
        max_samples: the most audio samples of a piece.
        min_samples: the fewest audio samples of a piece; the last cut leaves as many.

    Returns:
        Start and end of each piece in audio samples; one piece where the recording is short enough.
    """
    frame = max(1, round(FRAME_SECONDS * SAMPLE_RATE))
    loudness_F = smooth_loudness(waveform_N, frame)
    pieces, start = [], 0
    while len(waveform_N) - start > max_samples:
        latest = min(start + max_samples, len(waveform_N) - min_samples)
        first = max(start + round(EARLIEST * max_samples), start + min_samples)
        cut = min(max(quietest(loudness_F, first // frame, latest // frame) * frame, first), latest)
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(waveform_N))]


def smooth_loudness(waveform_N: np.ndarray, frame: int) -> np.ndarray:
    """The mean energy around the beginning of each frame, loudness_F."""
    num_frames = len(waveform_N) // frame + 1
    padded = np.zeros(num_frames * frame)
    padded[: len(waveform_N)] = waveform_N
    energy_F = np.square(padded).reshape(num_frames, frame).mean(axis=1)
    half = round(SMOOTH_SECONDS / FRAME_SECONDS / 2)
    sums = np.concatenate([[0.0], np.cumsum(energy_F)])
    at = np.arange(num_frames)
    low, high = np.maximum(at - half, 0), np.minimum(at + half, num_frames)
    return (sums[high] - sums[low]) / (high - low)


def quietest(loudness_F: np.ndarray, first: int, last: int) -> int:
    """The frame from `first` to `last` to cut at: the middle of the last stretch that is as quiet as any."""
    window = loudness_F[first : last + 1]
    is_least = window <= window.min() * 1.001 + 1e-12
    end = int(np.flatnonzero(is_least)[-1])
    begin = end
    while begin > 0 and is_least[begin - 1]:
        begin -= 1
    return first + (begin + end) // 2
