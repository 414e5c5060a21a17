"""Noise, gain, speed and room on waveforms, and SpecAugment on mels: functions of (seed, epoch, key), nothing else.

So the same sample of the same epoch sounds the same on any rank, in any worker and after any resume. Whatever goes in,
what comes out is finite and within [-1, 1].

Shape letters: B batch, N audio samples, M mel bins, X mel frames.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import soxr
import torch

from shards.audio.augmentation import Augmentation
from shards.audio.decode import WINDOW_SECONDS
from shards.lazy_imports import late
from shards.sample import MAX_SECONDS, SAMPLE_RATE, MelMask, Sample

signal = late("scipy.signal")  # a second of every start, which a clip without a room has no need of

_MAX_COLOR = 2.0  # noise power falls with frequency to a power of 0 (white) to this (brown)


def augment_sample(sample: Sample, augmentation: Augmentation, *, seed: int, max_seconds: float) -> Sample:
    """The sample as the student is to hear it; `clean_N` keeps what the teacher is to hear where that differs."""
    own_seed = sample_seed(seed, sample.epoch, sample.key)
    waveform_N = augment(sample.waveform_N, augmentation, seed=own_seed, max_seconds=max_seconds)
    return replace(
        sample,
        waveform_N=waveform_N,
        clean_N=sample.waveform_N if augmentation.teacher_hears == "clean" else None,
        mel_mask=draw_mask(augmentation, len(waveform_N) / SAMPLE_RATE, seed=own_seed),
    )


def augment(
    waveform_N: np.ndarray, augmentation: Augmentation, *, seed: int, max_seconds: float = MAX_SECONDS
) -> np.ndarray:
    """Apply what the seed draws.

    Args:
        waveform_N: float32 mono at SAMPLE_RATE, finite, within [-1, 1].
        augmentation: shares and ranges.
        seed: the seed of this sample in this epoch, see `sample_seed`.
        max_seconds: what the ears take; a clip is slowed down only so far.

    Returns:
        float32, finite, within [-1, 1]; another length only where speed changed.
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
        waveform_N = change_speed(waveform_N, speed, max_seconds)
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


def change_speed(waveform_N: np.ndarray, speed: float, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Play `speed` times as fast, but no longer than `max_seconds` and no shorter than one Q-Former window."""
    seconds = len(waveform_N) / SAMPLE_RATE
    speed = min(max(speed, seconds / max_seconds), max(1.0, seconds / WINDOW_SECONDS))
    changed_N = soxr.resample(waveform_N, SAMPLE_RATE * speed, SAMPLE_RATE)
    return changed_N[: max(int(max_seconds * SAMPLE_RATE), len(waveform_N))]


def add_room(waveform_N: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a direct path and a tail of noise that decays by 60 dB in `seconds`; keeps length and power."""
    num_taps = round(seconds * SAMPLE_RATE)
    tail_N = rng.standard_normal(num_taps) * 10 ** (-3 * np.arange(num_taps) / num_taps)
    response_N = tail_N / np.sqrt(np.square(tail_N).sum()) * rng.uniform(0.3, 1.0)
    response_N[0] = 1.0
    wet_N = signal.fftconvolve(waveform_N, response_N.astype(np.float32))[: len(waveform_N)]
    return wet_N * np.float32(np.sqrt(_power(waveform_N) / max(_power(wet_N), 1e-20)))


def add_noise(waveform_N: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise of a random color, `snr_db` below the clip's own power (so silence stays silent)."""
    num_samples = len(waveform_N)
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-rng.uniform(0, _MAX_COLOR) / 2)
    spectrum[0] = 0.0
    noise_N = np.fft.irfft(spectrum, num_samples)
    scale = np.sqrt(_power(waveform_N) / max(_power(noise_N), 1e-20) * 10 ** (-snr_db / 10))
    return (waveform_N + noise_N * scale).astype(np.float32)


def draw_mask(augmentation: Augmentation, seconds: float, *, seed: int) -> MelMask | None:
    """What SpecAugment hides of a clip (Park et al. 2019, without warping); None: nothing."""
    rng = np.random.Generator(np.random.PCG64(seed).jumped())  # far from what `augment` draws
    if rng.random() >= augmentation.mask_share:
        return None
    longest = min(augmentation.mask_span_share, augmentation.mask_span_seconds / seconds)
    return MelMask(
        bands=tuple(_draw_part(rng, augmentation.mask_band_share) for _ in range(augmentation.mask_bands)),
        spans=tuple(_draw_part(rng, longest) for _ in range(augmentation.mask_spans)),
    )


def mask_mel_(mel_BMX: torch.Tensor, num_frames_B: torch.Tensor, masks_B: Sequence[MelMask | None]) -> None:
    """Set each clip's hidden bands and spans to the clip's mean, in place; padding stays as it was.

    Args:
        mel_BMX: log-mels, on any device.
        num_frames_B: frames of each clip that are not padding; on CPU they cost no wait for the device.
        masks_B: the mask of each clip; None: nothing is hidden.
    """
    for mel_MX, num_frames, mask in zip(mel_BMX, num_frames_B.tolist(), masks_B):
        if mask is None:
            continue
        clip_MX = mel_MX[:, :num_frames]
        mean = clip_MX.mean()
        for start, end in mask.bands:
            clip_MX[round(start * len(clip_MX)) : round(end * len(clip_MX))] = mean
        for start, end in mask.spans:
            clip_MX[:, round(start * num_frames) : round(end * num_frames)] = mean


def _draw_part(rng: np.random.Generator, most: float) -> tuple[float, float]:
    """Start and end of a part of at most `most` of the whole."""
    width = rng.uniform(0, most)
    start = rng.uniform(0, 1 - width)
    return start, start + width


def _power(waveform_N: np.ndarray) -> float:
    return float(np.square(waveform_N, dtype=np.float64).mean())


def _hold(waveform_N: np.ndarray) -> np.ndarray:
    """Scale down to a peak of 1 where need be: clipping would add distortion that nobody asked for."""
    peak = float(np.abs(waveform_N).max(initial=0.0))
    return (waveform_N / max(peak, 1.0)).astype(np.float32)
