"""What every payload starts with: which codec wrote it, for how many positions and ids, with which parameters."""

import struct
from typing import NamedTuple

from shards.targets.codecs.codec import Codec

MAGIC = b"KT"
FIXED = struct.Struct("<2sBBBII")
MAX_VOCAB = 2**18  # ids have 17 bits up to Llama's 128,256 and 18 up to Qwen's 152,064


def pack_header(codec: Codec, num_positions: int, vocab_size: int, *parameters: float) -> bytes:
    """The self-description every payload starts with.

    Raises:
        ValueError: the vocabulary is larger than a layout may hold.
    """
    if vocab_size > MAX_VOCAB:
        raise ValueError(
            f"vocab_size is {vocab_size}, but codecs store ids below {MAX_VOCAB}; use a smaller vocabulary."
        )
    fixed = FIXED.pack(MAGIC, codec.version, len(codec.name), len(parameters), num_positions, vocab_size)
    return b"".join([fixed, codec.name.encode(), struct.pack(f"<{len(parameters)}d", *parameters)])


class Header(NamedTuple):
    """What a payload says of itself, and where its fields begin."""

    name: str
    version: int  # of the codec's layout
    num_positions: int
    vocab_size: int
    parameters: tuple[float, ...]
    size: int

    @property
    def layout(self) -> tuple:
        """What payloads that are read together have in common."""
        return self.name, self.version, self.vocab_size, self.parameters


def read_header(payload: bytes) -> Header:
    """Read what `pack_header` wrote.

    Raises:
        ValueError: the payload is none.
    """
    if payload[:2] != MAGIC or len(payload) < FIXED.size:
        raise ValueError(
            f"payload starts with {payload[:2]!r} and is {len(payload)} bytes, but targets start with {MAGIC!r} and a "
            f"header of {FIXED.size}; cache this sample again."
        )
    _, version, name_size, num_parameters, num_positions, vocab_size = FIXED.unpack_from(payload)
    begin = FIXED.size + name_size
    size = begin + 8 * num_parameters
    if len(payload) < size:
        raise ValueError(
            f"payload is {len(payload)} bytes, but its header promises {size - len(payload)} more; cache again."
        )
    name = payload[FIXED.size : begin].decode(errors="replace")
    parameters = struct.unpack_from(f"<{num_parameters}d", payload, begin)
    return Header(name, version, num_positions, vocab_size, parameters, size)
