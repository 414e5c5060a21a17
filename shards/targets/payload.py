"""What every payload starts with: which codec wrote it, for how many positions and ids, with which parameters."""

import struct
from typing import NamedTuple

MAGIC = b"KT"
VERSION = 2
FIXED = struct.Struct("<2sBBBII")
MAX_VOCAB = 2**18  # ids have 17 bits up to Llama's 128,256 and 18 up to Qwen's 152,064


def pack_header(name: str, num_positions: int, vocab_size: int, *parameters: float) -> bytes:
    """The self-description every payload starts with."""
    if vocab_size > MAX_VOCAB:
        raise ValueError(
            f"vocab_size is {vocab_size}, but codecs store ids below {MAX_VOCAB}; use a smaller vocabulary."
        )
    fixed = FIXED.pack(MAGIC, VERSION, len(name), len(parameters), num_positions, vocab_size)
    return b"".join([fixed, name.encode(), struct.pack(f"<{len(parameters)}d", *parameters)])


class Header(NamedTuple):
    """What a payload says of itself, and where its fields begin."""

    name: str
    num_positions: int
    vocab_size: int
    parameters: tuple[float, ...]
    size: int

    @property
    def layout(self) -> tuple:
        """What payloads that are read together have in common."""
        return self.name, self.vocab_size, self.parameters


def read_header(payload: bytes) -> Header:
    """Read what `pack_header` wrote.

    Raises:
        ValueError: the payload is none, or of another version.
    """
    if payload[:2] != MAGIC or len(payload) < FIXED.size:
        raise ValueError(
            f"payload starts with {payload[:2]!r} and is {len(payload)} bytes, but targets start with {MAGIC!r} and a "
            f"header of {FIXED.size}; cache this sample again."
        )
    _, version, name_size, num_parameters, num_positions, vocab_size = FIXED.unpack_from(payload)
    if version != VERSION:
        raise ValueError(f"payload version is {version}, but this program reads {VERSION}; cache this sample again.")
    begin = FIXED.size + name_size
    size = begin + 8 * num_parameters
    if len(payload) < size:
        raise ValueError(
            f"payload is {len(payload)} bytes, but its header promises {size - len(payload)} more; cache again."
        )
    name = payload[FIXED.size : begin].decode(errors="replace")
    parameters = struct.unpack_from(f"<{num_parameters}d", payload, begin)
    return Header(name, num_positions, vocab_size, parameters, size)
