"""The frames of an MPEG audio file: MP3, and layers I and II. Knows bytes, and decodes nothing.

A file says how long it is only in an optional first frame (Xing, Info or VBRI), which says anything once files are cut
or joined; without one a decoder guesses from the first frame's bit rate. So every frame is counted, and a decoder gets
an index frame that tells the count. Headers: ISO 11172-3, section 2.4.1.3, and ISO 13818-3; index frames: LAME's
`VbrTag.c`; tags: id3.org, the Hydrogenaudio wiki's pages on APEv2 and Lyrics3.
"""

import re
import struct
from dataclasses import dataclass, field
from functools import cache

from shards.audio.parts import Container, DamageError, Data, Part

_V1 = 3  # MPEG 1 in the two version bits; 2 is MPEG 2, and 0 MPEG 2.5
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_KILOBITS = {  # by MPEG 1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MAX_FRAME = 8192  # bytes; of free format too
_DECODER_DELAY = 529  # samples that every layer III decoder is late by
_INDEX = re.compile(rb"Xing|Info|VBRI")
_FRAMES_FLAG, _BYTES_FLAG, _TABLE_FLAG, _QUALITY_FLAG = 1, 2, 4, 8  # of a Xing header
_FIELDS = {_FRAMES_FLAG: 4, _BYTES_FLAG: 4, _TABLE_FLAG: 100, _QUALITY_FLAG: 4}  # bytes of each
_LAME_TAG = 24  # bytes of it up to the samples to leave out


@dataclass(frozen=True)
class _Header:
    """What the first two bytes after the sync say."""

    family: tuple[int, int, int]  # version, layer, rate: one stream has one
    samples: int
    size: int  # bytes of the frame; 0: free format
    pad: int  # bytes that free format adds


@dataclass
class _Run:
    """Frames of one stream."""

    family: tuple  # with whether it is mono
    samples: int  # a frame
    index: "_Index | None" = None
    frames: int = 0
    stretches: list[tuple[int, int]] = field(default_factory=list)  # from, to
    stray: int = 0  # bytes among the frames that are none


@dataclass(frozen=True)
class _Index:
    """A Xing, Info or VBRI frame."""

    start: int
    end: int
    frames: int | None  # that it announces
    frames_at: int | None  # where that stands, from the frame's start
    trimmed: int  # samples that its LAME tag says to leave out


def walk_mpeg(data: Data, start: int = 0) -> list[Part] | None:
    """The streams of a file whose first frame is at `start`; None where there is none.

    Raises:
        DamageError: it ends inside a frame, has fewer frames than it announces, or bytes among them that are none.
    """
    if _frame_size(data, start, _header_at(data, start)) is None:
        return None
    runs = _Walk(data, start, _audio_end(data)).runs()
    return [_to_part(data, run) for run in runs]


@cache
def _parse(second: int, third: int) -> _Header | None:
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    kilobits, rate, pad = third >> 4, third >> 2 & 3, third >> 1 & 1
    if second & 0xE0 != 0xE0 or version == 1 or layer == 4 or kilobits == 15 or rate == 3:
        return None
    hertz, is_first = _RATES[version][rate], version == _V1
    samples = {1: 384, 2: 1152, 3: 1152 if is_first else 576}[layer]
    slot = 4 if layer == 1 else 1
    bits = _KILOBITS[is_first, layer][kilobits - 1] * 1000 if kilobits else 0
    size = (samples // 8 // slot * bits // hertz + pad) * slot if bits else 0
    return _Header((version, layer, hertz), samples, size, pad * slot)


def _header_at(data: Data, position: int) -> _Header | None:
    head = data[position : position + 4]
    return _parse(head[1], head[2]) if len(head) == 4 and head[0] == 0xFF else None


def _is_mono(data: Data, position: int) -> bool:
    return data[position + 3] >> 6 == 3


def _frame_size(data: Data, position: int, header: _Header | None) -> int | None:
    """Bytes of the frame; None: there is none. A free-format frame ends where the next begins."""
    if header is None or header.size:
        return header and header.size
    head, mask = data[position : position + 3], 0xFD  # the padding bit may differ
    place = position + 24
    while (place := data.find(head[:2], place, position + _MAX_FRAME)) >= 0:
        if data[place + 2 : place + 3] and data[place + 2] & mask == head[2] & mask:
            return place - position
        place += 1
    return None


class _Walk:
    """From frame to frame, over tags, to the end."""

    def __init__(self, data: Data, start: int, end: int):
        self.data, self.position, self.end = data, start, end
        self.free_sizes: dict[tuple, int] = {}  # without padding, by family
        self.index_starts = set()
        for found in _INDEX.finditer(data, start, end):
            # behind header, checksum and side information, or (VBRI) at 32 bytes always
            self.index_starts |= {found.start() - 4 - skip for skip in (32, 17, 9, 34, 19, 11)}

    def runs(self) -> list[_Run]:
        """Every stream; a new one begins at each index frame and at each change of rate, layer or channels."""
        runs: list[_Run] = []
        while self.position < self.end:
            if tag := tag_size(self.data, self.position):
                self.position += tag
                continue
            family = self._family_at(self.position)
            index = family and self._index_at(self.position)
            is_new = not runs or index is not None or family != runs[-1].family
            if family is None or (runs and is_new and index is None and not self._is_followed(self.position, family)):
                self._pass_over(runs[-1])
                continue
            if is_new:
                runs.append(_Run(family, _header_at(self.data, self.position).samples, index))
            if index is not None:
                self.position = index.end
            else:
                self._take(runs[-1])
        return runs

    def _take(self, run: _Run) -> None:
        """Frames that follow each other without a gap: the loop that a file's length is counted in."""
        data, position, last, frames, index_starts = self.data, self.position, self.end - 4, 0, self.index_starts
        start, family, mono = position, run.family[:3], run.family[3]
        while position <= last and data[position] == 0xFF:
            header = _parse(data[position + 1], data[position + 2])
            if header is None or header.family != family or (data[position + 3] >> 6 == 3) != mono:
                break
            if position in index_starts and frames and self._index_at(position) is not None:
                break
            size = header.size or self._free_size(position, header)
            position += size
            frames += 1
        if position > self.end:
            raise DamageError(
                "truncated", f"ends {position - self.end} bytes before the end of its last frame; fetch it again."
            )
        run.stretches.append((start, position))
        run.frames += frames
        self.position = position

    def _free_size(self, position: int, header: _Header) -> int:
        if header.family not in self.free_sizes:
            self.free_sizes[header.family] = _frame_size(self.data, position, header) - header.pad
        return self.free_sizes[header.family] + header.pad

    def _family_at(self, position: int) -> tuple | None:
        header = _header_at(self.data, position)
        if header is None or (not header.size and header.family not in self.free_sizes
                              and _frame_size(self.data, position, header) is None):  # fmt: skip
            return None
        return (*header.family, _is_mono(self.data, position))

    def _is_followed(self, position: int, family: tuple) -> bool:
        """Whether the frame is no chance: another of its kind, a tag or the end comes behind it."""
        header = _header_at(self.data, position)
        after = position + (header.size or self._free_size(position, header))
        is_end = after == self.end or bool(tag_size(self.data, after))
        return is_end or (after < self.end and self._family_at(after) == family)

    def _pass_over(self, run: _Run) -> None:
        """Go to the next frame that is one; what lies before it is counted, unless it is empty."""
        start = self.position
        place = start
        while (place := self.data.find(b"\xff", place + 1, self.end)) >= 0:
            if self._family_at(place) == run.family and self._is_followed(place, run.family):
                break
        self.position = self.end if place < 0 else place
        if self.data[start : self.position].strip(b"\0"):
            run.stray += self.position - start

    def _index_at(self, position: int) -> _Index | None:
        """The index frame that begins here, if one does."""
        data, header = self.data, _header_at(self.data, position)
        if position not in self.index_starts or header is None or header.family[1] != 3 or not header.size:
            return None
        end = position + header.size
        frame = bytes(data[position : min(end, self.end)])
        if frame[36:40] == b"VBRI":
            return _Index(position, end, int.from_bytes(frame[50:54], "big"), None, 0)
        wide = 32 if header.family[0] == _V1 else 17
        narrow = 17 if header.family[0] == _V1 else 9
        skip = narrow if _is_mono(data, position) else wide
        for at in (4 + skip, 6 + skip):
            if frame[at : at + 4] in (b"Xing", b"Info"):
                return _read_xing(frame, position, end, at)
        return None


def _read_xing(frame: bytes, start: int, end: int, at: int) -> _Index:
    flags = int.from_bytes(frame[at + 4 : at + 8], "big")
    has_frames = flags & _FRAMES_FLAG
    frames = int.from_bytes(frame[at + 8 : at + 12], "big") if has_frames else None
    tag = at + 8 + _fields_size(flags)
    trimmed = 0
    if any(frame[tag : tag + 4]) and len(frame) >= tag + _LAME_TAG:
        both = int.from_bytes(frame[tag + 21 : tag + 24], "big")
        trimmed = (both >> 12) + max(both & 0xFFF, _DECODER_DELAY)
    return _Index(start, end, frames, at + 8 if has_frames else None, trimmed)


def _to_part(data: Data, run: _Run) -> Part:
    index, announced = run.index, run.index and run.index.frames
    # some writers count the index frame, others do not: one more is none that is missing
    if announced is not None and announced > run.frames + 1:
        raise DamageError(
            "truncated", f"announces {announced} frames, but has {run.frames}; fetch it again."
        )  # fmt: skip
    if run.stray and not (announced and abs(announced - run.frames) <= 1):
        raise DamageError(
            "decode", f"holds {run.stray} bytes that are no frame among {run.frames} frames; fetch it again."
        )
    if run.frames == 0:
        raise DamageError("too_short", "has an index but no frame of sound; fetch it again.")
    view = memoryview(data)
    first = b""
    trimmed = index.trimmed if index else 0
    if index is not None and index.frames_at is not None:
        first = bytearray(view[index.start : index.end])
        first[index.frames_at : index.frames_at + 4] = struct.pack(">I", run.frames)
    elif run.family[1] == 3 and not _is_even(data, run):  # libmpg123 guesses the length of a constant rate rightly
        first, trimmed = _make_index(view[run.stretches[0][0] :][:4], run.family, run.frames), _DECODER_DELAY
    pieces = (bytes(first), *(view[start:end] for start, end in run.stretches))
    # a decoder skips or doubles the frame at a cut, and a tag may ask to trim more than there is
    return Part(pieces, max(run.frames * run.samples - trimmed, 0), run.family[2], run.samples + _DECODER_DELAY)


def _is_even(data: Data, run: _Run) -> bool:
    """Whether all frames have the first one's size, but for padding."""
    size = _header_at(data, run.stretches[0][0]).size
    return abs(sum(end - start for start, end in run.stretches) - run.frames * size) <= run.frames


def _make_index(head: memoryview, family: tuple, frames: int) -> bytes:
    """An Info frame that tells the number of frames and no more."""
    version, _, _, is_mono = family
    second = head[1] | 1  # no checksum
    third = next(t for k in range(1, 15) if _parse(second, t := k << 4 | head[2] & 0x0C).size >= 64)
    skip = (17 if is_mono else 32) if version == _V1 else (9 if is_mono else 17)
    frame = bytearray(_parse(second, third).size)
    frame[:4] = bytes((0xFF, second, third, head[3]))
    frame[4 + skip : 16 + skip] = b"Info" + struct.pack(">II", _FRAMES_FLAG, frames)
    return bytes(frame)


def _fields_size(flags: int) -> int:
    return sum(size for flag, size in _FIELDS.items() if flags & flag)


def tag_size(data: Data, position: int) -> int:
    """Bytes of the ID3v2, ID3v1 or APEv2 tag that begins here; 0: none does."""
    head = data[position : position + 32]
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 0x80:
        footer = 10 if head[5] & 0x10 else 0
        return 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + footer
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return 32 + (int.from_bytes(head[12:16], "little") if head[23] & 0x20 else 0)  # 0x20: a header, not a footer
    return 128 if head[:3] == b"TAG" and position + 128 <= len(data) else 0


def _audio_end(data: Data) -> int:
    """Where the tags begin that are found from the end: ID3v1, APE without its header, Lyrics3."""
    end = len(data)
    while True:
        if data[max(end - 128, 0) : end][:3] == b"TAG" and end >= 128:
            end -= 128
        elif (foot := data[max(end - 32, 0) : end])[:8] == b"APETAGEX":
            end -= int.from_bytes(foot[12:16], "little") + (32 if foot[23] & 0x80 else 0)
        elif data[max(end - 9, 0) : end] == b"LYRICS200" and data[end - 15 : end - 9].isdigit():
            end -= 15 + int(data[end - 15 : end - 9])
        else:
            return max(end, 0)


MPEG = Container(walk_mpeg, ("MP3",))
