"""Integers in as few bits as they need: planes of fixed width, and ascending sets of ids by Elias-Fano.

Knows nothing of probabilities. Everything works on flat arrays of many positions at once; S positions, of which
position s owns `counts_S[s]` consecutive entries.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import numpy as np


class Reader:
    """Cursors over several payloads of one layout, which are read field by field as if they were one.

    A field of every payload is joined before it is unpacked: what numpy asks for a call is paid once a batch of answers
    and not once an answer. Reading past a payload's end is refused.

    Args:
        payloads: the bytes.
        starts: where in each the first field is.
    """

    def __init__(self, payloads: Sequence[bytes], starts: Sequence[int]):
        self.payloads, self.offsets = payloads, list(starts)

    def take(self, dtype: str, counts: Sequence[int]) -> np.ndarray:
        """The next `counts[i]` numbers of each payload, one payload's after the other's."""
        itemsize = np.dtype(dtype).itemsize
        parts = []
        for i, (data, start, count) in enumerate(zip(self.payloads, self.offsets, counts)):
            end = self.offsets[i] = start + count * itemsize
            if end > len(data):
                raise ValueError(
                    f"payload is {len(data)} bytes, but its header promises {end - len(data)} more; cache again."
                )
            parts.append(memoryview(data)[start:end])
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype)

    def finish(self):
        """Refuse what follows the last field."""
        for data, offset in zip(self.payloads, self.offsets):
            if offset != len(data):
                raise ValueError(
                    f"payload is {len(data)} bytes, but its header describes {offset}; cache this sample again."
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


def unpack_bits(reader: Reader, counts: Sequence[int], width: int) -> np.ndarray:
    """Read back `counts[i]` integers that `pack_bits` wrote into each payload, as int32."""
    planes = [reader.take("u1", counts) for _ in range(width // 8)]
    rest = width % 8
    if rest:
        words = [-(-count // 8) for count in counts]
        squeezed = reader.take("u1", [rest * count for count in words])
        octets = np.zeros((sum(words), 8), np.uint8)
        octets[:, :rest] = squeezed.reshape(-1, rest)
        planes.append(_cut_rows(_stretch(octets.view("<u8").ravel(), rest).view(np.uint8), counts, words))
    values = planes.pop().astype(np.int32) if planes else np.zeros(sum(counts), np.int32)
    while planes:
        values = (values << 8) | planes.pop()
    return values


def _cut_rows(octets: np.ndarray, counts: Sequence[int], words: Sequence[int]) -> np.ndarray:
    """Leave out what fills up the last word of each payload."""
    if len(counts) == 1:
        return octets[: counts[0]]
    return np.concatenate(
        [octets[8 * start : 8 * start + count] for start, count in zip(accumulate(words, initial=0), counts)]
    )


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


def unpack_sets(reader: Reader, sizes: Sequence[int], counts_S: np.ndarray, universe: int) -> np.ndarray:
    """Read back `pack_sets`'s flat ids as int64, of payloads with `sizes[i]` positions each."""
    width_S, offsets, starts_S = _split_sets(counts_S, universe)
    ends = list(accumulate(sizes, initial=0))
    num_bits = np.diff(offsets[ends])
    num_bytes = -(-num_bits // 8)
    high = np.flatnonzero(np.unpackbits(reader.take("u1", num_bytes.tolist())).view(bool))
    entries = np.append(starts_S, counts_S.sum())[ends]  # where each payload's begin, and where the last ends
    if len(high) != entries[-1]:
        raise ValueError(
            f"id bitmaps are of {len(high)} ids, but the positions count {entries[-1]}; cache these samples again."
        )
    padding = 8 * num_bytes - num_bits
    shift_S = offsets[:-1] - starts_S + np.repeat(np.cumsum(padding) - padding, sizes)
    high -= _place_bits(shift_S, counts_S)
    widths = np.unique(width_S[counts_S > 0])
    if len(widths) == 1:
        high <<= widths[0]
        high |= unpack_bits(reader, np.diff(entries).tolist(), int(widths[0]))
        return high
    width = np.repeat(width_S, counts_S)
    ids = high << width
    for w in widths:
        chosen = np.flatnonzero(width == w)
        counts = np.diff(np.searchsorted(chosen, entries)).tolist()
        ids[chosen] |= unpack_bits(reader, counts, int(w))
    return ids
