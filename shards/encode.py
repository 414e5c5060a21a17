"""From an entry of a manifest to the members of its sample, or to the reason why there are none. Knows no tar."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards.audio import SILENT_PEAK, encode_flac, hash_waveform, load_audio
from shards.container import AudioError, AudioLimits
from shards.manifest import Entry
from shards.records import RowError
from shards.sample import SAMPLE_RATE

TOO_LONG = ("auto", "cut", "skip", "chunk", "error")
# Their answer covers the whole clip: cut the clip, and the answer says what cannot be heard.
WHOLE_CLIP_TASKS = frozenset({"asr", "phone_recognition", "translation_ec", "lyrics_recognition"})
SAYS_SILENCE = re.compile(
    r"\b(silen(ce|t)|quiet|no (sounds?|speech|audio|one|voice)|nothing|inaudible)\b", re.IGNORECASE
)
MIN_REST_SECONDS = 1.0  # a shorter last piece of a chunked clip is dropped


@dataclass(frozen=True)
class EncodeOptions:
    """How an entry becomes samples; part of what a pack is identified by."""

    too_long: str = "auto"  # one of TOO_LONG
    limits: AudioLimits = field(default_factory=AudioLimits)

    def __post_init__(self):
        if self.too_long not in TOO_LONG:
            raise ValueError(f"too_long is {self.too_long!r}, but must be one of {', '.join(TOO_LONG)}; choose one.")


@dataclass(frozen=True)
class Encoded:
    """One sample as the bytes of its members."""

    key: str
    flac: bytes
    json: bytes
    seconds: float


@dataclass(frozen=True)
class _Clip:
    """A waveform, encoded."""

    flac: bytes
    sha256: str
    seconds: float
    peak: float


@dataclass(frozen=True)
class BadSample:
    """A row that gave no sample: a line of bad_samples.jsonl."""

    number: int  # of the row
    path: str  # of the first recording, or of the manifest where the row itself is wrong
    reason: str
    message: str
    numbers: dict

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False, allow_nan=False)


def count_reasons(bad: list[BadSample]) -> dict[str, int]:
    """How many bad samples there are of each reason, the commonest first."""
    return dict(Counter(sample.reason for sample in bad).most_common())


def describe_reasons(bad: list[BadSample]) -> str:
    """The same in words: `3 decode, 1 silent`."""
    return ", ".join(f"{count} {reason}" for reason, count in count_reasons(bad).items())


class StopPacking(ValueError):
    """A clip that the options say to stop at, not to skip."""


def encode_rows(rows: list[Entry | RowError], options: EncodeOptions) -> list[list[Encoded] | BadSample]:
    """For each row its samples (more than one only where a long clip is chunked) or why there are none.

    Raises:
        StopPacking: a clip is too long and `options.too_long` is error.
    """
    _load_clip.cache_clear()  # the files may have changed since another call
    return [_encode_row(row, options) for row in rows]


def says_silence(entry: Entry) -> bool:
    """Whether the label is about silence, so that a silent clip is what it should be."""
    return entry.text is not None and not covers_whole_clip(entry) and bool(SAYS_SILENCE.search(entry.text))


def choose_too_long(entry: Entry, too_long: str) -> str:
    """What `auto` means for this entry: skip where the answer covers the whole clip, else cut."""
    if too_long != "auto":
        return too_long
    return "skip" if covers_whole_clip(entry) else "cut"


def covers_whole_clip(entry: Entry) -> bool:
    """Whether the answer writes down all that is said, so that it is wrong for a part of the clip."""
    return entry.text is not None and entry.task in WHOLE_CLIP_TASKS


def _encode_row(row: Entry | RowError, options: EncodeOptions) -> list[Encoded] | BadSample:
    if isinstance(row, RowError):
        return BadSample(row.number, str(row.path), row.reason, str(row), {"field": row.field})
    try:
        return _encode_entry(row, options)
    except AudioError as error:
        if error.reason == "too_long" and options.too_long == "error":
            raise StopPacking(str(error)) from None
        return BadSample(row.number, str(row.path), error.reason, str(error), error.numbers)
    except OSError as error:
        return BadSample(row.number, str(row.path), "unreadable", str(error), {})


def _encode_entry(entry: Entry, options: EncodeOptions) -> list[Encoded]:
    too_long = choose_too_long(entry, options.too_long)
    if too_long == "chunk" and entry.text is None:
        clips = _load_chunks(entry, options.limits)
        return [_encode_sample(entry, clip, f"{entry.key}-{number:03d}") for number, clip in enumerate(clips)]
    clip = _load_clip(entry.paths, entry.start, entry.end, replace(options.limits, cut=too_long == "cut"))
    return [_encode_sample(entry, clip, entry.key)]


@lru_cache(maxsize=4)  # several captions or questions of one clip stand side by side in a manifest
def _load_clip(paths: tuple[Path, ...], start: float, end: float | None, limits: AudioLimits) -> _Clip:
    return _encode_clip(load_audio(paths, start=start, end=end, limits=limits))


def _load_chunks(entry: Entry, limits: AudioLimits) -> list[_Clip]:
    """Pieces of max_seconds of an unlabelled clip; a label would belong to the whole."""
    whole = replace(limits, max_seconds=limits.max_header_seconds)
    waveform_N = load_audio(entry.paths, start=entry.start, end=entry.end, limits=whole)
    size = int(limits.max_seconds * SAMPLE_RATE)
    pieces = [waveform_N[start : start + size] for start in range(0, len(waveform_N), size)]
    if len(pieces) > 1 and len(pieces[-1]) < MIN_REST_SECONDS * SAMPLE_RATE:
        pieces.pop()
    return [_encode_clip(piece) for piece in pieces]


def _encode_clip(waveform_N: np.ndarray) -> _Clip:
    peak = float(np.abs(waveform_N).max())
    return _Clip(encode_flac(waveform_N), hash_waveform(waveform_N), len(waveform_N) / SAMPLE_RATE, peak)


def _encode_sample(entry: Entry, clip: _Clip, key: str) -> Encoded:
    if clip.peak < SILENT_PEAK and not says_silence(entry):
        message = f"{entry.path} is silent (peak {clip.peak:.1e}), but its label is not about silence; drop it."
        raise AudioError("silent", message, {"peak": clip.peak})
    fields = {
        "text": entry.text,
        "task": entry.task,
        "Q": entry.question,
        "source": entry.source,
        "duration": clip.seconds,
        "sha256": clip.sha256,
    }
    return Encoded(key, clip.flac, json.dumps(fields, ensure_ascii=False).encode(), clip.seconds)
