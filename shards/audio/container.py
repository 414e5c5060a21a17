"""What an audio file says it holds and what it does hold, in its own rate and channels. Knows no manifest and no tar.

Everything a decoder passes over in silence is looked at here: a header that lies, a file cut short or joined of
several, NaN, a rate no recorder has, an hour in a few kilobytes. The length is counted by a walk over the container
(`shards.audio.parts`), and what is decoded is held to it: to the sample, for MP3 to a frame and the decoder's delay.
What cannot be trusted raises `AudioError` with a `reason` to count by.

Shape letters: N audio samples, C channels.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from shards.audio.chunks import CHUNKS
from shards.audio.flac import FLAC
from shards.audio.limits import DEFAULT_LIMITS, AudioError, AudioLimits, too_long_error
from shards.audio.mpeg import MPEG, tag_size
from shards.audio.ogg import OGG
from shards.audio.parts import DamageError, Data, Joined, Part
from shards.lazy_imports import late

np = late("numpy")
soundfile = late("soundfile")

MIN_RATE, MAX_RATE = 8_000, 192_000  # Hz
MAX_PEAK = 2.0  # a lossy decoder overshoots 1.0 a little; integers stored as floats by much
BLOCK_FRAMES = 1 << 16  # small: the seek after each block is what finds a FLAC whose header lies
END_TOLERANCE_SECONDS = 0.05  # a transcript may name an end this far after the recording's
UNKNOWN_FRAMES = 1 << 62  # libsndfile's count for a stream that does not say how long it is
INTEGERS = {"PCM_16": ("int16", 2), "PCM_S8": ("int16", 1), "PCM_24": ("int32", 3)}  # as read, and stored bytes


CONTAINERS = {  # a family is one file and one line here; a file is of the first that knows it
    "flac": FLAC,
    "ogg": OGG,
    "chunks": CHUNKS,
    "mpeg": MPEG,
}


@dataclass(frozen=True)
class AudioHeader:
    """What a file says about itself."""

    format: str  # as libsndfile names it: WAV, FLAC, OGG, MP3
    rate: int  # Hz
    channels: int
    frames: int | None  # samples a channel; None: the header does not say
    is_hash_wrong: bool = False  # the file's MD5 was made of other samples than are decoded

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
    parts = find_parts(data, name=name)
    blocks, header = [], None
    for part in parts:
        with _open(part, name) as file:
            own = _read_header(file)
            if header is None:
                header = replace(own, frames=_sum_frames(parts, own))
                check_header(header, name=name, limits=limits)
            _check_alike(header, own, name)
            left = int(limits.max_seconds * header.rate) + 1 - sum(map(len, blocks))
            samples_NC, is_hash_wrong = _read_part(file, part, own, left, name=name, limits=limits)
            blocks.append(samples_NC)
            header = replace(header, is_hash_wrong=header.is_hash_wrong or is_hash_wrong)
    samples_NC = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    _check_length(samples_NC, header, name=name, limits=limits)
    _check_values(samples_NC, name=name)
    return samples_NC[: int(limits.max_seconds * header.rate)], header


def read_header(path: Path) -> AudioHeader:
    """What a file holds, by a walk over all of it; nothing is decoded.

    Raises:
        OSError: it is not there, or must not be read.
        AudioError: see `decode_audio`.
    """
    surveyed = _survey_file(path)
    first = surveyed[0][1]
    frames = [header.frames for _, header in surveyed]
    return replace(first, frames=None if None in frames else sum(frames))


def read_segment(
    path: Path, start: float, end: float, *, limits: AudioLimits = DEFAULT_LIMITS
) -> tuple[np.ndarray, AudioHeader]:
    """Decode a part of a long recording, as `read_samples` does a whole one; only that part is decoded.

    Args:
        path: the recording; it may be hours long.
        start, end: of the part, seconds.
        limits: hold for the part.

    Raises:
        AudioError: see `decode_audio`; also where the recording ends before the part does.
    """
    name = f"{path} ({start:g} to {end:g} s)"
    surveyed, whole = _survey_file(path), read_header(path)
    part = replace(whole, frames=round((end - start) * whole.rate))
    check_header(part, name=name, limits=limits)
    if whole.frames is None or whole.seconds < end - END_TOLERANCE_SECONDS:
        raise AudioError(
            "truncated",
            f"{name} must be there to its end, but the recording has {whole.seconds} s; fetch it again.",
            {"seconds": whole.seconds, "end": end},
        )
    first, left, blocks = round(start * whole.rate), min(part.frames, int(limits.max_seconds * whole.rate)), []
    for stream, header in surveyed:
        if first < header.frames and left > 0:
            with _open(stream, name) as file:
                file.seek(first)
                blocks.append(_to_floats(_read_blocks(file, min(left, header.frames - first))))
            left -= len(blocks[-1])
        first = max(first - header.frames, 0)
    samples_NC = np.concatenate(blocks) if blocks else np.zeros((0, whole.channels), np.float32)
    if len(samples_NC) < part.frames - END_TOLERANCE_SECONDS * whole.rate and not limits.cut:
        raise _mismatch(name, part.frames, len(samples_NC), whole.rate)
    _check_length(samples_NC, part, name=name, limits=limits)
    _check_values(samples_NC, name=name)
    return samples_NC, part


def find_parts(data: Data, *, name: str) -> list[Part]:
    """The streams of a file as a decoder is to read them, each with the length that a walk over it counts.

    Raises:
        AudioError: something of the file is missing, damaged, or cannot be placed.
    """
    start = 0
    while data[start : start + 3] == b"ID3" and (tag := tag_size(data, start)):
        start += tag
    try:
        found = (container.walk(data, start) for container in CONTAINERS.values())
        return next((parts for parts in found if parts), None) or [Part((memoryview(data),))]
    except DamageError as error:
        raise AudioError(error.reason, f"{name} {error.problem}", error.numbers) from error


def _survey_file(path: Path) -> tuple[tuple[Part, AudioHeader], ...]:
    status = path.stat()
    return _survey(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)  # rows about one recording stand side by side
def _survey(path: Path, size: int, _: int) -> tuple[tuple[Part, AudioHeader], ...]:
    """The parts of a file on the disk, each with its header, which tells the walk's count."""
    if not size or not path.is_file():
        raise AudioError("decode", f"{path} is no file with something in it; mend the manifest or fetch it again.")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    surveyed = []
    for part in find_parts(data, name=str(path)):
        with _open(part, str(path)) as file:
            header = _read_header(file)
        surveyed.append((part, replace(header, frames=_sum_frames([part], header))))
        _check_alike(surveyed[0][1], header, str(path))
    return tuple(surveyed)


def _sum_frames(parts: list[Part], header: AudioHeader) -> int | None:
    """The walk's count at the decoder's rate; that of a part that no walk counts is the decoder's, if it is alone."""
    if len(parts) == 1 and parts[0].frames is None:
        return header.frames
    if any(part.frames is None for part in parts):
        return None
    return sum(round(part.frames * header.rate / (part.rate or header.rate)) for part in parts)


def _check_alike(first: AudioHeader, other: AudioHeader, name: str) -> None:
    if not any(other.format in container.formats for container in CONTAINERS.values()):
        raise AudioError(
            "decode", f"{name} is {other.format}, a form whose length nothing vouches for; make it WAV or FLAC."
        )
    if (other.rate, other.channels) != (first.rate, first.channels):
        raise AudioError(
            "header_mismatch",
            f"{name} joins {first.rate} Hz of {first.channels} channels and {other.rate} Hz of {other.channels}; split "
            "it.",
        )


def _mismatch(name: str, announced: int, held: int, rate: int) -> AudioError:
    gap = abs(announced - held) / rate
    return AudioError(
        "header_mismatch",
        f"{name} announces {announced} samples, but has {held} ({gap:.3f} s apart); fetch the file again, or pack "
        "it with a larger --max-header-gap.",
        {"rate": rate, "header_frames": announced, "decoded_frames": held},
    )


def _read_part(
    file: soundfile.SoundFile, part: Part, own: AudioHeader, num_frames: int, *, name: str, limits: AudioLimits
) -> tuple[np.ndarray, bool]:
    """Up to `num_frames` of one stream, held to the walk's count where all is read, and whether the hash is wrong."""
    integers_NC = _read_blocks(file, num_frames)
    samples_NC = _to_floats(integers_NC)
    expected = _sum_frames([part], own)
    if len(samples_NC) == num_frames and (expected is None or expected >= num_frames):
        return samples_NC, False
    slack = part.slack_frames * own.rate / (part.rate or own.rate)
    gap = 0 if expected is None else abs(len(samples_NC) - expected)
    if gap > max(slack, limits.max_header_gap_seconds * own.rate):
        raise _mismatch(name, expected, len(samples_NC), own.rate)
    is_hash_wrong = part.md5 is not None and _hash(integers_NC, file.subtype) not in (None, part.md5)
    if is_hash_wrong and len(part.pieces) > 1:  # then the header was wrong twice
        raise AudioError(
            "header_mismatch", f"{name} announces neither its {len(samples_NC)} samples nor their MD5; fetch it again."
        )
    return samples_NC, is_hash_wrong


def _hash(integers_NC: np.ndarray, subtype: str) -> bytes | None:
    """MD5 of samples as FLAC has it: of little-endian integers, as wide as they are stored."""
    if subtype not in INTEGERS or integers_NC.dtype == np.float32:
        return None
    width, size = INTEGERS[subtype][1], integers_NC.dtype.itemsize
    if width == size:
        return hashlib.md5(np.ascontiguousarray(integers_NC)).digest()
    stored = (integers_NC >> 8 * (size - width)).reshape(-1, 1).view(np.uint8)[:, :width]
    return hashlib.md5(np.ascontiguousarray(stored)).digest()


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
def _open(part: Part, name: str) -> Iterator[soundfile.SoundFile]:
    """libsndfile on a part, its errors turned into ours."""
    try:
        with soundfile.SoundFile(_to_file(part)) as file:
            yield file
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        text = str(error).rpartition(">: ")[2]  # libsndfile names the Python object, not the file
        raise AudioError("decode", f"{name} cannot be decoded: {text}") from error


def _to_file(part: Part) -> io.BufferedIOBase | io.RawIOBase:
    """The part to read from; one piece in memory is read faster from a copy than by Python."""
    is_in_memory = len(part.pieces) == 1 and isinstance(memoryview(part.pieces[0]).obj, bytes)
    return io.BytesIO(part.pieces[0]) if is_in_memory else Joined(part.pieces)


def _read_header(file: soundfile.SoundFile) -> AudioHeader:
    frames = None if file.frames >= UNKNOWN_FRAMES else file.frames
    return AudioHeader(file.format, file.samplerate, file.channels, frames)


def _read_blocks(file: soundfile.SoundFile, num_frames: int) -> np.ndarray:
    """Up to `num_frames` frames, as they are stored or float32; in blocks, because a header may claim 2**63 of them."""
    # libsndfile takes longer to make floats of integers than numpy does, of equal bits
    dtype = INTEGERS[file.subtype][0] if file.subtype in INTEGERS else "float32"
    blocks = []
    while num_frames > 0:
        wanted = min(BLOCK_FRAMES, num_frames)
        # `read` also seeks to where it stopped, which fails, as it should, in a stream whose header lies.
        blocks.append(file.read(wanted, dtype=dtype, always_2d=True))
        num_frames -= wanted
        if len(blocks[-1]) < wanted:
            break
    if not blocks:
        return np.zeros((0, file.channels), np.float32)
    return np.concatenate(blocks) if len(blocks) > 1 else blocks[0]


def _to_floats(stored_NC: np.ndarray) -> np.ndarray:
    """float32 within [-1, 1] of integers that fill their type."""
    if stored_NC.dtype == np.float32:
        return stored_NC
    scale = np.float32(2.0 ** (1 - 8 * stored_NC.dtype.itemsize))
    return np.multiply(stored_NC, scale, dtype=np.float32, casting="unsafe")


def _check_length(samples_NC: np.ndarray, header: AudioHeader, *, name: str, limits: AudioLimits) -> None:
    num_frames = len(samples_NC)
    if num_frames > int(limits.max_seconds * header.rate) and not limits.cut:
        raise too_long_error(name, num_frames / header.rate, limits.max_seconds)
    if num_frames < limits.min_seconds * header.rate:
        raise AudioError(
            "too_short",
            f"{name} has {num_frames / header.rate:.4f} s, but at least {limits.min_seconds:g} s is needed; drop it.",
            {"rate": header.rate, "header_frames": header.frames, "decoded_frames": num_frames},
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
