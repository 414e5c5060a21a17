"""The pages and packets of an Ogg file: Vorbis, Opus and what else lies in it. Knows bytes, and decodes nothing.

libogg passes over a page whose checksum is wrong, libsndfile over every stream but the first. A page's granule
position says how many samples end on it, and packets say how long they are, so each is held against the other. RFC
3533; Vorbis I specification, sections 1.3 and 4; RFC 7845 and RFC 6716, section 3.1.
"""

import struct
import zlib
from dataclasses import dataclass, field
from itertools import pairwise

from shards.audio.parts import Container, DamageError, Data, Part

_CONTINUED, _FIRST, _LAST = 1, 2, 4  # flags of a page
_NO_GRANULE = (1 << 64) - 1
_OPUS_RATE = 48_000  # Hz, of its granule positions
_MAX_TRIM_SECONDS = 0.12  # that an encoder adds to fill its last packet: Opus's longest
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_AUDIO = {b"\x01vorbis": "vorbis", b"OpusHead": "opus", b"\x7fFLAC": "flac", b"Speex   ": "speex"}


@dataclass(frozen=True)
class _Page:
    start: int
    end: int
    flags: int
    granule: int
    serial: int
    sequence: int
    lacing: bytes
    body: int  # where its packets begin


@dataclass
class _Stream:
    """The pages of one logical stream."""

    link: int  # streams that begin together belong together
    codec: str | None  # None: no sound
    pages: list[_Page] = field(default_factory=list)


def walk_ogg(data: Data, start: int = 0) -> list[Part] | None:
    """The sounding streams of a file, in order; None where there is none.

    Raises:
        DamageError: a page is cut, damaged or missing, two streams sound at once, or positions are wrong.
    """
    if data[start : start + 4] != b"OggS":
        return None
    streams = [stream for stream in _streams(data, start) if stream.codec is not None]
    for before, after in pairwise(streams):
        if before.link == after.link:
            raise DamageError("decode", "holds two streams that sound at once; take one of them out.")
    return [_to_part(data, stream) for stream in streams] or None


def _read_pages(data: Data, start: int):
    position = start
    while position < len(data):
        head = data[position : position + 27]
        if head[:4] != b"OggS"[: len(head)]:
            raise DamageError("decode", f"holds bytes at {position} that are no page; fetch it again.")
        lacing = bytes(data[position + 27 : position + 27 + head[26]]) if len(head) == 27 else b""
        body = position + 27 + len(lacing)
        end = body + sum(lacing)
        if len(head) < 27 or len(lacing) < head[26] or end > len(data):
            raise DamageError("truncated", f"ends {max(end - len(data), 1)} bytes early; fetch it again.")
        _, flags, granule, serial, sequence, crc = struct.unpack_from("<BBQIII", head, 4)
        if _checksum(data[position:end]) != crc:
            raise DamageError("decode", f"has a damaged page at byte {position}; fetch it again.")
        yield _Page(position, end, flags, granule, serial, sequence, lacing, body)
        position = end


def _checksum(page: bytes) -> int:
    """CRC-32 of the polynomial 0x04C11DB7 from 0, unreflected: zlib's, of reversed bits."""
    plain = (page[:22] + b"\0\0\0\0" + page[26:]).translate(_REVERSED)
    crc = zlib.crc32(plain, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(_REVERSED), "big")


def _streams(data: Data, start: int) -> list[_Stream]:
    streams, open_streams, link, was_first = [], {}, -1, False
    for page in _read_pages(data, start):
        if page.flags & _FIRST:
            link += not was_first
            head = bytes(data[page.body : page.body + 8])
            codec = next((name for mark, name in _AUDIO.items() if head.startswith(mark)), None)
            open_streams[page.serial] = _Stream(link, codec)
            streams.append(open_streams[page.serial])
        stream = open_streams.get(page.serial)
        if stream is None:
            raise DamageError("truncated", "has no first page; fetch it again.")
        if stream.pages and page.sequence != stream.pages[-1].sequence + 1:
            raise DamageError("truncated", f"lacks pages before byte {page.start}; fetch it again.")
        stream.pages.append(page)
        was_first = bool(page.flags & _FIRST)
    return streams


def _to_part(data: Data, stream: _Stream) -> Part:
    view, stretches = memoryview(data), []
    for page in stream.pages:
        if stretches and stretches[-1][1] == page.start:
            stretches[-1][1] = page.end
        else:
            stretches.append([page.start, page.end])
    if not stream.pages[-1].flags & _LAST:
        raise DamageError("truncated", "lacks its last page; fetch it again.")
    pieces = tuple(view[start:end] for start, end in stretches)
    if stream.codec not in ("vorbis", "opus"):
        last = stream.pages[-1].granule
        return Part(pieces, last if last != _NO_GRANULE else None, slack_frames=0)
    rate, skipped, durations = _read_codec(data, stream)
    samples = _check_positions(stream.pages, durations, rate)
    return Part(pieces, max(samples - skipped, 0), rate, slack_frames=rate // 1000)


def _check_positions(pages: list[_Page], durations: list[int], rate: int) -> int:
    """Samples up to the last page's position, once every page's position is where its packets end."""
    packets, total, start, checked = iter(durations), 0, None, 0
    for number, page in enumerate(pages):
        ended = sum(size < 255 for size in page.lacing)
        total += sum(duration for _, duration in zip(range(ended), packets))
        if page.granule == _NO_GRANULE or (total == 0 and number < len(pages) - 1):
            continue
        is_last = page is pages[-1]
        if start is None:
            start = 0 if is_last or page.granule <= total else page.granule - total
        excess = total + start - page.granule
        if not -1 <= excess <= (_MAX_TRIM_SECONDS * rate if is_last or not checked else 1):
            raise DamageError(
                "header_mismatch",
                f"announces {page.granule - start} samples at byte {page.start}, but its packets hold {total}; fetch "
                "it again.",
            )
        checked = page.granule - start
    return checked


def _read_codec(data: Data, stream: _Stream) -> tuple[int, int, list[int]]:
    """Rate, samples that are skipped at the beginning, and samples of each packet (0: a header)."""
    packets = _packets(data, stream.pages)
    if stream.codec == "opus":
        skipped = int.from_bytes(packets[0][1][10:12], "little")
        return _OPUS_RATE, skipped, [0, 0, *(_opus_samples(head) for _, head, _ in packets[2:])]
    sizes, rate = packets[0][1][28], int.from_bytes(packets[0][1][12:16], "little")
    modes = _vorbis_modes(packets[2][2]())
    blocks = (1 << (sizes & 15), 1 << (sizes >> 4))
    mask = (1 << (len(modes) - 1).bit_length()) - 1
    durations, before = [0, 0, 0], 0
    for size, head, _ in packets[3:]:
        mode = head[0] >> 1 & mask if size and not head[0] & 1 else len(modes)
        block = blocks[modes[mode]] if mode < len(modes) else 0
        durations.append((before + block) // 4 if before and block else 0)
        before = block or before
    return rate, 0, durations


def _packets(data: Data, pages: list[_Page]) -> list[tuple]:
    """Of each packet its size, its first 32 bytes, and a function that gives it whole."""
    packets, spans = [], []
    for page in pages:
        position = page.body
        spans.append([position, position])
        for size in page.lacing:
            spans[-1][1] += size
            if size < 255:
                (start, end), own = spans[0], spans
                head = bytes(data[start : min(end, start + 32)])
                packets.append((sum(b - a for a, b in own), head, lambda own=own: _join(data, own)))
                position = own[-1][1]
                spans = [[position, position]]
        if spans[-1][0] == spans[-1][1]:
            spans.pop()
    return packets


def _join(data: Data, spans: list[list[int]]) -> bytes:
    return b"".join(bytes(data[start:end]) for start, end in spans)


def _opus_samples(head: bytes) -> int:
    """Samples of a packet at 48 kHz, by its first two bytes."""
    config, code = head[0] >> 3, head[0] & 3
    if config < 12:
        frame = (480, 960, 1920, 2880)[config & 3]
    elif config < 16:
        frame = (480, 960)[config & 1]
    else:
        frame = 120 << (config & 3)
    return frame * ((1, 2, 2)[code] if code < 3 else head[1] & 63)


def _vorbis_modes(setup: bytes) -> list[int]:
    """Whether each mode's block is long. The list ends the setup header, and is read from there, a mode of 41 bits
    at a time: what comes before it takes a decoder to read."""
    bits = int.from_bytes(setup[-512:], "little")  # bits are packed from the lowest on
    end, flags, found = bits.bit_length() - 1, [], []  # the highest is the framing flag
    while end >= 47:
        if (bits >> end - 8) & 0xFF > 63 or (bits >> end - 40) & 0xFFFFFFFF:  # the mapping; two fields that are 0
            break
        end -= 41
        flags.append(bits >> end & 1)
        if (bits >> end - 6 & 63) + 1 == len(flags):
            found = flags[::-1]
    if not found:
        raise DamageError("decode", "has a setup header without modes; fetch it again.")
    return found


OGG = Container(walk_ogg, ("OGG",))
