"""The frames of a FLAC file, by their headers. Knows bytes, and decodes nothing.

STREAMINFO's number of samples is a claim: 0 where a pipe was written to, anything where files were cut or joined. A
frame's header tells the frame's place and size, under a checksum, so the last one of an unbroken row tells the length.
RFC 9639, sections 8 and 9.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from shards.audio.parts import Container, DamageError, Data, Part

_STREAM = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # the mark and STREAMINFO, which comes first and has 34 bytes
_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_STREAMINFO = 0
_POLYNOMIAL = 0x07  # of the headers' CRC-8


@dataclass(frozen=True)
class _Info:
    """STREAMINFO, and where the frames begin."""

    at: int  # of its 34 bytes
    frames_at: int
    total: int  # samples a channel; 0: not known
    md5: bytes | None


@dataclass(frozen=True)
class _Frame:
    """A frame's header."""

    is_variable: bool  # `number` counts samples, not frames
    number: int
    samples: int


def walk_flac(data: Data, start: int = 0) -> list[Part] | None:
    """The streams of a file whose first is at `start`; None where none is.

    Raises:
        DamageError: frames are missing, at the beginning, in the middle or at the end.
    """
    if data[start : start + 4] != b"fLaC":
        return None
    first = _read_info(data, start, len(data))
    if first is None:
        return [Part((memoryview(data)[start:],))]  # no STREAMINFO: the decoder has words for it
    more = [found.start() for found in _STREAM.finditer(data, first.frames_at)]
    ends = [*more, len(data)]
    return [_to_part(data, begin, end) for begin, end in zip((start, *more), ends)]


def _read_info(data: Data, start: int, end: int) -> _Info | None:
    position, at, is_last = start + 4, None, False
    while not is_last and position + 4 <= end:
        head = data[position : position + 4]
        is_last, size = head[0] >= 0x80, int.from_bytes(head[1:4], "big")
        if head[0] & 0x7F == _STREAMINFO and size == 34:
            at = position + 4
        position += 4 + size
    if at is None or not is_last:
        return None
    total = int.from_bytes(data[at + 13 : at + 18], "big") & (1 << 36) - 1
    md5 = bytes(data[at + 18 : at + 34])
    return _Info(at, position, total, md5 if any(md5) else None)


def _to_part(data: Data, start: int, end: int) -> Part:
    info, view = _read_info(data, start, end), memoryview(data)
    if info is None:
        return Part((view[start:end],))
    counted = _count_samples(data, info.frames_at, end)
    if info.total and 0 < counted < info.total:
        raise DamageError(
            "truncated", f"announces {info.total} samples, but its frames hold {counted}; fetch it again."
        )
    if counted in (0, info.total):  # without a frame the decoder has words for it
        return Part((view[start:end],), counted or None, md5=info.md5)
    word = int.from_bytes(data[info.at + 10 : info.at + 18], "big")
    patched = struct.pack(">Q", word >> 36 << 36 | counted)
    pieces = (view[start : info.at + 10], patched, view[info.at + 18 : end])
    return Part(pieces, counted, md5=info.md5)


def _count_samples(data: Data, start: int, end: int) -> int:
    """Samples a channel of an unbroken row of frames from the first on."""
    expected, counted, lost = 0, 0, None
    for frame in _frames(data, start, end):
        if frame.number == expected:
            counted += frame.samples
            expected += frame.samples if frame.is_variable else 1
            lost = None
        elif frame.number > expected:
            lost = lost or frame  # chance, if the row goes on behind it
    if lost is not None:
        raise DamageError(
            "truncated", f"lacks frames: behind {counted} samples comes frame {lost.number}; fetch it again."
        )
    return counted


def _frames(data: Data, start: int, end: int) -> Iterator[_Frame]:
    """Every header that its checksum bears out, all of one kind."""
    kind = None
    for found in _SYNC.finditer(data, start, end):
        head = bytes(data[found.start() : min(found.start() + 16, end)])
        if len(head) < 6 or head[3] & 1 or (kind is not None and head[1] != kind):
            continue
        if frame := _read_frame(head):
            kind = head[1]
            yield frame


def _read_frame(head: bytes) -> _Frame | None:
    size_code, rate_code = head[2] >> 4, head[2] & 0x0F
    if size_code == 0 or rate_code == 15 or head[3] >> 4 > 10:
        return None
    length = 0 if head[4] < 0x80 else 8 - (head[4] ^ 0xFF).bit_length() - 1  # bytes that follow, as in UTF-8
    number = head[4] & (0x7F >> length if length == 0 else 0x3F >> length)
    for byte in head[5 : 5 + length]:
        number = number << 6 | byte & 0x3F
    at = 5 + length
    if size_code in (6, 7):
        samples, at = int.from_bytes(head[at : at + size_code - 5], "big") + 1, at + size_code - 5
    else:
        samples = 192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8
    at += (0, 1, 2, 2)[max(rate_code - 11, 0)]
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    return _Frame(bool(head[1] & 1), number, samples)


def _make_table() -> bytes:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte << 1 ^ (_POLYNOMIAL | 0x100 if byte & 0x80 else 0)
        table.append(byte)
    return bytes(table)


_TABLE = _make_table()


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc = _TABLE[crc ^ byte]
    return crc


FLAC = Container(walk_flac, ("FLAC",))
