"""The k most probable ids of each position, and how much is outside them.

S supervised positions, K kept ids, V vocabulary.
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
class TopK(Codec):
    """The k most probable ids: the first few in order and to float16, the rest as a set with coarse log-probabilities.

    The order of the tail is not stored, only its log-probabilities: an ascending set of ids is 37 bytes smaller than 64
    ids in order, and needs no compressor, so an answer of 20 tokens costs as much a token as a million of them.
    """

    k: int = 64
    head: int = 4  # ids stored in order, exact to float16
    tail_bits: int = 5  # of a tail log-probability, on a log scale from the head's last to the least kept
    temperatures: tuple[float, ...] = (1.0, 2.0)  # at which the mass outside the k is known

    name: ClassVar[str] = "topk"
    settings: ClassVar[tuple[str, ...]] = ("k", "temperatures")
    error: ClassVar[float] = 0.02
    tried: ClassVar[tuple[dict, ...]] = ({"k": 8}, {"k": 16}, {"k": 32}, {"k": 64}, {"k": 128})

    def __post_init__(self):
        check_top(self.k, self.head, self.tail_bits, self.temperatures)

    def serves(self, temperature: float) -> bool:
        """At the temperatures at which the mass outside was summed."""
        return temperature in self.temperatures

    def plain(self, probs_V: np.ndarray) -> np.ndarray:
        """The k largest, without those that are impossible."""
        return (np.argsort(np.argsort(-probs_V, kind="stable")) < self.k) & (probs_V > 0)

    def capture(
        self, logits_SV: Tensor, hidden_SD: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The best ids in order, and the mass outside them."""
        return capture_top(logits_SV, self.k, self.temperatures)

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        counts_S = np.count_nonzero(captured["logprobs_SK"] > -np.inf, axis=1)
        return pack_top(self, captured, counts_S, self.head, self.tail_bits, self.temperatures)

    @staticmethod
    def read(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> Distribution:
        """The ids in the layout's order, normalized again."""
        return read_top(reader, sizes, vocab_size, parameters)
