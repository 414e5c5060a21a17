"""As many ids of each position as are likelier than a threshold, in the layout of `topk`.

S supervised positions, K kept ids, V vocabulary, T stored temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shards.targets.codecs.bitpack import Reader
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.toplayout import capture_top, check_top, pack_top, read_top

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shards.targets.distributions import Distribution


@dataclass(frozen=True)
class Adaptive(Codec):
    """As `topk`, with as many ids as are likelier than a threshold: few where the teacher is sure."""

    threshold: float = 3e-4  # least probability that is kept
    min_k: int = 9
    max_k: int = 64
    head: int = 4  # as TopK
    tail_bits: int = 8  # as TopK
    temperatures: tuple[float, ...] = (1.0, 2.0)  # as TopK

    name: ClassVar[str] = "adaptive"
    settings: ClassVar[tuple[str, ...]] = ("k", "threshold", "temperatures")
    error: ClassVar[float] = 0.01
    tried: ClassVar[tuple[dict, ...]] = tuple({"k": 64, "threshold": threshold} for threshold in (1e-3, 3e-4, 1e-4))

    def __post_init__(self):
        check_top(self.min_k, self.head, self.tail_bits, self.temperatures)
        if not (self.max_k >= self.min_k and 0 <= self.threshold < 1):
            raise ValueError(
                f"(threshold, min_k, max_k) is {(self.threshold, self.min_k, self.max_k)}, but threshold must be in "
                f"[0, 1) and max_k at least min_k; change them in the config's cache section."
            )

    @classmethod
    def of(cls, cache) -> Adaptive:
        """`cache.k` is the most that a position may keep."""
        temperatures = tuple(cache.temperatures)
        return cls(threshold=cache.threshold, min_k=min(cache.k, 9), max_k=cache.k, temperatures=temperatures)

    def serves(self, temperature: float) -> bool:
        """At the temperatures at which the mass outside was summed."""
        return temperature in self.temperatures

    def plain(self, probs_V: np.ndarray) -> np.ndarray:
        """Those that are likely enough, and no fewer or more of the largest than is asked for."""
        rank_V = np.argsort(np.argsort(-probs_V, kind="stable"))
        is_kept_V = (rank_V < self.min_k) | (probs_V >= self.threshold)
        return is_kept_V & (rank_V < self.max_k) & (probs_V > 0)

    def capture(
        self, logits_SV: Tensor, hidden_SD: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The best ids in order, and the mass outside them."""
        return capture_top(logits_SV, self.max_k, self.temperatures)

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        logprobs_SK = captured["logprobs_SK"]
        with np.errstate(divide="ignore"):
            is_likely_SK = logprobs_SK >= np.log(np.float32(self.threshold))
        counts_S = np.maximum(is_likely_SK.sum(1), min(self.min_k, logprobs_SK.shape[1]))
        counts_S = np.minimum(counts_S, np.count_nonzero(logprobs_SK > -np.inf, axis=1))
        logodds_ST = _move_outside(captured, counts_S, self.temperatures)
        captured = captured | {"residual_logodds_ST": logodds_ST}
        return pack_top(self, captured, counts_S, self.head, self.tail_bits, self.temperatures)

    @staticmethod
    def read(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> Distribution:
        """The ids in the layout's order, normalized again."""
        return read_top(reader, sizes, vocab_size, parameters)


def _move_outside(captured: dict[str, np.ndarray], counts_S: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
    """The log-odds of the mass outside when only the first `counts_S` ids of each position are kept."""
    logprobs_SK = captured["logprobs_SK"]
    is_dropped_SK = np.arange(logprobs_SK.shape[1]) >= counts_S[:, None]
    below_SK = logprobs_SK - logprobs_SK[:, :1]
    columns = []
    for i, t in enumerate(temperatures):
        mass_SK = np.exp(below_SK * np.float32(1 / t))
        total_S = mass_SK.sum(1)
        mass_SK *= is_dropped_SK
        dropped_S = mass_SK.sum(1)
        outside_S = np.exp(captured["residual_logodds_ST"][:, i]) * total_S + dropped_S
        with np.errstate(divide="ignore"):
            columns.append(np.log(outside_S) - np.log(total_S - dropped_S))
    return np.stack(columns, -1)
