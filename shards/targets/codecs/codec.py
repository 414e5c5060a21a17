"""What a codec is: three steps, and what config, plan and proofs read of it. A codec is one file beside this.

`capture` runs where the logits are, `encode` on the host, `read` in the training run. A payload describes itself, so
reading needs nothing else; it has no checksum, the record's file has one. Knows no tar, no sample and no teacher, and
imports no torch, as what a config may say is read from here: a codec's file imports torch where it computes.

S supervised positions, V vocabulary, D LLM width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from shards.targets.codecs.bitpack import Reader
    from shards.targets.distributions import Distribution, HiddenStates


class Codec(ABC):
    """How a teacher's distribution at S positions becomes bytes and comes back; a frozen dataclass of its parameters.

    Attributes:
        name: in a config and in every payload.
        version: the version of its payloads' layout, which is read by no program of another.
        settings: the fields of the config's cache section that it reads.
        error: the largest total variation of a position that its rounding causes, at float32.
        tried: settings that `distill plan` measures.
        is_advised: whether the plan may advise it.
        is_random: whether it draws, so that it is right on average only.
        needs_head: whether it keeps what enters the teacher's head, which then lies in the cache.
        keeps_all: whether nothing is outside what it keeps, so that it serves every temperature.
        kl_kinds: the divergences (`loss.kl_kind`) that its targets can tell; None: all.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 2
    settings: ClassVar[tuple[str, ...]] = ()
    error: ClassVar[float]
    tried: ClassVar[tuple[Mapping[str, object], ...]] = ({},)
    is_advised: ClassVar[bool] = True
    is_random: ClassVar[bool] = False
    needs_head: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = False
    kl_kinds: ClassVar[tuple[str, ...] | None] = None

    @classmethod
    def of(cls, cache) -> Self:
        """The codec as a config's cache section asks for it."""
        return cls(**{name: getattr(cache, name) for name in cls.settings})

    def serves(self, temperature: float) -> bool:
        """Whether its targets hold at a temperature."""
        return self.keeps_all

    def tells(self, kl_kind: str, temperature: float) -> bool:
        """Whether a divergence can be taken of its targets at a temperature."""
        return (self.kl_kinds is None or kl_kind in self.kl_kinds) and self.serves(temperature)

    @abstractmethod
    def plain(self, probs_V: np.ndarray) -> np.ndarray:
        """Which ids of one position are kept, or may be drawn: its definition, written a second time, for the proofs.

        Args:
            probs_V: the teacher's probabilities, float64.

        Returns:
            bool of V ids. Of the probabilities of these, and of the mass of the others together, what comes back is off
            by `error` at most.
        """

    @abstractmethod
    def capture(
        self, logits_SV: Tensor, hidden_SD: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """What `encode` needs, computed where the logits are.

        Args:
            logits_SV: of the teacher, any float type.
            hidden_SD: what enters its head; given to codecs that need it.
            generator: for a random codec, of the CPU and seeded by the sample: a repeated job draws the same anywhere.
        """

    @abstractmethod
    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """The payload of what `capture` returned, as numpy arrays."""

    @staticmethod
    @abstractmethod
    def read(
        reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]
    ) -> Distribution | HiddenStates:
        """The payloads of one layout, after their headers.

        Args:
            reader: stands behind the headers.
            sizes: positions of each payload.
            vocab_size, parameters: as the header has them.
        """
