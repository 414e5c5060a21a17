"""What every payload starts with: which codec wrote it, for how many positions and ids, with which parameters."""

import struct

import numpy as np

from shards.bitpack import Reader

MAGIC = b"KT"
VERSION = 1
MAX_VOCAB = 2**18  # ids have 17 bits up to Llama's 128,256 and 18 up to Qwen's 152,064


def pack_header(name: str, num_positions: int, vocab_size: int, *parameters: float) -> bytes:
    """The self-description every payload starts with."""
    if vocab_size > MAX_VOCAB:
        raise ValueError(
            f"vocab_size is {vocab_size}, but codecs store ids below {MAX_VOCAB}; use a smaller vocabulary."
        )
    sizes = struct.pack("<BBBII", VERSION, len(name), len(parameters), num_positions, vocab_size)
    return b"".join([MAGIC, sizes, name.encode(), np.array(parameters, "<f4").tobytes()])


def read_header(reader: Reader) -> tuple[str, int, int, list[float]]:
    """Codec name, S, V and the codec's parameters."""
    magic = reader.take("u1", 2).tobytes()
    if magic != MAGIC:
        raise ValueError(f"payload starts with {magic!r}, but targets start with {MAGIC!r}; cache this sample again.")
    version, name_size, num_parameters, num_positions, vocab_size = struct.unpack("<BBBII", reader.take("u1", 11))
    if version != VERSION:
        raise ValueError(f"payload version is {version}, but this program reads {VERSION}; cache this sample again.")
    name = reader.take("u1", name_size).tobytes().decode(errors="replace")
    return name, num_positions, vocab_size, reader.take("<f4", num_parameters).tolist()
