"""Integers in as few bits as they need: planes of fixed width, and ascending sets of ids by Elias-Fano.

Knows nothing of probabilities. Everything works on flat arrays of many positions at once; S positions, of which
position s owns `counts_S[s]` consecutive entries.
"""

from functools import cache

import numpy as np


class Reader:
    """A cursor over a payload that refuses to read past its end."""

    def __init__(self, data: bytes):
        self.data = data
        self.offset = 0

    def take(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` numbers of a dtype, without a copy."""
        size = np.dtype(dtype).itemsize * count
        left = len(self.data) - self.offset
        if size > left:
            raise ValueError(
                f"payload is {len(self.data)} bytes, but its header promises {size - left} more; cache again."
            )
        values = np.frombuffer(self.data, dtype, count, self.offset)
        self.offset += size
        return values

    def finish(self):
        """Refuse what follows the last field."""
        if self.offset != len(self.data):
            raise ValueError(
                f"payload is {len(self.data)} bytes, but its header describes {self.offset}; cache this sample again."
            )


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Write unsigned integers below `2**width`: whole bytes as planes, the rest eight values to `width % 8` bytes."""
    octets = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)
    planes = [octets[:, i].tobytes() for i in range(width // 8)]
    rest = width % 8
    if rest:
        words = np.zeros(-(-len(octets) // 8), "<u8")
        words.view(np.uint8)[: len(octets)] = octets[:, width // 8]
        planes.append(_squeeze(words, rest).view(np.uint8).reshape(-1, 8)[:, :rest].tobytes())
    return b"".join(planes)


def unpack_bits(reader: Reader, count: int, width: int) -> np.ndarray:
    """Read back `count` integers of `pack_bits` as int32."""
    planes = [reader.take("u1", count) for _ in range(width // 8)]
    rest = width % 8
    if rest:
        num_words = -(-count // 8)
        octets = np.zeros((num_words, 8), np.uint8)
        octets[:, :rest] = reader.take("u1", num_words * rest).reshape(-1, rest)
        planes.append(_stretch(octets.view("<u8").ravel(), rest).view(np.uint8)[:count])
    values = planes.pop().astype(np.int32) if planes else np.zeros(count, np.int32)
    while planes:
        values = (values << 8) | planes.pop()
    return values


def _squeeze(words: np.ndarray, bits: int) -> np.ndarray:
    """Move the low `bits` of each of a word's 8 bytes together at its low end, in three halvings."""
    for lane in (8, 16, 32):
        used, low = _lane_mask(lane, bits)
        words = (words & low) | ((words >> (lane - used)) & (low << used))
    return words


def _stretch(words: np.ndarray, bits: int) -> np.ndarray:
    """Undo `_squeeze`."""
    for lane in (32, 16, 8):
        used, low = _lane_mask(lane, bits)
        words = (words & low) | ((words & (low << used)) << (lane - used))
    return words


@cache
def _lane_mask(lane: int, bits: int) -> tuple[int, int]:
    """How many bits of a lane are used when each byte uses `bits`, and those bits of every second lane of a word."""
    used = bits * lane // 8
    return used, sum((2**used - 1) << start for start in range(0, 64, 2 * lane))


def _split_sets(counts_S: np.ndarray, universe: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Low-bit width, bitmap offset and first entry of each position's set."""
    # floor(log2(universe / count)) is Elias-Fano's choice: two bits an entry above the low bits
    width_S = np.frexp(universe // np.maximum(counts_S, 1))[1].astype(np.int64) - 1
    bits_S = np.where(counts_S > 0, counts_S + ((universe - 1) >> width_S), 0)
    starts_S = np.cumsum(counts_S) - counts_S
    return width_S, np.concatenate([[0], np.cumsum(bits_S)]), starts_S


def _place_bits(shift_S: np.ndarray, counts_S: np.ndarray) -> np.ndarray:
    """Where each entry's bit is when its high part is 0: one further an entry, and a shift for each position."""
    total = int(counts_S.sum())
    if total and (counts_S == counts_S[0]).all():
        return (np.arange(total).reshape(len(counts_S), -1) + shift_S[:, None]).ravel()
    return np.arange(total) + np.repeat(shift_S, counts_S)


def pack_sets(ids: np.ndarray, counts_S: np.ndarray, universe: int) -> bytes:
    """Write sets of ids, ascending within each position, in about `2 + log2(universe / count)` bits an id (Elias 1974).

    The order of the ids is not stored, which is what saves `log2(count!)` bits a position over fixed-width ids.

    Args:
        ids: all positions' ids, flat, each below `universe`.
        counts_S: how many of them are each position's.
        universe: one more than the largest id possible.
    """
    width_S, offsets, starts_S = _split_sets(counts_S, universe)
    widths = np.unique(width_S[counts_S > 0])
    if len(widths) == 1:
        high = ids >> widths[0]
        lows = [pack_bits(ids, int(widths[0]))]
    else:
        width = np.repeat(width_S, counts_S)
        high = ids >> width
        lows = [pack_bits(ids[width == w], int(w)) for w in widths]
    bitmap = np.zeros(int(offsets[-1]), bool)
    bitmap[high + _place_bits(offsets[:-1] - starts_S, counts_S)] = True
    return b"".join([np.packbits(bitmap).tobytes(), *lows])


def unpack_sets(reader: Reader, counts_S: np.ndarray, universe: int) -> np.ndarray:
    """Read back `pack_sets`'s flat ids as int64."""
    width_S, offsets, starts_S = _split_sets(counts_S, universe)
    num_bits = int(offsets[-1])
    bitmap = np.unpackbits(reader.take("u1", -(-num_bits // 8)), count=num_bits)
    high = np.flatnonzero(bitmap.view(bool))
    total = int(counts_S.sum())
    if len(high) != total:
        raise ValueError(f"id bitmap is of {len(high)} ids, but the positions count {total}; cache this sample again.")
    high -= _place_bits(offsets[:-1] - starts_S, counts_S)
    widths = np.unique(width_S[counts_S > 0])
    if len(widths) == 1:
        high <<= widths[0]
        high |= unpack_bits(reader, total, int(widths[0]))
        return high
    width = np.repeat(width_S, counts_S)
    ids = high << width
    for w in widths:
        chosen = np.flatnonzero(width == w)
        ids[chosen] |= unpack_bits(reader, len(chosen), int(w))
    return ids
