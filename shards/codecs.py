"""How a teacher's distribution at S positions becomes bytes and comes back.

A payload describes itself: codec name, version, sizes and parameters come first, so `decode(payload)` needs nothing
else. It has no checksum of its own; the record around it does. Knows no tar, no sample and no teacher.

Every codec has three steps: `capture` where the logits are, `encode` on the host in numpy, `decode` in the training run.

S supervised positions, K kept ids, H head ids, V vocabulary, D LLM width, T stored temperatures, N draws.
"""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shards.bitpack import Reader, pack_bits, pack_sets, unpack_bits, unpack_sets
from shards.distributions import Distribution

MAGIC = b"KT"
VERSION = 1
MAX_VOCAB = 2**18  # ids have 17 bits up to Llama's 128,256 and 18 up to Qwen's 152,064
SPANS = 2.0 ** ((np.arange(256, dtype=np.float32) - 64) / 16)  # nats from the head to the least kept: 1/16 to 3,900


@dataclass(frozen=True)
class TopK:
    """The k most probable ids: the first few in order with float16 log-probabilities, the rest as a set with coarse ones.

    The order of the tail is not stored, only its log-probabilities: an ascending set of ids is 37 bytes smaller than 64
    ids in order, and needs no compressor, so an answer of 20 tokens costs as much a token as a million of them.
    """

    k: int = 64
    head: int = 4  # ids stored in order, exact to float16
    tail_bits: int = 5  # of a tail log-probability, on a log scale from the head's last to the least kept
    temperatures: tuple[float, ...] = (1.0, 2.0)  # at which the mass outside the k is known

    name: ClassVar[str] = "topk"

    def __post_init__(self):
        check_top(self.k, self.head, self.tail_bits, self.temperatures)

    def capture(self, logits_SV: Tensor) -> dict[str, Tensor]:
        """What `encode` needs, computed where the logits are."""
        return capture_top(logits_SV, self.k, self.temperatures)

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        counts_S = np.count_nonzero(captured["logprobs_SK"] > -np.inf, axis=1)
        return pack_top(self.name, captured, counts_S, self.head, self.tail_bits, self.temperatures)

    @staticmethod
    def read(reader: Reader, num_positions: int, vocab_size: int, parameters: list[float]) -> Distribution:
        """What `decode` calls after the header."""
        return read_top(reader, num_positions, vocab_size, parameters)


@dataclass(frozen=True)
class Dense:
    """All V log-probabilities in float16: for tests and for measuring the others."""

    name: ClassVar[str] = "dense"

    def capture(self, logits_SV: Tensor) -> dict[str, Tensor]:
        """What `encode` needs, computed where the logits are."""
        return {"logprobs_SV": torch.log_softmax(logits_SV.float(), -1)}

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        num_positions, vocab_size = captured["logprobs_SV"].shape
        return pack_header(self.name, num_positions, vocab_size) + captured["logprobs_SV"].astype("<f2").tobytes()

    @staticmethod
    def read(reader: Reader, num_positions: int, vocab_size: int, parameters: list[float]) -> Distribution:
        """What `decode` calls after the header."""
        values_SV = reader.take("<f2", num_positions * vocab_size).reshape(num_positions, vocab_size)
        return Distribution.from_logits(torch.from_numpy(values_SV.astype(np.float32)))


CODECS = {"topk": TopK, "dense": Dense}


def decode(payload: bytes) -> Distribution:
    """Read a payload of any codec into CPU tensors.

    Raises:
        ValueError: the payload is not one, is of an unknown codec or version, or is cut.
    """
    reader = Reader(payload)
    name, num_positions, vocab_size, parameters = read_header(reader)
    if name not in CODECS:
        raise ValueError(
            f"codec is {name!r}, but this program knows {', '.join(CODECS)}; cache again with one of them."
        )
    decoded = CODECS[name].read(reader, num_positions, vocab_size, parameters)
    reader.finish()
    return decoded


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


def check_top(k: int, head: int, tail_bits: int, temperatures: tuple[float, ...]):
    """Refuse parameters that the layout cannot hold."""
    if not (k >= 1 and head >= 1 and 1 <= tail_bits <= 8):
        raise ValueError(
            f"(k, head, tail_bits) is {(k, head, tail_bits)}, but k and head must be at least 1 and tail_bits from 1 to 8; "
            f"change them in the config's cache section."
        )
    if 1.0 not in temperatures or min(temperatures) <= 0:
        raise ValueError(
            f"temperatures is {temperatures}, but all must be above 0 and 1.0 among them; change cache.temperatures."
        )


def capture_top(logits_SV: Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    """The k best ids, and the log-odds of the mass outside them at each temperature, summed over what is outside."""
    logprobs_SV = torch.log_softmax(logits_SV.float(), -1)
    logprobs_SK, ids_SK = logprobs_SV.topk(min(k, logits_SV.shape[-1]), -1)
    rest_SV = logprobs_SV.scatter_(-1, ids_SK, -torch.inf)
    logodds_ST = [torch.logsumexp(rest_SV / t, -1) - torch.logsumexp(logprobs_SK / t, -1) for t in temperatures]
    return {
        "ids_SK": ids_SK.int(),
        "logprobs_SK": logprobs_SK,
        "residual_logodds_ST": torch.stack(logodds_ST, -1),
        "vocab_size": torch.tensor(logits_SV.shape[-1]),
    }


def pack_top(
    name: str, captured: dict[str, np.ndarray], counts_S: np.ndarray, head: int, tail_bits: int, temperatures: tuple
) -> bytes:
    """The layout of `topk` and `adaptive`: counts, residuals, head, tail."""
    ids_SK, logprobs_SK = captured["ids_SK"], captured["logprobs_SK"]
    vocab_size = int(captured["vocab_size"])
    num_positions, k = ids_SK.shape
    head = min(head, k)
    is_uniform = bool((counts_S == k).all())
    counts = b"" if is_uniform else pack_bits(counts_S, k.bit_length())
    head_logprobs_SH = logprobs_SK[:, :head].astype("<f2")
    tail_counts_S = np.maximum(counts_S - head, 0)
    has_tail_S = tail_counts_S > 0
    # what the reader will see of the head anchors the tail
    anchor_S = np.where(has_tail_S, head_logprobs_SH[:, -1].astype(np.float32), 0)
    least_S = np.where(has_tail_S, logprobs_SK[np.arange(num_positions), counts_S - 1], 0)
    span_codes_S = np.searchsorted(SPANS[:-1], anchor_S - least_S).astype(np.uint8)
    return b"".join(
        [
            pack_header(name, num_positions, vocab_size, k, head, tail_bits, is_uniform, *temperatures),
            counts,
            captured["residual_logodds_ST"].astype("<f2").tobytes(),
            pack_bits(ids_SK[:, :head], (vocab_size - 1).bit_length()),
            head_logprobs_SH.tobytes(),
            span_codes_S.tobytes(),
            _pack_tail(
                ids_SK[:, head:], logprobs_SK[:, head:], tail_counts_S, anchor_S, span_codes_S, tail_bits, vocab_size
            ),
        ]
    )


def _pack_tail(ids_SK, logprobs_SK, counts_S, anchor_S, span_codes_S, bits, vocab_size) -> bytes:
    """The tail's ids as an ascending set, and in their order the distance below the anchor in steps of span / 2**bits."""
    levels = 2**bits - 1
    steps_S = np.float32(levels) / SPANS[span_codes_S]
    codes_SK = (anchor_S[:, None] - logprobs_SK) * steps_S[:, None] + np.float32(0.5)
    codes_SK = np.clip(codes_SK, 0, levels, out=codes_SK).astype(np.uint32)
    keyed_SK = (ids_SK.astype(np.uint32) << 8) | codes_SK
    if (counts_S == keyed_SK.shape[1]).all():
        keyed = np.sort(keyed_SK, 1).ravel()
    else:
        is_kept_SK = np.arange(keyed_SK.shape[1]) < counts_S[:, None]
        keyed_SK[~is_kept_SK] = np.iinfo(np.uint32).max  # sorts behind every id
        keyed = np.sort(keyed_SK, 1)[is_kept_SK]
    return pack_sets((keyed >> 8).astype(np.int64), counts_S, vocab_size) + pack_bits(keyed & 255, bits)


def read_top(reader: Reader, num_positions: int, vocab_size: int, parameters: list[float]) -> Distribution:
    """Read `pack_top`'s layout."""
    k, head, tail_bits, is_uniform = (int(value) for value in parameters[:4])
    temperatures = parameters[4:]
    counts_S = np.full(num_positions, k) if is_uniform else unpack_bits(reader, num_positions, k.bit_length())
    shape_ST = (num_positions, len(temperatures))
    logodds_ST = reader.take("<f2", num_positions * len(temperatures)).reshape(shape_ST).astype(np.float32)
    width = max(int(counts_S.max(initial=0)), head)
    ids_SK = np.zeros((num_positions, width), np.int64)
    logprobs_SK = np.full((num_positions, width), -np.inf, np.float32)
    head_ids = unpack_bits(reader, num_positions * head, (vocab_size - 1).bit_length())
    ids_SK[:, :head] = head_ids.reshape(num_positions, head)
    logprobs_SK[:, :head] = reader.take("<f2", num_positions * head).reshape(num_positions, head)
    steps_S = SPANS[reader.take("u1", num_positions)] / np.float32(2**tail_bits - 1)
    tail_counts_S = np.maximum(counts_S - head, 0)
    tail_ids = unpack_sets(reader, tail_counts_S, vocab_size)
    codes = unpack_bits(reader, len(tail_ids), tail_bits)
    is_tail_SK = np.arange(head, width) < counts_S[:, None]
    drop_SK = np.zeros(is_tail_SK.shape, np.float32)
    drop_SK[is_tail_SK] = codes
    ids_SK[:, head:][is_tail_SK] = tail_ids
    tail_SK = logprobs_SK[:, head - 1 : head] - drop_SK * steps_S[:, None]
    logprobs_SK[:, head:] = np.where(is_tail_SK, tail_SK, -np.inf)
    return rebuild(ids_SK, logprobs_SK, logodds_ST, temperatures, vocab_size)


def rebuild(ids_SK, logprobs_SK, logodds_ST, temperatures: list[float], vocab_size: int) -> Distribution:
    """Normalise rounded log-probabilities so that at every temperature they and the stored residual sum to one."""
    log_kept_ST = -np.logaddexp(0, logodds_ST)
    log_residual_ST = -np.logaddexp(0, -logodds_ST)
    log_partition = {}
    logprobs_SK -= (_logsumexp(logprobs_SK) - log_kept_ST[:, temperatures.index(1.0)])[:, None]
    for i, t in enumerate(temperatures):
        partition_S = (
            np.zeros(len(logprobs_SK), np.float32)
            if t == 1
            else _logsumexp(logprobs_SK / np.float32(t)) - log_kept_ST[:, i]
        )
        log_partition[t] = torch.from_numpy(partition_S)
    log_residual = {t: torch.from_numpy(log_residual_ST[:, i].copy()) for i, t in enumerate(temperatures)}
    return Distribution(
        torch.from_numpy(ids_SK), torch.from_numpy(logprobs_SK), log_partition, vocab_size, log_residual
    )


def _logsumexp(values_SK: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials of each row; the first value is its largest, or nearly."""
    first_S1 = values_SK[:, :1]
    return np.log(np.exp(values_SK - first_S1).sum(1)) + first_S1[:, 0]
