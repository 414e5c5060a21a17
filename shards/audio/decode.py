"""Bytes of an audio file in, a checked 16 kHz mono waveform out. Knows no manifest, no tar and no model.

What a file holds is read and checked by `container`; here it becomes what a model hears: one channel, one rate,
joined and padded. What cannot be trusted raises `AudioError`; nothing is ever replaced.

Shape letters: N audio samples, C channels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from shards.audio.container import read_file, read_samples, read_segment
from shards.audio.limits import DEFAULT_LIMITS, AudioError, AudioLimits, too_long_error
from shards.lazy_imports import late
from shards.sample import SAMPLE_RATE

np = late("numpy")
soundfile = late("soundfile")
soxr = late("soxr")

__all__ = ["AudioError", "AudioLimits", "decode_audio", "encode_flac", "hash_waveform", "load_audio"]

LEFT, MEAN = CHANNELS = ("left", "mean")  # what is heard of several channels; all of SALMONN's trainers take the left
GAP_SECONDS = 0.1  # silence between the recordings of one sample, as in SALMONN's trainer
WINDOW_SECONDS = 1 / 3  # one Q-Former window; shorter clips are padded to it
SILENT_PEAK = 1e-3  # -60 dBFS; a clip that stays below it is silent
CANCELLED_SHARE = 0.01  # of the channels' mean energy: a mean below it means that the channels cancel


def decode_audio(data: bytes, *, name: str, limits: AudioLimits = DEFAULT_LIMITS, channels: str = LEFT) -> np.ndarray:
    """Decode wav, flac, ogg or mp3 into a checked waveform.

    Silence is not refused here, because only the label can say whether it is wanted.

    Args:
        data: the whole file.
        name: what to call it in an error: a path, or shard and key.
        limits: lengths that are accepted, and whether a longer clip is cut.

    Returns:
        float32 mono at SAMPLE_RATE in [-1, 1], shape N.

    Raises:
        AudioError: the file cannot be decoded, lies about its length, or breaks a limit.
    """
    samples_NC, header = read_samples(data, name=name, limits=limits)
    return to_waveform(samples_NC, header.rate, channels)


def load_audio(
    paths: Sequence[Path],
    *,
    start: float = 0.0,
    end: float | None = None,
    limits: AudioLimits = DEFAULT_LIMITS,
    channels: str = LEFT,
) -> np.ndarray:
    """Read the recordings of one sample and join them with GAP_SECONDS of silence.

    A sample shorter than one Q-Former window is padded with zeros to WINDOW_SECONDS.

    Args:
        paths: one file, or that and SALMONN's `expand_wav`.
        start, end: seconds, where the sample is a part of its one recording; None: the whole of it.
        limits: `max_seconds` and `cut` hold for the joined clip, the others for each file.

    Returns:
        float32 mono at SAMPLE_RATE in [-1, 1], shape N.

    Raises:
        AudioError: as `decode_audio`, or the joined clip is too long.
    """
    if end is not None:
        samples_NC, header = read_segment(paths[0], start, end, limits=limits)
        return pad_to_window(to_waveform(samples_NC, header.rate, channels))
    gap_N = np.zeros(round(GAP_SECONDS * SAMPLE_RATE), np.float32)
    pieces = []
    for path in paths:
        pieces += [
            gap_N,
            decode_audio(read_file(path, limits=limits), name=str(path), limits=limits, channels=channels),
        ]
    waveform_N = np.concatenate(pieces[1:])
    longest = int(limits.max_seconds * SAMPLE_RATE)
    if len(waveform_N) > longest and not limits.cut:
        raise too_long_error(" + ".join(map(str, paths)), len(waveform_N) / SAMPLE_RATE, limits.max_seconds)
    return pad_to_window(waveform_N[:longest])


def to_waveform(samples_NC: np.ndarray, rate: int, channels: str = LEFT) -> np.ndarray:
    """Take the left channel or mix down, resample to SAMPLE_RATE, hold to [-1, 1]: float32 of shape N."""
    waveform_N = choose_channel(samples_NC, channels)
    if rate != SAMPLE_RATE:
        waveform_N = soxr.resample(waveform_N, rate, SAMPLE_RATE, quality="HQ")
    return np.clip(waveform_N, -1.0, 1.0, out=waveform_N)


def choose_channel(samples_NC: np.ndarray, channels: str) -> np.ndarray:
    """What is heard of several channels, one of `CHANNELS`, at the file's own rate; a copy."""
    return mix_down(samples_NC) if channels == MEAN else np.array(samples_NC[:, 0])


def mix_down(samples_NC: np.ndarray) -> np.ndarray:
    """Mean of the channels, or the loudest one (the left of equals) where the channels cancel each other."""
    if samples_NC.shape[1] == 1:
        return np.ascontiguousarray(samples_NC[:, 0])
    mean_N = samples_NC.mean(axis=1)
    energy_C = np.square(samples_NC, dtype=np.float64).sum(axis=0)
    if np.square(mean_N, dtype=np.float64).sum() < CANCELLED_SHARE * energy_C.mean():
        return np.ascontiguousarray(samples_NC[:, int(energy_C.argmax())])
    return mean_N


def pad_to_window(waveform_N: np.ndarray) -> np.ndarray:
    """Append zeros until one Q-Former window is full."""
    missing = int(np.ceil(WINDOW_SECONDS * SAMPLE_RATE)) - len(waveform_N)
    return np.pad(waveform_N, (0, missing)) if missing > 0 else waveform_N


def to_int16(waveform_N: np.ndarray) -> np.ndarray:
    """The 16-bit samples of a waveform, the exact inverse of decoding 16-bit PCM; those of 16-bit samples are they."""
    if waveform_N.dtype == np.int16:
        return waveform_N
    scaled_N = waveform_N * np.float32(32768)
    return np.clip(np.rint(scaled_N, out=scaled_N), -32768, 32767, out=scaled_N).astype("<i2")


def encode_flac(waveform_N: np.ndarray) -> bytes:
    """A 16-bit mono FLAC file at SAMPLE_RATE, of a waveform or its `to_int16`; the same samples give the same bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, to_int16(waveform_N), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def hash_waveform(waveform_N: np.ndarray) -> str:
    """SHA-256, in hex, of a waveform's `to_int16`, or of that itself: equal before and after FLAC."""
    return hashlib.sha256(to_int16(waveform_N).tobytes()).hexdigest()
