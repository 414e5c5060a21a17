"""Every log-probability, as large as it is.

S supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shards.targets.codecs.bitpack import Reader
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.payload import pack_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shards.targets.distributions import Distribution


@dataclass(frozen=True)
class Dense(Codec):
    """All V log-probabilities in float16: for tests and for measuring the others."""

    name: ClassVar[str] = "dense"
    error: ClassVar[float] = 0.002
    is_advised: ClassVar[bool] = False  # as large as can be
    keeps_all: ClassVar[bool] = True

    def plain(self, probs_V: np.ndarray) -> np.ndarray:
        """All of them."""
        return np.ones(len(probs_V), bool)

    def capture(
        self, logits_SV: Tensor, hidden_SD: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The log-probabilities."""
        import torch

        return {"logprobs_SV": torch.log_softmax(logits_SV.float(), -1)}

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        num_positions, vocab_size = captured["logprobs_SV"].shape
        return pack_header(self, num_positions, vocab_size) + captured["logprobs_SV"].astype("<f2").tobytes()

    @staticmethod
    def read(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> Distribution:
        """The log-probabilities, normalized again."""
        import torch

        from shards.targets.distributions import Distribution

        values_SV = reader.take("<f2", [size * vocab_size for size in sizes]).reshape(-1, vocab_size)
        return Distribution.from_logits(torch.from_numpy(values_SV.astype(np.float32)))
