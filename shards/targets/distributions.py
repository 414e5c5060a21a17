"""What a teacher says about supervised positions, as the losses read it. Knows no file, no codec and no teacher.

S supervised positions, K kept ids, V vocabulary, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


def log1mexp(log_x: Tensor) -> Tensor:
    """`log(1 - exp(log_x))` for `log_x <= 0`, exact at both ends (Maechler 2012, the note on log1mexp)."""
    log_x = log_x.clamp(max=0)
    return torch.where(log_x > -0.6931472, torch.log(-torch.expm1(log_x)), torch.log1p(-torch.exp(log_x)))


class Sparse(NamedTuple):
    """A distribution at one temperature: the kept ids of each position, and one outcome more for all others together.

    Attributes:
        ids_SK: kept ids, each at most once a position; in an unused slot anything.
        logprobs_SK: their natural log-probabilities; -inf in unused slots.
        log_residual_S: natural log of the mass outside them; -inf for none.
    """

    ids_SK: Tensor
    logprobs_SK: Tensor
    log_residual_S: Tensor


@dataclass
class Distribution:
    """The K most telling log-probabilities of each position and the mass outside them, at the temperatures it can tell.

    Attributes:
        ids_SK: kept ids, in any order, distinct within a position; 0 in unused slots.
        logprobs_SK: their natural log-probabilities at temperature 1, float32; -inf in unused slots.
        log_partition_S: for each stored temperature T, `log sum_V exp(logprob / T)` (zeros at 1); empty for a complete
            distribution, which keeps all V ids and serves any temperature.
        vocab_size: V.
        log_residual_S: for each temperature at which it was measured, the log of the mass outside the K ids; where it
            is missing, it is one minus the kept mass, which float32 knows to 1e-7 only.
    """

    ids_SK: Tensor
    logprobs_SK: Tensor
    log_partition_S: dict[float, Tensor]
    vocab_size: int
    log_residual_S: dict[float, Tensor] = field(default_factory=dict)

    @classmethod
    def from_logits(
        cls, logits_SV: Tensor, k: int | None = None, temperatures: Sequence[float] = (1.0,)
    ) -> "Distribution":
        """Keep the k most probable ids of each position, all V if k is None, and measure the rest.

        Args:
            logits_SV: unnormalized, any float type; -inf where an id is impossible.
            k: ids to keep, at most V.
            temperatures: those the targets shall serve; a complete distribution (k = V) serves all.
        """
        vocab_size = logits_SV.shape[-1]
        logprobs_SV = torch.log_softmax(logits_SV.float(), -1)
        if k is None or k >= vocab_size:
            ids_SK = torch.arange(vocab_size, device=logits_SV.device).expand(logits_SV.shape[0], -1)
            return cls(ids_SK, logprobs_SV, {}, vocab_size)
        logprobs_SK, ids_SK = logprobs_SV.topk(k, -1)
        log_partition_S = {
            t: torch.logsumexp(logprobs_SV / t, -1) if t != 1 else logprobs_SV.new_zeros(len(logprobs_SV))
            for t in temperatures
        }
        # summed over what is outside: one minus the rest would leave only rounding where the teacher is sure
        rest_SV = logprobs_SV.scatter_(-1, ids_SK, -torch.inf)
        log_residual_S = {t: torch.logsumexp(rest_SV / t, -1) - log_partition_S[t] for t in temperatures}
        ids_SK = ids_SK.masked_fill(logprobs_SK == -torch.inf, 0)
        return cls(ids_SK, logprobs_SK, log_partition_S, vocab_size, log_residual_S)

    @property
    def is_complete(self) -> bool:
        """Whether all V ids are kept, so that nothing is outside at any temperature."""
        return not self.log_partition_S

    def at(self, temperature: float) -> Sparse:
        """The distribution with logits divided by `temperature`; its masses sum to 1, with no residual where K = V.

        Raises:
            ValueError: the targets do not hold what this temperature needs.
        """
        if self.is_complete:
            logprobs_SK = torch.log_softmax(self.logprobs_SK / temperature, -1)
            return Sparse(self.ids_SK, logprobs_SK, logprobs_SK.new_full((len(logprobs_SK),), -torch.inf))
        if temperature not in self.log_partition_S:
            raise ValueError(
                f"temperature is {temperature}, but these targets were stored for {sorted(self.log_partition_S)}; "
                f"train at one of them or cache again with cache.temperatures that name it."
            )
        logprobs_SK = self.logprobs_SK / temperature - self.log_partition_S[temperature][:, None]
        if temperature in self.log_residual_S:
            return Sparse(self.ids_SK, logprobs_SK, self.log_residual_S[temperature])
        return Sparse(self.ids_SK, logprobs_SK, log1mexp(torch.logsumexp(logprobs_SK, -1)))

    def to(self, device: torch.device | str) -> "Distribution":
        """The same on another device."""
        return Distribution(
            self.ids_SK.to(device, non_blocking=True),
            self.logprobs_SK.to(device, non_blocking=True),
            {t: x_S.to(device, non_blocking=True) for t, x_S in self.log_partition_S.items()},
            self.vocab_size,
            {t: x_S.to(device, non_blocking=True) for t, x_S in self.log_residual_S.items()},
        )

    @classmethod
    def concatenate(cls, distributions: Sequence["Distribution"]) -> "Distribution":
        """Several samples' positions as one batch's; the temperatures are those that all of them hold.

        Raises:
            ValueError: the vocabularies differ, or only some are complete.
        """
        first = distributions[0]
        for other in distributions:
            if (other.vocab_size, other.is_complete) != (first.vocab_size, first.is_complete):
                raise ValueError(
                    f"vocab_size is {other.vocab_size} (complete: {other.is_complete}), but the batch began with "
                    f"{first.vocab_size} (complete: {first.is_complete}); do not mix caches in one batch."
                )
        width = max(d.ids_SK.shape[-1] for d in distributions)
        pad = torch.nn.functional.pad
        return cls(
            torch.cat([pad(d.ids_SK, (0, width - d.ids_SK.shape[-1])) for d in distributions]),
            torch.cat(
                [pad(d.logprobs_SK, (0, width - d.logprobs_SK.shape[-1]), value=-torch.inf) for d in distributions]
            ),
            _concatenate_shared([d.log_partition_S for d in distributions]),
            first.vocab_size,
            _concatenate_shared([d.log_residual_S for d in distributions]),
        )


def _concatenate_shared(by_temperature: list[dict[float, Tensor]]) -> dict[float, Tensor]:
    """Join the values of the temperatures that every dict holds."""
    shared = set(by_temperature[0]).intersection(*by_temperature[1:])
    return {t: torch.cat([values[t] for values in by_temperature]) for t in sorted(shared)}


@dataclass
class HiddenStates:
    """What the `hidden` codec decodes to: the input of the teacher's head. With the head it reads as a `Distribution`.

    Attributes:
        hidden_SD: float32, after the last norm; each value off by at most `max / 254` of its group of 128 dimensions.
        vocab_size: rows of the head.
        head_weight_VD: the teacher's head, in any float type; None until `with_head`.
        softcap: c of `c * tanh(logits / c)`, applied last; None: none.
        logit_scale: multiplies the head's product.
    """

    hidden_SD: Tensor
    vocab_size: int
    head_weight_VD: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def concatenate(cls, parts: Sequence["HiddenStates"]) -> "HiddenStates":
        """Several samples' positions as one batch's."""
        return replace(parts[0], hidden_SD=torch.cat([part.hidden_SD for part in parts]))

    def to(self, device: torch.device | str) -> "HiddenStates":
        """The same on another device."""
        head_VD = self.head_weight_VD
        head_VD = head_VD if head_VD is None else head_VD.to(device, non_blocking=True)
        return replace(self, hidden_SD=self.hidden_SD.to(device, non_blocking=True), head_weight_VD=head_VD)

    def with_head(self, head_weight_VD: Tensor, *, softcap: float | None = None,
                  logit_scale: float = 1.0) -> "HiddenStates":  # fmt: skip
        """The same with the teacher's head, and what its LLM does to the product.

        Raises:
            ValueError: the head is of another vocabulary.
        """
        if len(head_weight_VD) != self.vocab_size:
            raise ValueError(
                f"head has {len(head_weight_VD)} rows, but the cached teacher's {self.vocab_size}; load the head of "
                f"the teacher that made the cache."
            )
        return replace(self, head_weight_VD=head_weight_VD, softcap=softcap, logit_scale=logit_scale)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is outside the kept ids: always, all V are there."""
        return True

    @property
    def ids_SK(self) -> Tensor:
        """All V ids, at every position."""
        return torch.arange(self.vocab_size, device=self.hidden_SD.device).expand(len(self.hidden_SD), -1)

    def logits(self) -> Tensor:
        """The teacher's logits at temperature 1, S by V, float32."""
        logits_SV = (self.hidden_SD.to(self.head_weight_VD) @ self.head_weight_VD.T).float() * self.logit_scale
        return logits_SV if self.softcap is None else self.softcap * torch.tanh(logits_SV / self.softcap)

    def at(self, temperature: float) -> Sparse:
        """As `Distribution.at`: log-probabilities of all V ids at any temperature, and no mass outside."""
        logprobs_SV = torch.log_softmax(self.logits() / temperature, -1)
        return Sparse(self.ids_SK, logprobs_SV, logprobs_SV.new_full((len(logprobs_SV),), -torch.inf))
