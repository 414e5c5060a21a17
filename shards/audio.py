"""Bytes of an audio file in, a checked 16 kHz mono waveform out. Knows no manifest, no tar and no model.

Everything a decoder passes over in silence is looked at here: a header that lies, a file cut short, NaN, a rate no
recorder has, channels that cancel, an hour in a few kilobytes. What cannot be trusted raises `AudioError` with a
`reason` that counts can be kept by; nothing is ever replaced.

Shape letters: N audio samples, C channels.
"""

import hashlib
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from shards.sample import MAX_SECONDS, SAMPLE_RATE

GAP_SECONDS = 0.1  # silence between the recordings of one sample, as in SALMONN's trainer
WINDOW_SECONDS = 1 / 3  # one Q-Former window; shorter clips are padded to it
SILENT_PEAK = 1e-3  # -60 dBFS
MIN_RATE, MAX_RATE = 8_000, 192_000  # Hz
MAX_PEAK = 2.0  # a lossy decoder overshoots 1.0 a little; integers stored as floats by much
CANCELLED_SHARE = 0.01  # of the channels' mean energy: a mean below it means that the channels cancel
BLOCK_FRAMES = 1 << 16
UNKNOWN_FRAMES = 1 << 62  # libsndfile's count for a stream that does not say how long it is


class AudioError(ValueError):
    """Audio that must not be trained on.

    Attributes:
        reason: one word to count by: decode, truncated, header_mismatch, too_short, too_long, nonfinite, silent,
            impossible_rate, too_large or out_of_range.
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
    max_header_gap_seconds: float = 0.0  # how far the decoded length may be from the header's


@dataclass(frozen=True)
class AudioHeader:
    """What a file says about itself."""

    format: str  # as libsndfile names it: WAV, FLAC, OGG, MP3
    rate: int  # Hz
    channels: int
    frames: int | None  # samples a channel; None: the header does not say

    @property
    def seconds(self) -> float | None:
        return None if self.frames is None else self.frames / self.rate


def decode_audio(data: bytes, *, name: str, limits: AudioLimits = AudioLimits()) -> np.ndarray:
    """Decode wav, flac, ogg or mp3 into a checked waveform.

    Silence is not refused here, because only the label can say whether it is wanted: see `is_silent`.

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
    return to_waveform(samples_NC, header.rate)


def load_audio(paths: Sequence[Path], *, limits: AudioLimits = AudioLimits()) -> np.ndarray:
    """Read the recordings of one sample and join them with GAP_SECONDS of silence.

    A sample shorter than one Q-Former window is padded with zeros to WINDOW_SECONDS.

    Args:
        paths: one file, or that and SALMONN's `expand_wav`.
        limits: `max_seconds` and `cut` hold for the joined clip, the others for each file.

    Returns:
        float32 mono at SAMPLE_RATE in [-1, 1], shape N.

    Raises:
        AudioError: as `decode_audio`, or the joined clip is too long.
    """
    gap_N = np.zeros(round(GAP_SECONDS * SAMPLE_RATE), np.float32)
    pieces = []
    for path in paths:
        pieces += [gap_N, decode_audio(path.read_bytes(), name=str(path), limits=limits)]
    waveform_N = np.concatenate(pieces[1:])
    longest = int(limits.max_seconds * SAMPLE_RATE)
    if len(waveform_N) > longest and not limits.cut:
        raise _too_long(" + ".join(map(str, paths)), len(waveform_N) / SAMPLE_RATE, limits.max_seconds)
    return pad_to_window(waveform_N[:longest])


def read_samples(data: bytes, *, name: str, limits: AudioLimits = AudioLimits()) -> tuple[np.ndarray, AudioHeader]:
    """Decode as it is stored: the file's own rate and channels, checked against its header and `limits`.

    Returns:
        float32 samples of shape (N, C), at most `limits.max_seconds` of them, and the header.

    Raises:
        AudioError: see `decode_audio`.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            header = _read_header(file)
            check_header(header, name=name, limits=limits)
            samples_NC = _read_blocks(file, int(limits.max_seconds * header.rate) + 1)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        text = str(error).rpartition(">: ")[2]  # libsndfile names the buffer, not the file
        raise AudioError("decode", f"{name} cannot be decoded: {text}", {"bytes": len(data)}) from error
    _check_length(samples_NC, header, data, name=name, limits=limits)
    _check_values(samples_NC, name=name)
    return samples_NC[: int(limits.max_seconds * header.rate)], header


def check_header(header: AudioHeader, *, name: str, limits: AudioLimits) -> None:
    """Refuse what the header alone condemns, before a byte is decoded.

    Raises:
        AudioError: reason impossible_rate, too_long or too_large.
    """
    if not MIN_RATE <= header.rate <= MAX_RATE:
        raise AudioError(
            "impossible_rate",
            f"{name} has rate {header.rate} Hz, but {MIN_RATE} to {MAX_RATE} Hz are accepted; the file is damaged or "
            "must be resampled first.",
            {"rate": header.rate},
        )
    seconds = header.seconds or 0.0
    if seconds > limits.max_header_seconds:
        raise AudioError(
            "too_large",
            f"{name} announces {seconds:.0f} s, but {limits.max_header_seconds:g} s are accepted at most; split it.",
            {"seconds": round(seconds, 3)},
        )
    if seconds > limits.max_seconds and not limits.cut:
        raise _too_long(name, seconds, limits.max_seconds)
    decoded = int(min(seconds or limits.max_seconds, limits.max_seconds) * header.rate) * header.channels * 4
    if decoded > limits.max_decoded_bytes:
        raise AudioError(
            "too_large",
            f"{name} would decode to {decoded} bytes ({header.channels} channels), but {limits.max_decoded_bytes} are "
            "accepted; mix it down first.",
            {"decoded_bytes": decoded, "channels": header.channels},
        )


def to_waveform(samples_NC: np.ndarray, rate: int) -> np.ndarray:
    """Mix down to mono, resample to SAMPLE_RATE and hold to [-1, 1]; returns float32 of shape N."""
    waveform_N = mix_down(samples_NC)
    if rate != SAMPLE_RATE:
        waveform_N = soxr.resample(waveform_N, rate, SAMPLE_RATE, quality="HQ")
    return np.clip(waveform_N, -1.0, 1.0, dtype=np.float32)


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


def is_silent(waveform_N: np.ndarray) -> bool:
    """Whether no sample reaches -60 dBFS."""
    return len(waveform_N) == 0 or float(np.abs(waveform_N).max()) < SILENT_PEAK


def to_int16(waveform_N: np.ndarray) -> np.ndarray:
    """The 16-bit samples of a waveform; the exact inverse of decoding 16-bit PCM."""
    return np.clip(np.rint(waveform_N * np.float32(32768)), -32768, 32767).astype("<i2")


def encode_flac(waveform_N: np.ndarray) -> bytes:
    """A 16-bit mono FLAC file at SAMPLE_RATE; the same samples give the same bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, to_int16(waveform_N), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def hash_waveform(waveform_N: np.ndarray) -> str:
    """SHA-256, in hex, of the 16-bit samples: equal before and after FLAC."""
    return hashlib.sha256(to_int16(waveform_N).tobytes()).hexdigest()


def _read_header(file: soundfile.SoundFile) -> AudioHeader:
    frames = None if file.frames >= UNKNOWN_FRAMES else file.frames
    return AudioHeader(file.format, file.samplerate, file.channels, frames)


def _read_blocks(file: soundfile.SoundFile, num_frames: int) -> np.ndarray:
    """Up to `num_frames` frames; in blocks, because a header may claim 2**63 of them."""
    blocks = []
    while num_frames > 0:
        wanted = min(BLOCK_FRAMES, num_frames)
        # `read` also seeks to where it stopped, which fails, as it should, in a stream whose header lies.
        blocks.append(file.read(wanted, dtype="float32", always_2d=True))
        num_frames -= wanted
        if len(blocks[-1]) < wanted:
            break
    return np.concatenate(blocks)


def _check_length(samples_NC: np.ndarray, header: AudioHeader, data: bytes, *, name: str, limits: AudioLimits) -> None:
    num_frames, longest = len(samples_NC), int(limits.max_seconds * header.rate)
    numbers = {"rate": header.rate, "header_frames": header.frames, "decoded_frames": num_frames}
    if missing := _missing_bytes(data):
        raise AudioError(
            "truncated", f"{name} ends {missing} bytes early; fetch the file again.", numbers | {"missing": missing}
        )
    if num_frames > longest and not limits.cut:
        raise _too_long(name, num_frames / header.rate, limits.max_seconds)
    if num_frames <= longest and header.frames is not None:
        gap = abs(header.frames - num_frames)
        if gap > limits.max_header_gap_seconds * header.rate:
            raise AudioError(
                "header_mismatch",
                f"{name} announces {header.frames} samples, but has {num_frames} ({gap / header.rate:.3f} s apart); "
                "fetch the file again, or allow a max_header_gap_seconds.",
                numbers,
            )
    if num_frames < limits.min_seconds * header.rate:
        raise AudioError(
            "too_short",
            f"{name} has {num_frames / header.rate:.4f} s, but at least {limits.min_seconds:g} s is needed; drop it.",
            numbers,
        )


def _check_values(samples_NC: np.ndarray, *, name: str) -> None:
    peak = float(np.abs(samples_NC).max(initial=0.0))  # NaN and infinity both come through max
    if not np.isfinite(peak):
        bad = int((~np.isfinite(samples_NC)).sum())
        raise AudioError("nonfinite", f"{name} holds {bad} samples that are NaN or infinite; drop it.", {"bad": bad})
    if peak > MAX_PEAK:
        raise AudioError(
            "out_of_range", f"{name} has peak {peak:g}, but float audio stays within 1.0; rescale it.", {"peak": peak}
        )


def _missing_bytes(data: bytes) -> int:
    """Bytes that the container announces and the file does not have; libsndfile shortens such files without a word."""
    if data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        ends = len(data) > last + 5 and data[last + 5] & 4  # the flag of a stream's last page
        return 0 if ends else 1
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    position = 12
    while position + 8 <= len(data):
        chunk, size = struct.unpack_from("<4sI", data, position)
        if chunk == b"data":
            unknown = size in (0, 0xFFFFFFFF)  # written to a pipe: the length was not known
            return 0 if unknown else max(0, position + 8 + size - len(data))
        position += 8 + size + size % 2
    return 0


def _too_long(name: str, seconds: float, limit: float) -> AudioError:
    return AudioError(
        "too_long", f"{name} has {seconds:.1f} s, but at most {limit:g} s is accepted; cut it or drop it.",
        {"seconds": round(seconds, 3)},
    )  # fmt: skip
