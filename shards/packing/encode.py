"""From an entry of a manifest to the members of its sample, or to the reason why there are none. Knows no tar."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from shards.audio.container import read_header
from shards.audio.decode import CHANNELS, LEFT, SILENT_PEAK, encode_flac, hash_waveform, load_audio, to_int16
from shards.audio.limits import AudioError, AudioLimits
from shards.lazy_imports import late
from shards.manifests.manifest import Entry
from shards.manifests.records import RowError
from shards.sample import SAMPLE_RATE

np = late("numpy")

TOO_LONG = ("auto", "cut", "skip", "chunk", "error")
# Their answer covers the whole clip: cut the clip, and the answer says what cannot be heard.
WHOLE_CLIP_TASKS = frozenset(
    (
        *("asr", "asr_zh", "asr_de", "lyrics_recognition", "speech_separation", "speaker_diarization_asr"),
        *("translation_ec", "translation_ce", "translation_en2ja", "translation_en2de"),
        *("audio_speech_description", "fluent_speech_audio"),  # they repeat what is said
        *("phone_recognition", "phone_retrieval", "info_retrieval", "info_retrieval_wotext", "time_QA", "audio_time"),
        *("count_audio", "count_word"),
    )
)
SAYS_SILENCE = re.compile(
    r"\b(silen(ce|t)|quiet|no (sounds?|speech|audio|one|voice)|nothing|inaudible)\b", re.IGNORECASE
)
MIN_REST_SECONDS = 1.0  # of the last piece of a chunked recording; a shorter one is left out


@dataclass(frozen=True)
class EncodeOptions:
    """How an entry becomes samples; part of what a pack is identified by."""

    too_long: str = "auto"  # one of TOO_LONG
    limits: AudioLimits = field(default_factory=AudioLimits)
    channels: str = LEFT  # one of CHANNELS

    def __post_init__(self):
        if self.too_long not in TOO_LONG:
            raise ValueError(f"too_long is {self.too_long!r}, but must be one of {', '.join(TOO_LONG)}; choose one.")
        if self.channels not in CHANNELS:
            raise ValueError(f"channels is {self.channels!r}, but must be one of {', '.join(CHANNELS)}; choose one.")


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
        """The line, without its end."""
        return json.dumps(vars(self), ensure_ascii=False, allow_nan=False)


def count_reasons(bad: list[BadSample]) -> dict[str, int]:
    """How many bad samples there are of each reason, the commonest first."""
    return dict(Counter(sample.reason for sample in bad).most_common())


def describe_reasons(bad: list[BadSample]) -> str:
    """The same in words: `3 decode, 1 silent`."""
    return ", ".join(f"{count} {reason}" for reason, count in count_reasons(bad).items())


class StopPacking(ValueError):
    """A clip that the options say to stop at, not to skip."""


def encode_rows(rows: list[Entry | RowError], options: EncodeOptions) -> list[list[Encoded | BadSample]]:
    """For each row its sample (several only where a long clip is chunked), or why there is none.

    Raises:
        StopPacking: a clip is too long and `options.too_long` is error.
    """
    _load_clip.cache_clear()  # the files may have changed since another call
    return [list(_encode_row(row, options)) for row in rows]


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


def _encode_row(row: Entry | RowError, options: EncodeOptions) -> Iterator[Encoded | BadSample]:
    if isinstance(row, RowError):
        yield BadSample(row.number, str(row.path), row.reason, str(row), {"field": row.field})
        return
    try:
        parts = _plan_parts(row, options)
    except (AudioError, OSError) as error:
        yield _to_bad(row, error)
        return
    limits = replace(options.limits, cut=choose_too_long(row, options.too_long) == "cut")
    for key, start, end in parts:
        try:
            yield _encode_sample(row, _load_clip(row.paths, start, end, limits, options.channels), key)
        except (AudioError, OSError) as error:
            bad = _to_bad(row, error)
            if bad.reason == "too_long" and options.too_long == "error":
                raise StopPacking(bad.message) from None
            yield bad


def _plan_parts(entry: Entry, options: EncodeOptions) -> list[tuple[str, float, float | None]]:
    """Key, start and end of each sample: one, but for a long unlabelled recording that is to be chunked."""
    if options.too_long != "chunk" or entry.text is not None or entry.more_paths:
        return [(entry.key, entry.start, entry.end)]
    end, size = entry.end or read_header(entry.path).seconds, options.limits.max_seconds
    if end is None or end - entry.start <= size:
        return [(entry.key, entry.start, entry.end)]
    starts = np.arange(entry.start, end - MIN_REST_SECONDS, size).tolist()
    return [(f"{entry.key}-{number:04d}", start, min(start + size, end)) for number, start in enumerate(starts)]


def _to_bad(entry: Entry, error: AudioError | OSError) -> BadSample:
    if isinstance(error, AudioError):
        return BadSample(entry.number, str(entry.path), error.reason, str(error), error.numbers)
    return BadSample(entry.number, str(entry.path), "unreadable", str(error), {})


@lru_cache(maxsize=4)  # several captions or questions of one clip stand side by side in a manifest
def _load_clip(paths: tuple[Path, ...], start: float, end: float | None, limits: AudioLimits, channels: str) -> _Clip:
    waveform_N = load_audio(paths, start=start, end=end, limits=limits, channels=channels)
    peak, samples_N = float(np.abs(waveform_N).max()), to_int16(waveform_N)
    return _Clip(encode_flac(samples_N), hash_waveform(samples_N), len(samples_N) / SAMPLE_RATE, peak)


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
