"""Ids drawn from the teacher instead of its most probable ones: unbiased, about a dozen ids a token.

S supervised positions, K kept ids, V vocabulary, N draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shards.targets.codecs.bitpack import Reader, pack_bits, pack_sets, unpack_bits, unpack_sets
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.payload import pack_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shards.targets.distributions import Distribution


@dataclass(frozen=True)
class Sampled(Codec):
    """Random-sampled KD: ids drawn from the teacher, so that the gradient is right on average at a dozen ids a token.

    N draws from q = p^exponent / Z give id i the weight count_i / N * p_i / q_i, whose expectation is p_i (arXiv
    2503.16870, "Sparse Logit Sampling"). At exponent 1 the weights are counts and sum to one; at another they sum to
    one on average only. What is stored holds for temperature 1 and cannot be re-tempered without bias.
    """

    draws: int = 50
    exponent: float = 1.0  # of the proposal; below 1 it draws more of the tail

    name: ClassVar[str] = "sampled"
    settings: ClassVar[tuple[str, ...]] = ("draws", "exponent")
    error: ClassVar[float] = 0.02
    tried: ClassVar[tuple[dict, ...]] = ({"draws": 12}, {"draws": 50})
    is_advised: ClassVar[bool] = False  # noisy in short answers
    is_random: ClassVar[bool] = True
    kl_kinds: ClassVar[tuple[str, ...]] = ("forward_kl",)  # linear in the teacher's probabilities

    def __post_init__(self):
        if not (1 <= self.draws < 2**16 and 0 < self.exponent <= 1):
            raise ValueError(
                f"(draws, exponent) is {(self.draws, self.exponent)}, but draws must be from 1 to 65,535 and exponent "
                f"in (0, 1]; change them in the config's cache section."
            )

    def serves(self, temperature: float) -> bool:
        """At 1 alone: weights of draws cannot be re-tempered without bias."""
        return temperature == 1

    def plain(self, probs_V: np.ndarray) -> np.ndarray:
        """All that are possible may be drawn."""
        return probs_V > 0

    def capture(
        self, logits_SV: Tensor, hidden_SD: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw where the logits are."""
        import torch

        logprobs_SV = torch.log_softmax(logits_SV.float(), -1)
        log_proposal_SV = torch.log_softmax(self.exponent * logprobs_SV, -1)
        uniform_SN = torch.rand(len(logits_SV), self.draws, dtype=torch.double, generator=generator)
        cumulative_SV = log_proposal_SV.double().exp().cumsum(-1)
        # right: the first id whose cumulative mass is larger, so never one without mass
        draws_SN = torch.searchsorted(
            cumulative_SV, uniform_SN.to(logits_SV.device) * cumulative_SV[:, -1:], right=True
        ).clamp(max=logits_SV.shape[-1] - 1)
        log_ratio_SN = logprobs_SV.gather(-1, draws_SN) - log_proposal_SV.gather(-1, draws_SN)
        size = torch.tensor(logits_SV.shape[-1])
        return {"draws_SN": draws_SN.int(), "log_ratio_SN": log_ratio_SN, "vocab_size": size}

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        draws_SN, vocab_size = captured["draws_SN"], int(captured["vocab_size"])
        order_SN = np.argsort(draws_SN, 1)
        draws_SN = np.take_along_axis(draws_SN, order_SN, 1)
        is_first_SN = np.ones(draws_SN.shape, bool)
        is_first_SN[:, 1:] = draws_SN[:, 1:] != draws_SN[:, :-1]
        firsts = np.flatnonzero(is_first_SN)
        repeats = np.diff(np.append(firsts, draws_SN.size))
        counts_S = is_first_SN.sum(1)
        pieces = [
            pack_header(self, len(draws_SN), vocab_size, self.draws, self.exponent),
            pack_bits(counts_S, self.draws.bit_length()),
            pack_sets(draws_SN[is_first_SN].astype(np.int64), counts_S, vocab_size),
            pack_bits(repeats - 1, (self.draws - 1).bit_length()),
        ]
        if self.exponent != 1:
            pieces.append(
                np.take_along_axis(captured["log_ratio_SN"], order_SN, 1)[is_first_SN].astype("<f2").tobytes()
            )
        return b"".join(pieces)

    @staticmethod
    def read(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> Distribution:
        """Log-weights for log-probabilities, and no mass outside."""
        import torch

        from shards.targets.distributions import Distribution

        draws, exponent = int(parameters[0]), parameters[1]
        counts_S = unpack_bits(reader, sizes, draws.bit_length())
        num_positions = len(counts_S)
        ids = unpack_sets(reader, sizes, counts_S, vocab_size)
        num_ids = np.diff(np.append(0, np.cumsum(counts_S))[list(accumulate(sizes, initial=0))]).tolist()
        weights = np.log((unpack_bits(reader, num_ids, (draws - 1).bit_length()) + 1) / np.float32(draws))
        if exponent != 1:
            weights += reader.take("<f2", num_ids)
        is_used_SK = np.arange(counts_S.max(initial=1)) < counts_S[:, None]
        ids_SK = np.zeros(is_used_SK.shape, np.int64)
        logprobs_SK = np.full(is_used_SK.shape, -np.inf, np.float32)
        ids_SK[is_used_SK], logprobs_SK[is_used_SK] = ids, weights
        nothing_S = torch.full((num_positions,), -torch.inf)
        partition = {1.0: torch.zeros(num_positions)}
        return Distribution(
            torch.from_numpy(ids_SK), torch.from_numpy(logprobs_SK), partition, vocab_size, {1.0: nothing_S}
        )
