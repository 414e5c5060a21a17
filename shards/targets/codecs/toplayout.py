"""The layout of the codecs that keep a teacher's most probable ids: counts, residuals, head, tail.

S supervised positions, K kept ids, H head ids, V vocabulary, T stored temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from shards.targets.codecs.bitpack import Reader, pack_bits, pack_sets, unpack_bits, unpack_sets
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.payload import pack_header

if TYPE_CHECKING:
    from torch import Tensor

    from shards.targets.distributions import Distribution

SPANS = 2.0 ** ((np.arange(256, dtype=np.float32) - 64) / 16)  # nats from the head to the least kept: 1/16 to 3,900


def capture_top(logits_SV: Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    """The k best ids in order, and the log-odds of the mass outside at each temperature, summed over the outside."""
    import torch

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


def check_top(k: int, head: int, tail_bits: int, temperatures: tuple[float, ...]) -> None:
    """Refuse parameters that the layout cannot hold."""
    if not (k >= 1 and head >= 1 and 1 <= tail_bits <= 8):
        raise ValueError(
            f"(k, head, tail_bits) is {(k, head, tail_bits)}, but k and head must be at least 1 and tail_bits from "
            f"1 to 8; change them in the config's cache section."
        )
    if 1.0 not in temperatures or min(temperatures) <= 0:
        raise ValueError(
            f"temperatures is {temperatures}, but all must be above 0 and 1.0 among them; change cache.temperatures."
        )


def pack_top(
    codec: Codec, captured: dict[str, np.ndarray], counts_S: np.ndarray, head: int, tail_bits: int, temperatures: tuple
) -> bytes:
    """The payload of the first `counts_S` ids of each position: counts, residuals, head, tail."""
    ids_SK, logprobs_SK = captured["ids_SK"], captured["logprobs_SK"]
    vocab_size = int(captured["vocab_size"])
    num_positions, k = ids_SK.shape
    head = min(head, k)
    is_uniform = bool((counts_S == k).all())
    counts = b"" if is_uniform else pack_bits(counts_S, k.bit_length())
    is_kept_SH = np.arange(head) < counts_S[:, None]
    head_logprobs_SH = np.where(is_kept_SH, logprobs_SK[:, :head], -np.inf).astype("<f2")
    tail_counts_S = np.maximum(counts_S - head, 0)
    has_tail_S = tail_counts_S > 0
    # what the reader will see of the head anchors the tail
    anchor_S = np.where(has_tail_S, head_logprobs_SH[:, -1].astype(np.float32), 0)
    least_S = np.where(has_tail_S, logprobs_SK[np.arange(num_positions), counts_S - 1], 0)
    span_codes_S = np.searchsorted(SPANS[:-1], anchor_S - least_S).astype(np.uint8)
    return b"".join(
        [
            pack_header(codec, num_positions, vocab_size, k, head, tail_bits, *temperatures),
            bytes([is_uniform]),
            counts,
            captured["residual_logodds_ST"].astype("<f2").tobytes(),
            pack_bits(ids_SK[:, :head] * is_kept_SH, (vocab_size - 1).bit_length()),
            head_logprobs_SH.tobytes(),
            span_codes_S.tobytes(),
            _pack_tail(
                ids_SK[:, head:], logprobs_SK[:, head:], tail_counts_S, anchor_S, span_codes_S, tail_bits, vocab_size
            ),
        ]
    )


def _pack_tail(ids_SK, logprobs_SK, counts_S, anchor_S, span_codes_S, bits, vocab_size) -> bytes:
    """The tail's ids as an ascending set, and in their order their distance below the anchor, in steps of the span."""
    levels = np.float32(2**bits - 1)
    drop_SK = (anchor_S[:, None] - logprobs_SK) / SPANS[span_codes_S][:, None]
    np.clip(drop_SK, 0, 1, out=drop_SK)
    codes_SK = (np.cbrt(drop_SK * drop_SK) * levels + np.float32(0.5)).astype(np.uint32)  # undoes the power of 1.5
    keyed_SK = (ids_SK.astype(np.uint32) << 8) | codes_SK
    if (counts_S == keyed_SK.shape[1]).all():
        keyed = np.sort(keyed_SK, 1).ravel()
    else:
        is_kept_SK = np.arange(keyed_SK.shape[1]) < counts_S[:, None]
        keyed_SK[~is_kept_SK] = np.iinfo(np.uint32).max  # sorts behind every id
        keyed = np.sort(keyed_SK, 1)[is_kept_SK]
    return pack_sets((keyed >> 8).astype(np.int64), counts_S, vocab_size) + pack_bits(keyed & 255, bits)


def read_top(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> Distribution:
    """Read `pack_top`'s layout from payloads of `sizes[i]` positions each."""
    k, head, tail_bits = (int(value) for value in parameters[:3])
    temperatures = parameters[3:]
    counts_S = _read_counts(reader, sizes, k)
    num_positions = len(counts_S)
    logodds_ST = _read_rows(reader, "<f2", sizes, len(temperatures)).astype(np.float32)
    width = max(int(counts_S.max(initial=0)), head)
    ids_SK = np.zeros((num_positions, width), np.int64)
    logprobs_SK = np.empty((num_positions, width), np.float32)
    head_ids = unpack_bits(reader, [size * head for size in sizes], (vocab_size - 1).bit_length())
    ids_SK[:, :head] = head_ids.reshape(num_positions, head)
    logprobs_SK[:, :head] = _read_rows(reader, "<f2", sizes, head)
    spans_S1 = SPANS[reader.take("u1", sizes)][:, None]
    tail_counts_S = np.maximum(counts_S - head, 0)
    tail_ids = unpack_sets(reader, sizes, tail_counts_S, vocab_size)
    tail_sizes = np.diff(np.append(0, np.cumsum(tail_counts_S))[list(accumulate(sizes, initial=0))]).tolist()
    levels = 2**tail_bits - 1
    # steps grow with the distance: an error in a likelier id weighs more
    curve = (np.arange(levels + 1, dtype=np.float32) / levels) ** np.float32(1.5)
    drops = curve[unpack_bits(reader, tail_sizes, tail_bits)]
    shape_SK = (num_positions, width - head)
    if len(tail_ids) == num_positions * (width - head):
        ids_SK[:, head:] = tail_ids.reshape(shape_SK)
        drop_SK = drops.reshape(shape_SK) * spans_S1
        np.subtract(logprobs_SK[:, head - 1 : head], drop_SK, out=logprobs_SK[:, head:])
    else:
        is_tail_SK = np.arange(head, width) < counts_S[:, None]
        drop_SK = np.full(shape_SK, np.inf, np.float32)
        drop_SK[is_tail_SK] = drops
        ids_SK[:, head:][is_tail_SK] = tail_ids
        # an unused slot drops by infinity; so it does under a head that is itself unused
        logprobs_SK[:, head:] = (
            np.maximum(logprobs_SK[:, head - 1 : head], np.finfo(np.float32).min) - drop_SK * spans_S1
        )
    return rebuild(ids_SK, logprobs_SK, logodds_ST, temperatures, vocab_size)


def _read_counts(reader: Reader, sizes: Sequence[int], k: int) -> np.ndarray:
    """How many ids each position keeps: k, unless its payload says otherwise."""
    is_uniform = reader.take("u1", [1] * len(sizes)).astype(bool)
    counts_S = np.full(sum(sizes), k)
    if not is_uniform.all():
        told = [0 if uniform else size for uniform, size in zip(is_uniform, sizes)]
        counts_S[np.repeat(~is_uniform, sizes)] = unpack_bits(reader, told, k.bit_length())
    return counts_S


def _read_rows(reader: Reader, dtype: str, sizes: Sequence[int], width: int) -> np.ndarray:
    """`width` numbers of every position."""
    return reader.take(dtype, [size * width for size in sizes]).reshape(-1, width)


def rebuild(ids_SK, logprobs_SK, logodds_ST, temperatures: Sequence[float], vocab_size: int) -> Distribution:
    """Normalize rounded log-probabilities so that at every temperature they and the stored residual sum to one."""
    import torch

    from shards.targets.distributions import Distribution

    log_kept_ST = -np.logaddexp(0, logodds_ST)
    log_residual_ST = -np.logaddexp(0, -logodds_ST)
    log_sum_ST = _logsumexp(logprobs_SK, temperatures)
    column = temperatures.index(1.0)
    shift_S = log_sum_ST[:, column] - log_kept_ST[:, column]
    logprobs_SK -= shift_S[:, None]
    log_partition = {
        t: torch.from_numpy(log_sum_ST[:, i] - shift_S / np.float32(t) - log_kept_ST[:, i])
        for i, t in enumerate(temperatures)
    }
    log_residual = {t: torch.from_numpy(log_residual_ST[:, i].copy()) for i, t in enumerate(temperatures)}
    return Distribution(
        torch.from_numpy(ids_SK), torch.from_numpy(logprobs_SK), log_partition, vocab_size, log_residual
    )


def _logsumexp(logprobs_SK: np.ndarray, temperatures: Sequence[float]) -> np.ndarray:
    """Log of the sum of exponentials over each temperature, S by T; a row's first is its largest, or nearly."""
    first_S1 = logprobs_SK[:, :1]
    masses_SK = logprobs_SK - first_S1
    reached = 1.0  # the temperature that the masses are at: from 1 to 2 is a root, which is cheaper than exponentials
    np.exp(masses_SK, out=masses_SK)
    log_sum_ST = np.empty((len(logprobs_SK), len(temperatures)), np.float32)
    for i in np.argsort(temperatures):
        if temperatures[i] == 2 * reached:
            np.sqrt(masses_SK, out=masses_SK)
        elif temperatures[i] != reached:
            np.subtract(logprobs_SK, first_S1, out=masses_SK)
            masses_SK /= np.float32(temperatures[i])
            np.exp(masses_SK, out=masses_SK)
        reached = temperatures[i]
        log_sum_ST[:, i] = np.log(masses_SK.sum(1)) + first_S1[:, 0] / np.float32(reached)
    return log_sum_ST
