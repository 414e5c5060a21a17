"""Noise, gain, speed and room on waveforms, and SpecAugment on mels: functions of (seed, epoch, key), nothing else.

So the same sample of the same epoch sounds the same on any rank, in any worker and after any resume. Whatever goes in,
what comes out is finite and within [-1, 1].

Shape letters: B batch, N audio samples, M mel bins, X mel frames.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import soxr
import torch
from scipy.signal import fftconvolve

from shards.sample import MAX_SECONDS, SAMPLE_RATE, Sample

TEACHER_HEARS = ("clean", "augmented")
_MAX_COLOUR = 2.0  # noise power falls with frequency to a power of 0 (white) to this (brown)


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a clip, in this order. A `*_share` is the share of clips it happens to."""

    speed_share: float = 0.0
    speed_range: tuple[float, float] = (0.9, 1.1)  # times as fast; pitch goes with it
    room_share: float = 0.0
    room_range: tuple[float, float] = (0.1, 0.6)  # seconds until an echo is 60 dB down
    noise_share: float = 0.0
    noise_range: tuple[float, float] = (5.0, 30.0)  # dB of the clip above the noise
    gain_share: float = 0.0
    gain_range: tuple[float, float] = (-12.0, 6.0)  # dB; a clip that would overflow is scaled to its peak instead
    teacher_hears: str = "clean"  # or "augmented": the very clip the student hears

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_share") and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}, but a share is 0 to 1; set it so.")
            if field.name.endswith("_range") and not (np.isfinite(value).all() and value[0] <= value[1]):
                raise ValueError(f"{field.name} is {value}, but it goes from the lower to the higher; turn it round.")
        if not 0.5 <= self.speed_range[0] <= self.speed_range[1] <= 2:
            raise ValueError(f"speed_range is {self.speed_range}, but it must lie in 0.5 to 2; set it so.")
        if not 0.02 <= self.room_range[0] <= self.room_range[1] <= 3:
            raise ValueError(f"room_range is {self.room_range}, but it must lie in 0.02 to 3 s; set it so.")
        if self.teacher_hears not in TEACHER_HEARS:
            raise ValueError(
                f"teacher_hears is {self.teacher_hears!r}, but must be one of {TEACHER_HEARS}; choose one."
            )


def augment_sample(sample: Sample, augmentation: Augmentation, *, seed: int) -> Sample:
    """The sample as the student is to hear it; `clean_N` keeps what the teacher is to hear where that differs."""
    waveform_N = augment(sample.waveform_N, augmentation, seed=sample_seed(seed, sample.epoch, sample.key))
    clean_N = sample.waveform_N if augmentation.teacher_hears == "clean" else None
    return replace(sample, waveform_N=waveform_N, clean_N=clean_N)


def augment(waveform_N: np.ndarray, augmentation: Augmentation, *, seed: int) -> np.ndarray:
    """Apply what the seed draws.

    Args:
        waveform_N: float32 mono at SAMPLE_RATE, finite, within [-1, 1].
        augmentation: shares and ranges.
        seed: of this sample in this epoch, see `sample_seed`.

    Returns:
        float32, finite, within [-1, 1], of at most MAX_SECONDS; another length only where speed changed.
    """
    # Everything is drawn before anything is applied, so that one share's value leaves the other draws as they were.
    rng = np.random.Generator(np.random.PCG64(seed))
    happens = rng.random(4) < [
        augmentation.speed_share,
        augmentation.room_share,
        augmentation.noise_share,
        augmentation.gain_share,
    ]
    speed, room_seconds, snr_db, gain_db = (
        rng.uniform(*bounds)
        for bounds in (
            augmentation.speed_range,
            augmentation.room_range,
            augmentation.noise_range,
            augmentation.gain_range,
        )
    )
    room_rng, noise_rng = rng.spawn(2)
    if happens[0]:
        waveform_N = change_speed(waveform_N, speed)
    if happens[1]:
        waveform_N = add_room(waveform_N, room_seconds, room_rng)
    if happens[2]:
        waveform_N = add_noise(waveform_N, snr_db, noise_rng)
    if happens[3]:
        waveform_N = waveform_N * np.float32(10 ** (gain_db / 20))
    return _hold(waveform_N)


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """128 bits that depend on all three and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{key}".encode()).digest()[:16], "big")


def change_speed(waveform_N: np.ndarray, speed: float) -> np.ndarray:
    """Play `speed` times as fast; slowed down only as far as the clip stays within MAX_SECONDS."""
    speed = max(speed, len(waveform_N) / (MAX_SECONDS * SAMPLE_RATE))
    return soxr.resample(waveform_N, SAMPLE_RATE * speed, SAMPLE_RATE)[: int(MAX_SECONDS * SAMPLE_RATE)]


def add_room(waveform_N: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a direct path and a tail of noise that decays by 60 dB in `seconds`; keeps length and power."""
    num_taps = round(seconds * SAMPLE_RATE)
    tail_N = rng.standard_normal(num_taps) * 10 ** (-3 * np.arange(num_taps) / num_taps)
    response_N = tail_N / np.sqrt(np.square(tail_N).sum()) * rng.uniform(0.3, 1.0)
    response_N[0] = 1.0
    wet_N = fftconvolve(waveform_N, response_N.astype(np.float32))[: len(waveform_N)]
    return wet_N * np.float32(np.sqrt(_power(waveform_N) / max(_power(wet_N), 1e-20)))


def add_noise(waveform_N: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise of a random colour, `snr_db` below the clip's own power (so silence stays silent)."""
    num_samples = len(waveform_N)
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-rng.uniform(0, _MAX_COLOUR) / 2)
    spectrum[0] = 0.0
    noise_N = np.fft.irfft(spectrum, num_samples)
    scale = np.sqrt(_power(waveform_N) / max(_power(noise_N), 1e-20) * 10 ** (-snr_db / 10))
    return (waveform_N + noise_N * scale).astype(np.float32)


def mask_mel(
    mel_BMX: torch.Tensor,
    num_frames_B: torch.Tensor,
    seeds_B: Sequence[int],
    *,
    num_bands: int = 2,
    band_width: int = 15,
    num_spans: int = 2,
    span_width: int = 50,
    span_share: float = 0.2,
) -> torch.Tensor:
    """SpecAugment (Park et al. 2019) without warping: bands and spans are set to the clip's mean.

    Args:
        mel_BMX: log-mels, on any device.
        num_frames_B: frames of each clip that are not padding.
        seeds_B: of each sample in this epoch, see `sample_seed`.
        num_bands: bands of mel bins to mask in each clip.
        band_width: the most bins of a band.
        num_spans: spans of frames to mask in each clip.
        span_width: the most frames of a span.
        span_share: the most of a clip that one span may take.

    Returns:
        A masked copy of shape (B, M, X); padding is as it was.
    """
    masked_BMX = mel_BMX.clone()
    num_mels = mel_BMX.shape[1]
    for mel_MX, num_frames, seed in zip(masked_BMX, num_frames_B.tolist(), seeds_B):
        rng = np.random.Generator(np.random.PCG64(seed))
        clip_MX = mel_MX[:, :num_frames]
        mean = clip_MX.mean()
        for _ in range(num_bands):
            low, high = _draw_range(rng, num_mels, band_width)
            clip_MX[low:high] = mean
        for _ in range(num_spans):
            low, high = _draw_range(rng, num_frames, min(span_width, int(span_share * num_frames)))
            clip_MX[:, low:high] = mean
    return masked_BMX


def _draw_range(rng: np.random.Generator, size: int, most: int) -> tuple[int, int]:
    width = int(rng.integers(0, min(most, size) + 1))
    low = int(rng.integers(0, size - width + 1))
    return low, low + width


def _power(waveform_N: np.ndarray) -> float:
    return float(np.square(waveform_N, dtype=np.float64).mean())


def _hold(waveform_N: np.ndarray) -> np.ndarray:
    """Scale down to a peak of 1 where need be: clipping would add distortion that nobody asked for."""
    peak = float(np.abs(waveform_N).max(initial=0.0))
    return (waveform_N / max(peak, 1.0)).astype(np.float32)
