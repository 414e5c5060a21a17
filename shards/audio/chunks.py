"""Files of uncompressed or lightly packed samples, by their chunks: WAV, AIFF, AU, W64, CAF, NIST. Decodes nothing.

Such a file says how many bytes of sound it has, and libsndfile takes the smaller of that and what is there, in silence.
Here a length must lead to a chunk, to another file or to the end. A length that a streaming writer left open reaches to
the end. Sources: Microsoft's and IBM's RIFF, EBU Tech 3306 (RF64), Apple's AIFF-C and CAF, Sony's W64, NIST's SPHERE.
"""

import re
import struct
from collections.abc import Callable, Iterator

from shards.audio.mpeg import tag_size, walk_mpeg
from shards.audio.parts import Container, DamageError, Data, Part

_WAVE = re.compile(rb"(?:RIFF|RIFX|RF64|BW64)....WAVE(?:fmt |JUNK|ds64|bext|LIST|fact)", re.DOTALL)
_EXTENSIBLE, _MPEG = 0xFFFE, 0x55  # format codes of WAV
_BLOCKS_OF_ONE = (1, 3, 6, 7)  # PCM, float, A-law, mu-law: a block is one sample of each channel
_AIFF_PLAIN = (b"NONE", b"sowt", b"twos", b"fl32", b"FL32", b"fl64", b"FL64", b"raw ", b"ulaw", b"ULAW", b"alaw")
_CAF_PLAIN = (b"lpcm", b"ulaw", b"alaw")
_OPEN_NEAR = 0x10000  # bytes below 2 and 4 GiB: streaming writers put such lengths (sox 0x7FFFF000, ffmpeg 0xFFFFFFFF)
_MAX_ZEROS = 4096  # bytes of padding behind the last chunk
_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}  # of a sample, by encoding
_W64_GUID_ENDS = (  # of `riff`, and of the chunks
    b"\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00",
    b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a",
)


def walk_chunks(data: Data, start: int = 0) -> list[Part] | None:
    """The files that lie behind each other from `start` on; None where there is none of these kinds.

    Raises:
        DamageError: a length leads beyond the end, or to something that is no chunk.
    """
    parts, position = [], start
    while position < len(data):
        reader = _find_reader(data, position)
        if reader is None and position == start:
            return None
        if reader is None:
            _check_rest(data, position)
            break
        found, position = reader(data, position)
        parts += found
    return parts


def _find_reader(data: Data, position: int) -> Callable | None:
    head = data[position : position + 16]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _read_wave
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _read_aiff
    if head[:7] == b"NIST_1A":
        return _read_nist
    if head[4:16] == _W64_GUID_ENDS[0]:
        return _read_w64
    return {b".snd": _read_au, b"dns.": _read_au, b"caff": _read_caf}.get(head[:4])


def _check_rest(data: Data, position: int) -> None:
    """What follows the last chunk must be nothing, padding or a tag."""
    while tag := tag_size(data, position):
        position += tag
    rest = data[position:]
    if len(rest) > _MAX_ZEROS or rest.strip(b"\0"):
        raise DamageError(
            "header_mismatch",
            f"has {len(rest)} bytes at {position} that its lengths leave out; fetch it again, or mend its header.",
        )


def _truncated(missing: int) -> DamageError:
    return DamageError("truncated", f"ends {missing} bytes early; fetch the file again.", {"missing": missing})


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(0x20 <= byte < 0x7F for byte in name)


def _chunks(data: Data, position: int, order: str, size_of_data: int | None = None) -> Iterator[tuple]:
    """Name, start and end of each chunk of a RIFF or IFF file, and whether its length was left open."""
    while position + 8 <= len(data) and _is_name(name := data[position : position + 4]):
        if _find_reader(data, position) is not None or tag_size(data, position):
            return
        size, body, is_open = struct.unpack_from(order + "I", data, position + 4)[0], position + 8, False
        if name == b"data":
            if size == 0xFFFFFFFF and size_of_data:
                size = size_of_data
            is_open = _is_open(data, body, size)
            if is_open:
                size = _open_end(data, body) - body
        if body + size > len(data):
            raise _truncated(body + size - len(data))
        yield name, body, body + size, is_open
        position = body + size
        # some writers forget the byte that makes a length even
        if size % 2 and not (_is_name(data[position : position + 4]) and data[position : position + 1] != b"\0"):
            position += position < len(data)


def _is_open(data: Data, body: int, size: int) -> bool:
    if size == 0:  # nothing, if a chunk or the end follows
        rest = data[body : body + 8]
        end = body + 8 + int.from_bytes(rest[4:], "little")
        return bool(rest) and not (_is_name(rest[:4]) and end <= len(data))
    return any(limit - _OPEN_NEAR <= size <= limit for limit in (1 << 31, 1 << 32)) and body + size > len(data)


def _open_end(data: Data, body: int) -> int:
    """The next file, the tags behind the sound, or the end."""
    found = _find_wave(data, body, len(data))
    end = len(data) if found is None else found
    last = data.rfind(b"LIST", body, end)
    if last >= 0 and last + 8 + int.from_bytes(data[last + 4 : last + 8], "little") == end:
        return last
    return end


def _find_wave(data: Data, start: int, end: int) -> int | None:
    """Where another WAV begins. A search for four bytes is eight times as fast as one for the pattern."""
    place = data.find(b"WAVE", start + 8, end)
    while place >= 0 and not _WAVE.match(data, place - 8):
        place = data.find(b"WAVE", place + 1, end)
    return None if place < 0 else place - 8


def _read_wave(data: Data, start: int) -> tuple[list[Part], int]:
    mark, order = data[start : start + 4], ">" if data[start : start + 4] == b"RIFX" else "<"
    outer = struct.unpack_from(order + "I", data, start + 4)[0]
    form, spans, end, wide, is_odd = None, [], start + 12, None, mark not in (b"RIFF", b"RIFX")
    if data[start + 12 : start + 16] == b"ds64":
        wide = struct.unpack_from("<Q", data, start + 28)[0]
    for name, begin, end, is_open in _chunks(data, start + 12, order, wide):
        is_odd |= is_open
        if name == b"fmt " and form is None:
            form = bytes(data[begin:end])
        elif name == b"data":
            spans.append((begin, end))
    end = min(end + (end - start) % 2, len(data)) if _find_reader(data, end) is None else end
    view = memoryview(data)
    if form is None or len(form) < 16 or not spans:
        return [Part((view[start:],))], len(data)  # the decoder has words for it
    code, _, _, _, block = struct.unpack_from(order + "HHIIH", form)
    code = struct.unpack_from(order + "H", form, 24)[0] if code == _EXTENSIBLE and len(form) >= 26 else code
    spans = [span for span in spans if span[1] > span[0]] or spans[:1]
    for begin, stop in spans:
        if (found := _find_wave(data, begin, stop)) is not None:
            raise DamageError("header_mismatch", f"holds another file at byte {found}; split it there.")
    if code == _MPEG:
        found = [walk_mpeg(bytes(data[begin:stop])) for begin, stop in spans]
        return [part for parts in found for part in parts or [Part((b"",))]], end
    is_plain = not is_odd and len(spans) == 1 and outer == end - start - 8
    parts = []
    for begin, stop in spans:
        frames = (stop - begin) // block if code in _BLOCKS_OF_ONE and block else None
        whole = (view[start:end],) if is_plain else (_wave_header(form, stop - begin, order), view[begin:stop])
        parts.append(Part(whole, frames))
    return parts, end


def _wave_header(form: bytes, size: int, order: str) -> bytes:
    mark = b"RIFX" if order == ">" else b"RIFF"
    outer = struct.pack(order + "I", min(20 + len(form) + size, 0xFFFFFFFE))
    inner = struct.pack(order + "I", len(form)) + form + b"data" + struct.pack(order + "I", size)
    return mark + outer + b"WAVEfmt " + inner


def _read_aiff(data: Data, start: int) -> tuple[list[Part], int]:
    common, sound, end = None, None, start + 12
    for name, begin, end, _ in _chunks(data, start + 12, ">"):
        if name == b"COMM":
            common = bytes(data[begin:end])
        elif name == b"SSND":
            if sound is not None:
                raise DamageError("header_mismatch", f"has a second SSND chunk at byte {begin}; take one out.")
            sound = end - begin - 8 - int.from_bytes(data[begin : begin + 4], "big")
    end = min(end + (end - start) % 2, len(data)) if _find_reader(data, end) is None else end
    frames = None
    if common and sound is not None:
        channels, frames, bits = struct.unpack_from(">HIH", common)
        is_plain = data[start + 8 : start + 12] == b"AIFF" or common[18:22] in _AIFF_PLAIN
        held = sound // max(channels * -(-bits // 8), 1)
        if common[18:22] in (b"ulaw", b"ULAW", b"alaw"):
            held = sound // max(channels, 1)
        if is_plain and frames != held:
            raise DamageError(
                "header_mismatch", f"announces {frames} samples, but its sound chunk has {held}; fetch it again."
            )
    return [Part((memoryview(data)[start:end],), frames)], end


def _read_au(data: Data, start: int) -> tuple[list[Part], int]:
    order = ">" if data[start : start + 4] == b".snd" else "<"
    if start + 24 > len(data):
        raise _truncated(start + 24 - len(data))
    offset, size, encoding, _, channels = struct.unpack_from(order + "5I", data, start + 4)
    is_open = size == 0xFFFFFFFF
    end = len(data) if is_open else start + offset + size
    if end > len(data):
        raise _truncated(end - len(data))
    width = _AU_BYTES.get(encoding, 0) * channels
    frames = max(end - start - offset, 0) // width if width else None
    return [Part((memoryview(data)[start:end],), frames)], end


def _read_nist(data: Data, start: int) -> tuple[list[Part], int]:
    text = bytes(data[start : start + 1024])
    fields = dict(re.findall(rb"^(\w+) -\w+ (\S+)", text, re.MULTILINE))
    try:
        header = int(text[8:16])
        count, channels, width = (int(fields[name]) for name in (b"sample_count", b"channel_count", b"sample_n_bytes"))
    except (KeyError, ValueError) as error:
        raise DamageError("decode", f"has a SPHERE header without its counts ({error}); fetch it again.") from error
    if fields.get(b"sample_coding", b"pcm") not in (b"pcm", b"ulaw", b"mu-law", b"alaw"):
        return [Part((memoryview(data)[start:],))], len(data)
    end = start + header + count * channels * width
    if end > len(data):
        raise _truncated(end - len(data))
    return [Part((memoryview(data)[start:end],), count)], end


def _read_w64(data: Data, start: int) -> tuple[list[Part], int]:
    position, block, frames = start + 40, 0, None
    while position + 24 <= len(data) and data[position + 4 : position + 16] == _W64_GUID_ENDS[1]:
        size = struct.unpack_from("<Q", data, position + 16)[0]
        if size < 24 or position + size > len(data):
            raise _truncated(max(position + size - len(data), 24 - size))
        name = data[position : position + 4]
        if name == b"fmt ":
            code, _, _, _, block = struct.unpack_from("<HHIIH", data, position + 24)
            block = block if code in (*_BLOCKS_OF_ONE, _EXTENSIBLE) else 0
        elif name == b"data" and block:
            frames = (size - 24) // block
        position += -(-size // 8) * 8
    end = min(position, len(data))
    return [Part((memoryview(data)[start:end],), frames)], end


def _read_caf(data: Data, start: int) -> tuple[list[Part], int]:
    position, block, frames = start + 8, 0, None
    while position + 12 <= len(data) and _is_name(name := data[position : position + 4]) and name != b"caff":
        size = struct.unpack_from(">q", data, position + 4)[0]
        body, is_open = position + 12, size < 0 and name == b"data"
        position = len(data) if is_open else body + size
        if name == b"desc":  # bytes of a packet, which is a sample of each channel where it is one of these
            block = struct.unpack_from(">I", data, body + 16)[0] if data[body + 8 : body + 12] in _CAF_PLAIN else 0
        elif name == b"data" and block:
            frames = (position - body - 4) // block
        if position > len(data) or size < -1:
            raise _truncated(max(position - len(data), 1))
    return [Part((memoryview(data)[start:position],), frames)], position


CHUNKS = Container(walk_chunks, ("WAV", "WAVEX", "RF64", "AIFF", "AU", "W64", "CAF", "NIST"))
