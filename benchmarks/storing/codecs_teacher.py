"""The synthetic teacher of `codecs.py`, and how far what a codec decodes is from it.

S positions, V vocabulary, K kept ids, D width.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distill.caching.fidelity import kl_gradient
from shards.targets.distributions import Distribution

WIDTH = 3072  # of the hidden state, Llama 3.2 3B's


def make_teacher(vocab_size: int, num_positions: int, seed: int = 0) -> Tensor:
    """Log-probabilities, S by V."""
    generator = torch.Generator().manual_seed(seed)
    log_rank_V = torch.arange(1, vocab_size + 1).float().log()
    places_V = torch.randperm(vocab_size, generator=generator)
    logits_SV = torch.empty(num_positions, vocab_size)
    for position in range(num_positions):
        exponent = 1.5 + torch.rand((), generator=generator)
        logits_V = -exponent * log_rank_V + 0.3 * torch.randn(vocab_size, generator=generator)
        if position % 2 == 0:
            doubt = 10 ** -(1.5 + 3.5 * torch.rand((), generator=generator).item())
            logits_V[0] = torch.logsumexp(logits_V[1:], 0) + math.log((1 - doubt) / doubt)
        shift = int(torch.randint(vocab_size, (), generator=generator))
        logits_SV[position, places_V.roll(shift)] = logits_V
    return torch.log_softmax(logits_SV, -1)


def make_hidden(vocab_size: int, num_positions: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states and a head that makes peaked logits of them; four dimensions are outliers, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    head_VD = torch.randn(vocab_size, WIDTH, generator=generator)
    heights_SK = 18 - torch.linspace(1.5, 2.5, num_positions)[:, None] * torch.arange(1, 65).log()
    heights_SK[::2, 0] += 5
    ids_SK = torch.stack([torch.randperm(vocab_size, generator=generator)[:64] for _ in range(num_positions)])
    hidden_SD = torch.einsum("skd,sk->sd", head_VD[ids_SK], heights_SK) / WIDTH
    head_VD[:, :4] /= 8
    hidden_SD[:, :4] *= 8
    return hidden_SD, head_VD


def kl_to_dense(distribution: Distribution, logprobs_SV: Tensor) -> Tensor:
    """KL(decoded ‖ dense) of each position, nats, over the kept ids and the bucket of the others."""
    logprobs_SK, log_residual_S = (values.double() for values in distribution.at(1.0)[1:])
    dense_SV = torch.log_softmax(logprobs_SV.double(), -1)
    exact_SK = dense_SV.gather(1, distribution.ids_SK)
    is_used_SK = logprobs_SK > -torch.inf
    kept_S = (logprobs_SK.exp() * (logprobs_SK - exact_SK)).masked_fill(~is_used_SK, 0).sum(1)
    is_kept_SV = torch.zeros_like(dense_SV).scatter_add_(1, distribution.ids_SK, is_used_SK.double()) > 0
    exact_residual_S = dense_SV.exp().masked_fill(is_kept_SV, 0).sum(1)
    residual_S = log_residual_S.exp()
    return kept_S + torch.where(residual_S > 0, residual_S * (log_residual_S - exact_residual_S.log()), 0)


def measure_error(pieces: Iterator[tuple[Distribution, Tensor, Tensor]]) -> dict[str, float]:
    """Gradient and divergence of decoded distributions against the dense log-probabilities and for a student."""
    error = product = decoded_norm = dense_norm = divergence = count = 0.0
    for distribution, logprobs_SV, student_SV in pieces:
        decoded_SV = kl_gradient(distribution, student_SV)
        dense_SV = student_SV.double() - logprobs_SV.double().exp()
        error += (decoded_SV - dense_SV).square().sum().item()
        product += (decoded_SV * dense_SV).sum().item()
        decoded_norm += decoded_SV.square().sum().item()
        dense_norm += dense_SV.square().sum().item()
        divergence += kl_to_dense(distribution, logprobs_SV).sum().item()
        count += len(logprobs_SV)
    return {
        "gradient_cosine": product / math.sqrt(decoded_norm * dense_norm),
        "gradient_error": math.sqrt(error / dense_norm),
        "kl_to_dense": divergence / count,
    }
