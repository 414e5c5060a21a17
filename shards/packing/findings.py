"""What can be wrong with a row of a manifest, how it is found, and what is done about it. Writes nothing."""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from shards.audio.container import read_file, read_samples, read_segment
from shards.audio.decode import (
    GAP_SECONDS,
    LEFT,
    SILENT_PEAK,
    WINDOW_SECONDS,
    choose_channel,
    hash_waveform,
)
from shards.audio.limits import DEFAULT_LIMITS, AudioError, AudioLimits
from shards.lazy_imports import late
from shards.manifests.manifest import Entry
from shards.manifests.records import RowError
from shards.packing.encode import choose_too_long, covers_whole_clip, says_silence
from shards.sample import SAMPLE_RATE

np = late("numpy")

FULL_SCALE = 0.999  # of 1.0: a sample there is taken for clipped
CLIPPED_SHARE = 0.01  # of a file's samples
MAX_CHARS_A_SECOND, MIN_MAX_CHARS = 50, 100  # of a transcript; the fastest readers reach 30
MAX_CHARS = 4000  # of any answer
# What the tokenizers of the usual LLMs and SALMONN's prompts call their control tokens; a LLM's own list is its own
CONTROL_TEXT = re.compile(
    r"</?s>|<(?:unk|pad|bos|eos|mask)>|<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|<(?:start|end)_of_(?:turn|image)>|"
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|\[(?:PAD|CLS|SEP|MASK|UNK|gMASK)\]|"
    r"<</?SYS>>|</?(?:think|tool_call|tool_response)>|</?Speech>|<SpeechHere>|<0x[0-9A-F]{2}>"
)


@dataclass(frozen=True)
class Reason:
    """One kind of finding."""

    meaning: str  # for the table
    verdict: str  # by default: keep, fix, drop, or auto (as `distill pack --too-long auto` would)
    choices: tuple[str, ...]  # verdicts a policy may ask for


_ONLY_DROP, _DROP, _FIX = ("drop",), ("keep", "drop"), ("fix", "drop")
REASONS = {
    "json": Reason("the row is not JSON", "drop", _ONLY_DROP),
    "type": Reason("a field is missing or of the wrong type", "drop", _ONLY_DROP),
    "empty_text": Reason("the answer is empty", "drop", _ONLY_DROP),
    "unknown_task": Reason("there is no prompt for the task", "drop", _ONLY_DROP),
    "missing_question": Reason("the task's prompt is the row's question, which is missing", "drop", _ONLY_DROP),
    "long_text": Reason("nobody says so much in so little time", "drop", _DROP),
    "control_text": Reason("answer or question spells a control token, which is learned as text", "keep", _DROP),
    "missing": Reason("no such file", "drop", _ONLY_DROP),
    "unreadable": Reason("the file cannot be opened, or is none", "drop", _ONLY_DROP),
    "decode": Reason("no decoder reads it", "drop", _ONLY_DROP),
    "truncated": Reason("the file ends early", "drop", _ONLY_DROP),
    "header_mismatch": Reason("the header's length is not that of the samples", "drop", _FIX),
    "checksum": Reason("the samples are not those that the file's MD5 was made of", "keep", _DROP),
    "impossible_rate": Reason("below 8 kHz or above 192 kHz", "drop", _ONLY_DROP),
    "too_large": Reason("over an hour, or half a gigabyte when decoded", "drop", _ONLY_DROP),
    "too_short": Reason("no samples, or under --min-seconds", "drop", _ONLY_DROP),
    "nonfinite": Reason("NaN or infinite samples", "drop", _ONLY_DROP),
    "out_of_range": Reason("float samples far above 1.0", "drop", _ONLY_DROP),
    "silent": Reason("never above -60 dBFS, and the label is not about silence", "drop", _ONLY_DROP),
    "clipped": Reason("over 1 % of the samples at full scale", "drop", _DROP),
    "two_splits": Reason("a later manifest has the same recording", "drop", _DROP),
    "duplicate": Reason("an earlier row has the same audio, task and question", "keep", _DROP),
    "too_long": Reason("over --max-seconds: cut, or dropped where the answer covers it all", "auto", ("auto", *_FIX)),
    "under_window": Reason("under one Q-Former window: padded", "fix", _FIX),
    "wrong_rate": Reason("not 16 kHz: resampled", "fix", _FIX),
    "stereo": Reason("several channels: one is heard, see --channels", "fix", _FIX),
}


@dataclass(frozen=True)
class Finding:
    """One thing about a row."""

    reason: str  # a key of REASONS
    message: str
    numbers: dict


@dataclass(frozen=True)
class RowAudit:
    """What was found in a row, and the hashes that copies of it are recognized by."""

    findings: tuple[Finding, ...]
    seconds: float = 0.0  # at most the longest that is accepted
    clip_hash: int = 0  # of audio, task, question, and of the answer where a clip may have several
    file_hashes: tuple[int, ...] = ()  # of the decoded samples of each recording; empty if one cannot be decoded


@dataclass(frozen=True)
class _FileAudit:
    findings: tuple[Finding, ...]
    seconds: float = 0.0
    peak: float = 0.0  # of what is heard of its channels
    others: float = 0.0  # the loudest peak of any channel
    hash: int | None = None  # None: not decoded


def make_policy(changes: dict[str, str]) -> dict[str, str]:
    """The default verdict of each reason, with changes.

    Raises:
        ValueError: unknown reason, or a verdict that the reason does not allow.
    """
    for reason, verdict in changes.items():
        if reason not in REASONS:
            near = difflib.get_close_matches(reason, REASONS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"reason {reason!r} unknown; {hint}({', '.join(REASONS)})")
        if verdict not in REASONS[reason].choices:
            choices = " or ".join(REASONS[reason].choices)
            raise ValueError(f"policy of {reason} is {verdict!r}, but {REASONS[reason].meaning}; use {choices}.")
    return {reason: entry.verdict for reason, entry in REASONS.items()} | changes


def choose_verdict(row: Entry | RowError, finding: Finding, policy: dict[str, str]) -> str:
    """keep, fix or drop."""
    verdict = policy[finding.reason]
    if verdict != "auto":
        return verdict
    return "drop" if choose_too_long(row, "auto") == "skip" else "fix"


def audit_rows(
    rows: list[Entry | RowError], limits: AudioLimits = DEFAULT_LIMITS, channels: str = LEFT
) -> list[RowAudit]:
    """What is found in each row, by itself; copies are for the caller, who sees them all."""
    _audit_file.cache_clear()  # the files may have changed since another call
    return [_audit_error(row) if isinstance(row, RowError) else _audit_entry(row, limits, channels) for row in rows]


def _audit_error(error: RowError) -> RowAudit:
    return RowAudit((Finding(error.reason, str(error), {"field": error.field}),))


def _audit_entry(entry: Entry, limits: AudioLimits, channels: str) -> RowAudit:
    files = [_audit_file(path, entry.start, entry.end, limits, channels) for path in entry.paths]
    # one finding a reason: the first file's
    findings = list({finding.reason: finding for file in reversed(files) for finding in file.findings}.values())
    spelled = CONTROL_TEXT.search(f"{entry.text or ''}\n{entry.question or ''}")
    if spelled:
        message = f"{entry.place} spells {spelled[0]}, a control token of some LLMs; it is learned as text"
        findings.append(Finding("control_text", message, {"token": spelled[0]}))
    if any(file.hash is None for file in files):
        return RowAudit(tuple(findings))
    seconds = sum(file.seconds for file in files) + GAP_SECONDS * (len(files) - 1)
    findings += _check_whole(entry, seconds, files, limits.max_seconds)
    hashes = tuple(file.hash for file in files)
    several = None if covers_whole_clip(entry) else entry.text  # a clip has one transcript, but many captions
    clip_hash = _short_hash(repr((hashes, entry.task, entry.question, several)).encode())
    return RowAudit(tuple(findings), min(seconds, limits.max_seconds), clip_hash, hashes)


def _check_whole(entry: Entry, seconds: float, files: list[_FileAudit], longest: float) -> list[Finding]:
    """Findings about the joined clip and its answer."""
    findings = []
    numbers = {"seconds": round(seconds, 3)}
    peak, others = max(file.peak for file in files), max(file.others for file in files)
    if seconds > longest:
        findings.append(Finding("too_long", f"{entry.path} has {seconds:.1f} s of at most {longest:g}", numbers))
    if seconds < WINDOW_SECONDS:
        findings.append(Finding("under_window", f"{entry.path} has {seconds:.3f} s of {WINDOW_SECONDS:.3f}", numbers))
    if peak < SILENT_PEAK and not says_silence(entry):
        elsewhere = f" in what is heard of it, but at {others:.1e} in another channel" if others >= SILENT_PEAK else ""
        findings.append(Finding("silent", f"{entry.path} peaks at {peak:.1e}{elsewhere}", {"peak": peak}))
    num_chars = len(entry.text or "")
    allowed = MAX_CHARS
    if covers_whole_clip(entry):
        allowed = min(MAX_CHARS, max(MIN_MAX_CHARS, MAX_CHARS_A_SECOND * seconds))
    if num_chars > allowed:
        message = f"{entry.place} has an answer of {num_chars} characters for {seconds:.1f} s"
        findings.append(Finding("long_text", message, numbers | {"characters": num_chars}))
    return findings


@lru_cache(maxsize=64)  # rows about one recording stand side by side
def _audit_file(path: Path, start: float, end: float | None, limits: AudioLimits, channels: str) -> _FileAudit:
    limits = replace(
        limits, max_seconds=limits.max_seconds + 1, cut=True
    )  # a second more tells a long stream of unknown length
    try:
        return _measure_file(path, start, end, limits, channels)
    except FileNotFoundError:
        return _FileAudit((Finding("missing", f"{path} does not exist", {}),))
    except OSError as error:
        return _FileAudit((Finding("unreadable", str(error), {}),))
    except AudioError as error:
        finding = Finding(error.reason, str(error), error.numbers)
    if finding.reason != "header_mismatch":
        return _FileAudit((finding,))
    try:
        measured = _measure_file(path, start, end, replace(limits, max_header_gap_seconds=float("inf")), channels)
        return replace(measured, findings=(finding, *measured.findings))
    except AudioError as error:
        return _FileAudit((finding, Finding(error.reason, str(error), error.numbers)))


def _measure_file(path: Path, start: float, end: float | None, limits: AudioLimits, channels: str) -> _FileAudit:
    if end is None:
        samples_NC, header = read_samples(read_file(path), name=str(path), limits=limits)
    else:
        samples_NC, header = read_segment(path, start, end, limits=limits)
    findings = []
    if header.channels > 1:
        findings.append(Finding("stereo", f"{path} has {header.channels} channels", {"channels": header.channels}))
    if header.rate != SAMPLE_RATE:
        findings.append(Finding("wrong_rate", f"{path} has {header.rate} Hz", {"rate": header.rate}))
    if header.is_hash_wrong:
        findings.append(Finding("checksum", f"{path} has other samples than its MD5 was made of", {}))
    heard_N = choose_channel(samples_NC, channels)
    level_N = np.abs(heard_N)
    share = float((level_N >= FULL_SCALE).mean())
    if share > CLIPPED_SHARE:
        findings.append(Finding("clipped", f"{path} has {share:.1%} of its samples at full scale", {"share": share}))
    is_cut = len(samples_NC) == int(limits.max_seconds * header.rate)
    seconds = header.seconds if is_cut and header.frames is not None else len(samples_NC) / header.rate
    peaks, file_hash = (float(level_N.max()), float(np.abs(samples_NC).max())), hash_waveform(heard_N)
    return _FileAudit(tuple(findings), seconds, *peaks, _short_hash(file_hash.encode()))


def _short_hash(data: bytes) -> int:
    """64 bits: a million clips meet by chance once in 37 million audits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
