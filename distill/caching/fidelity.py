"""How much of a teacher a codec keeps: its divergence from the dense distribution, and the gradient it gives instead.

Everything is summed in float64 over positions, so that measurements of many batches are those of one.

Shapes: S supervised positions, K kept ids, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.targets.distributions import Distribution, HiddenStates


def noisy_probs(logprobs_SV: Tensor, seed: int = 1, temperature: float = 1.0) -> Tensor:
    """Probabilities of a student on its way to the teacher, S by V, at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    noise_SV = torch.randn(logprobs_SV.shape, generator=generator).to(logprobs_SV.device)
    return torch.softmax((0.9 * logprobs_SV + 0.5 * noise_SV) / temperature, -1)


def kl_gradient(target: Distribution | HiddenStates, student_SV: Tensor, temperature: float = 1.0) -> Tensor:
    """Gradient of the forward KL, with one bucket for all ids that are not kept, by the student's logits.

    The factor that the temperature puts before it is left out.
    """
    logprobs_SK, log_residual_S = (values.double() for values in target.at(temperature)[1:])
    student_SV = student_SV.double()
    target_SV = torch.zeros_like(student_SV).scatter_add_(1, target.ids_SK, logprobs_SK.exp())
    outside_SV = student_SV.masked_fill(target_SV > 0, 0)
    residual_S1, outside_S1 = log_residual_S.exp()[:, None], outside_SV.sum(1, keepdim=True)
    target_SV += outside_SV * torch.where(outside_S1 > 0, residual_S1 / outside_S1, 0)
    return student_SV * target_SV.sum(1, keepdim=True) - target_SV


def kl_from_dense(target: Distribution | HiddenStates, logprobs_SV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(dense‖decoded) of each position, nats, over the kept ids and the bucket of the others."""
    logprobs_SK, log_residual_S = (values.double() for values in target.at(temperature)[1:])
    dense_SV = torch.log_softmax(logprobs_SV.double() / temperature, -1)
    exact_SK = dense_SV.gather(1, target.ids_SK)
    is_used_SK = logprobs_SK > -torch.inf
    kept_S = (exact_SK.exp() * (exact_SK - logprobs_SK)).masked_fill(~is_used_SK, 0).sum(1)
    is_kept_SV = torch.zeros_like(dense_SV).scatter_add_(1, target.ids_SK, is_used_SK.double()) > 0
    outside_S = dense_SV.exp().masked_fill(is_kept_SV, 0).sum(1)
    return kept_S + torch.where(outside_S > 0, outside_S * (outside_S.log() - log_residual_S), 0)


@dataclass
class Fidelity:
    """Sums over positions, and the figures they give."""

    positions: int = 0
    mass: float = 0.0  # kept
    divergence: float = 0.0  # nats
    error: float = 0.0  # squares, and the product, of the gradients
    product: float = 0.0
    decoded: float = 0.0
    dense: float = 0.0

    def add(self, target: Distribution | HiddenStates, logprobs_SV: Tensor, temperature: float = 1.0) -> None:
        """Take in some positions: what a codec gives back, and the teacher's dense log-probabilities."""
        student_SV = noisy_probs(logprobs_SV, temperature=temperature)
        ours_SV = kl_gradient(target, student_SV, temperature)
        dense_SV = student_SV.double() - torch.softmax(logprobs_SV.double() / temperature, -1)
        self.positions += len(logprobs_SV)
        self.mass += float(target.at(1.0).logprobs_SK.exp().sum())
        self.divergence += float(kl_from_dense(target, logprobs_SV, temperature).sum())
        self.error += float((ours_SV - dense_SV).square().sum())
        self.product += float((ours_SV * dense_SV).sum())
        self.decoded += float(ours_SV.square().sum())
        self.dense += float(dense_SV.square().sum())

    @property
    def captured_mass(self) -> float:
        """Probability kept, a position."""
        return self.mass / max(1, self.positions)

    @property
    def kl(self) -> float:
        """KL(dense‖decoded), nats a position; infinite where draws missed what the teacher may say."""
        return self.divergence / max(1, self.positions)

    @property
    def gradient_cosine(self) -> float:
        """Cosine between the two gradients over all positions."""
        return self.product / max(math.sqrt(self.decoded * self.dense), 1e-300)

    @property
    def gradient_error(self) -> float:
        """Length of their difference over that of the dense one."""
        return math.sqrt(self.error / max(self.dense, 1e-300))
