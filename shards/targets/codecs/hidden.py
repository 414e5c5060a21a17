"""What enters the teacher's head, in int8: with the head, which the cache keeps once, it is every logit.

S supervised positions, V vocabulary, D LLM width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shards.targets.codecs.bitpack import Reader
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.payload import pack_header
from shards.targets.record import dequantize_rows, quantize_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shards.targets.distributions import HiddenStates

GROUP = 128  # dimensions of a hidden state that share a quantization step


@dataclass(frozen=True)
class Hidden(Codec):
    """The last hidden state as int8: 1.03 D bytes a token, every temperature, and the head to be loaded.

    A step for each 128 dimensions, not for the row: a few dimensions of a trained LLM are many times the others.
    """

    name: ClassVar[str] = "hidden"
    error: ClassVar[float] = 0.01
    needs_head: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = True

    def plain(self, probs_V: np.ndarray) -> np.ndarray:
        """All of them."""
        return np.ones(len(probs_V), bool)

    def capture(
        self, logits_SV: Tensor, hidden_SD: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """What enters the head, and the number of its rows."""
        import torch

        return {"hidden_SD": hidden_SD.float(), "vocab_size": torch.tensor(logits_SV.shape[-1])}

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        num_positions, width = captured["hidden_SD"].shape
        group = math.gcd(width, GROUP)
        quantized, scale = quantize_rows(captured["hidden_SD"].reshape(-1, group))
        header = pack_header(self, num_positions, int(captured["vocab_size"]), width, group)
        return b"".join([header, scale.astype("<f4").tobytes(), quantized.tobytes()])

    @staticmethod
    def read(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> HiddenStates:
        """The states alone; `HiddenStates.with_head` gives them the head."""
        import torch

        from shards.targets.distributions import HiddenStates

        width, group = (int(value) for value in parameters)
        scale = reader.take("<f4", [size * width // group for size in sizes])
        quantized = reader.take("i1", [size * width for size in sizes]).reshape(-1, group)
        hidden_SD = dequantize_rows(quantized, scale).reshape(-1, width)
        return HiddenStates(torch.from_numpy(hidden_SD), vocab_size)
