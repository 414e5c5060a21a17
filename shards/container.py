"""What an audio file says it holds and what it does hold, in its own rate and channels. Knows no manifest and no tar.

Everything a decoder passes over in silence is looked at here: a header that lies, a file cut short, NaN, a rate no
recorder has, an hour in a few kilobytes. What cannot be trusted raises `AudioError` with a `reason` to count by.

Shape letters: N audio samples, C channels.
"""

import io
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from shards.sample import MAX_SECONDS

MIN_RATE, MAX_RATE = 8_000, 192_000  # Hz
MAX_PEAK = 2.0  # a lossy decoder overshoots 1.0 a little; integers stored as floats by much
BLOCK_FRAMES = 1 << 16  # small: the seek after each block is what finds a FLAC whose header lies
END_TOLERANCE_SECONDS = 0.05  # a transcript may name an end this far after the recording's
UNKNOWN_FRAMES = 1 << 62  # libsndfile's count for a stream that does not say how long it is


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


DEFAULT_LIMITS = AudioLimits()


@dataclass(frozen=True)
class AudioHeader:
    """What a file says about itself."""

    format: str  # as libsndfile names it: WAV, FLAC, OGG, MP3
    rate: int  # Hz
    channels: int
    frames: int | None  # samples a channel; None: the header does not say

    @property
    def seconds(self) -> float | None:
        """Length; None where `frames` is."""
        return None if self.frames is None else self.frames / self.rate


def read_file(path: Path, *, limits: AudioLimits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it is not there, or must not be read.
        AudioError: it is too large, or no file (a folder, a device, a pipe that would never end).
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise AudioError("unreadable", f"{path} is no file; mend the manifest.")
    if status.st_size > limits.max_file_bytes:
        raise AudioError(
            "too_large",
            f"{path} has {status.st_size} bytes, but {limits.max_file_bytes} are accepted at most; split it.",
            {"bytes": status.st_size},
        )
    return path.read_bytes()


def read_samples(data: bytes, *, name: str, limits: AudioLimits = DEFAULT_LIMITS) -> tuple[np.ndarray, AudioHeader]:
    """Decode as it is stored: the file's own rate and channels, checked against its header and `limits`.

    Returns:
        float32 samples of shape (N, C), at most `limits.max_seconds` of them, and the header.

    Raises:
        AudioError: see `decode_audio`.
    """
    with _open(io.BytesIO(data), name) as file:
        header = _read_header(file)
        check_header(header, name=name, limits=limits)
        samples_NC = _read_blocks(file, int(limits.max_seconds * header.rate) + 1)
    _check_length(samples_NC, header, data, name=name, limits=limits)
    _check_values(samples_NC, name=name)
    return samples_NC[: int(limits.max_seconds * header.rate)], header


def read_header(path: Path) -> AudioHeader:
    """What a file says about itself.

    Raises:
        AudioError: reason decode.
    """
    with path.open("rb") as data, _open(data, str(path)) as file:
        return _read_header(file)


def read_segment(
    path: Path, start: float, end: float, *, limits: AudioLimits = DEFAULT_LIMITS
) -> tuple[np.ndarray, AudioHeader]:
    """Decode a part of a long recording, as `read_samples` does a whole one; only that part is read.

    Args:
        path: the recording; it may be hours long.
        start, end: of the part, seconds.
        limits: hold for the part.

    Raises:
        AudioError: see `decode_audio`; also where the recording ends before the part does.
    """
    name = f"{path} ({start:g} to {end:g} s)"
    with path.open("rb") as data, _open(data, name) as file:
        header = _read_header(file)
        part = AudioHeader(header.format, header.rate, header.channels, round((end - start) * header.rate))
        check_header(part, name=name, limits=limits)
        if header.frames is None or header.seconds < end - END_TOLERANCE_SECONDS:
            raise AudioError(
                "truncated",
                f"{name} must be there to its end, but the recording has {header.seconds} s; fetch it again.",
                {"seconds": header.seconds, "end": end},
            )
        file.seek(round(start * header.rate))
        samples_NC = _read_blocks(file, min(part.frames, int(limits.max_seconds * header.rate)))
    _check_length(samples_NC, replace(part, frames=None), b"", name=name, limits=limits)
    _check_values(samples_NC, name=name)
    return samples_NC, part


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
        raise too_long_error(name, seconds, limits.max_seconds)
    decoded = int(min(seconds or limits.max_seconds, limits.max_seconds) * header.rate) * header.channels * 4
    if decoded > limits.max_decoded_bytes:
        raise AudioError(
            "too_large",
            f"{name} would decode to {decoded} bytes ({header.channels} channels), but {limits.max_decoded_bytes} are "
            "accepted; mix it down first.",
            {"decoded_bytes": decoded, "channels": header.channels},
        )


@contextmanager
def _open(data: BinaryIO, name: str) -> Iterator[soundfile.SoundFile]:
    """libsndfile on a file, its errors turned into ours."""
    try:
        with soundfile.SoundFile(data) as file:
            yield file
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        text = str(error).rpartition(">: ")[2]  # libsndfile names the Python object, not the file
        raise AudioError("decode", f"{name} cannot be decoded: {text}") from error


def _read_header(file: soundfile.SoundFile) -> AudioHeader:
    frames = None if file.frames >= UNKNOWN_FRAMES else file.frames
    return AudioHeader(file.format, file.samplerate, file.channels, frames)


def _read_blocks(file: soundfile.SoundFile, num_frames: int) -> np.ndarray:
    """Up to `num_frames` frames, float32; in blocks, because a header may claim 2**63 of them."""
    is_16_bit = file.subtype == "PCM_16"  # libsndfile takes longer to make floats of it than numpy does, of equal bits
    blocks = []
    while num_frames > 0:
        wanted = min(BLOCK_FRAMES, num_frames)
        # `read` also seeks to where it stopped, which fails, as it should, in a stream whose header lies.
        blocks.append(file.read(wanted, dtype="int16" if is_16_bit else "float32", always_2d=True))
        num_frames -= wanted
        if len(blocks[-1]) < wanted:
            break
    samples_NC = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    return np.multiply(samples_NC, np.float32(2**-15), dtype=np.float32) if is_16_bit else samples_NC


def _check_length(samples_NC: np.ndarray, header: AudioHeader, data: bytes, *, name: str, limits: AudioLimits) -> None:
    num_frames, longest = len(samples_NC), int(limits.max_seconds * header.rate)
    numbers = {"rate": header.rate, "header_frames": header.frames, "decoded_frames": num_frames}
    if missing := _missing_bytes(data):
        raise AudioError(
            "truncated", f"{name} ends {missing} bytes early; fetch the file again.", numbers | {"missing": missing}
        )
    if num_frames > longest and not limits.cut:
        raise too_long_error(name, num_frames / header.rate, limits.max_seconds)
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
    # NaN and infinity both come through max; the absolute values would be a second array to fill.
    peak = max(float(samples_NC.max(initial=0.0)), -float(samples_NC.min(initial=0.0)))
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
        return _missing_ogg_bytes(data)
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


def _missing_ogg_bytes(data: bytes) -> int:
    """What the last page lacks; at least 1 where it is not flagged as the stream's last (RFC 3533, section 6)."""
    page = data.rfind(b"OggS")
    header = data[page : page + 27]
    if len(header) < 27:
        return 27 - len(header)
    num_segments = header[26]
    missing = page + 27 + num_segments + sum(data[page + 27 : page + 27 + num_segments]) - len(data)
    return max(missing, 0 if header[5] & 4 else 1)


def too_long_error(name: str, seconds: float, limit: float) -> AudioError:
    """The error for a clip of `seconds` where `limit` are accepted."""
    return AudioError(
        "too_long", f"{name} has {seconds:.1f} s, but at most {limit:g} s is accepted; cut it or drop it.",
        {"seconds": round(seconds, 3)},
    )  # fmt: skip
