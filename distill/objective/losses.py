"""Cross-entropy and the divergences between student and teacher, as plain functions of supervised positions.

Everything is float32 (float64 stays float64) and unreduced: one value a position. There is no mask, no ignored label
and no weight here; the caller selects positions, weighs and sums. `fused.py` computes the same without the logits.

A divergence (`divergences`) gives each token's term; a target kind decides which tokens those are: the whole vocabulary
(dense), the kept ids and one bucket that holds everything else (top-K), or draws from the teacher (sampled).

Shapes: S supervised positions, V vocabulary, K kept or drawn teacher tokens, C = K + 1 (the kept ids and the bucket).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objective.divergences import Divergence, forward_kl_terms
from distill.objective.numerics import widen
from shards.targets.distributions import Sparse


def ce(logits_SV: Tensor, labels_S: Tensor) -> Tensor:
    """Cross-entropy of each label under the student.

    Returns:
        ce_S, nats a position.
    """
    return F.cross_entropy(widen(logits_SV), labels_S, reduction="none")


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a positive number.

    Raises:
        ValueError: it is zero, negative, infinite or NaN.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, but it must be positive and finite; use 1 to 4.")


def dense_divergence(
    logits_SV: Tensor, teacher_logits_SV: Tensor, temperature: float, divergence: Divergence = forward_kl_terms
) -> Tensor:
    """Divergence from a teacher whose whole distribution is known.

    Args:
        logits_SV: the student's logits; only real tokens, see `vocabulary.py` for padded heads.
        teacher_logits_SV: the teacher's logits, or its log-probabilities: a constant a position does not matter.
        temperature: divides both logits; the value is multiplied by its square, and so is the gradient.

    Returns:
        divergence_S, nats times temperature².
    """
    check_temperature(temperature)
    student_SV = (widen(logits_SV) / temperature).log_softmax(-1)
    teacher_SV = (widen(teacher_logits_SV) / temperature).log_softmax(-1)
    return temperature**2 * divergence(student_SV, teacher_SV).sum(-1)


def bucket_logprobs(logits_SV: Tensor, ids_SK: Tensor, is_kept_SK: Tensor) -> Tensor:
    """Log-probabilities of the kept ids, and of all others together in the last column; -inf in unused slots.

    The bucket is a log-sum-exp over the other ids: `1 - sum of the kept` loses a small mass to rounding.
    """
    ids_SK = ids_SK.where(is_kept_SK, 0)
    kept_SK = logits_SV.gather(1, ids_SK).masked_fill(~is_kept_SK, -torch.inf)
    is_kept_SV = torch.zeros_like(logits_SV).scatter_add_(1, ids_SK, is_kept_SK.to(logits_SV.dtype)) > 0
    has_others_S1 = ~is_kept_SV.all(1, keepdim=True)
    others_SV = logits_SV.masked_fill(is_kept_SV & has_others_S1, -torch.inf)
    others_S1 = others_SV.logsumexp(1, keepdim=True).masked_fill(~has_others_S1, -torch.inf)
    return torch.cat([kept_SK, others_S1], 1) - logits_SV.logsumexp(1, keepdim=True)


def bucket_divergence(student_SC: Tensor, teacher: Sparse, temperature: float, divergence: Divergence) -> Tensor:
    """Divergence of the kept ids and the bucket, times temperature²; both sides at the temperature already."""
    # A student without ids outside the kept ones has nowhere to put the rounding residue of the teacher's mass.
    residual_S = teacher.log_residual_S.masked_fill(student_SC[:, -1] == -torch.inf, -torch.inf)
    teacher_SC = torch.cat([teacher.logprobs_SK, residual_S[:, None]], 1).to(student_SC.dtype)
    return temperature**2 * divergence(student_SC, teacher_SC).sum(-1)


def move_into_bucket(teacher: Sparse, is_kept_SK: Tensor) -> Sparse:
    """A top-K target without some of its ids, whose mass has gone to that outside."""
    lost_SK = teacher.logprobs_SK.masked_fill(is_kept_SK, -torch.inf)
    residual_S = torch.cat([teacher.log_residual_S[:, None], lost_SK], 1).logsumexp(1)
    return Sparse(teacher.ids_SK, teacher.logprobs_SK.masked_fill(~is_kept_SK, -torch.inf), residual_S)


def sparse_divergence(
    logits_SV: Tensor, teacher: Sparse, temperature: float, divergence: Divergence = forward_kl_terms
) -> Tensor:
    """Divergence from a teacher of which K tokens and the mass of all others are known.

    The others are one more outcome on both sides, so nothing is renormalized and the divergence is zero exactly when
    the student gives the kept tokens the teacher's probabilities.

    Args:
        logits_SV: the student's logits at temperature 1.
        teacher: at `temperature`. Draws are kept ids with log-weights and no mass outside: their forward KL has the
            gradient of `sampled_divergence`.
        temperature: divides the student's logits; the value is multiplied by its square, and so is the gradient.

    Returns:
        divergence_S, nats times temperature².
    """
    check_temperature(temperature)
    student_SC = bucket_logprobs(widen(logits_SV) / temperature, teacher.ids_SK, teacher.logprobs_SK > -torch.inf)
    return bucket_divergence(student_SC, teacher, temperature, divergence)


def forward_kl(logits_SV: Tensor, teacher: Sparse, temperature: float) -> Tensor:
    """KL(teacher‖student) on top-K targets with the residual bucket; arguments as `sparse_divergence`."""
    return sparse_divergence(logits_SV, teacher, temperature, forward_kl_terms)


def sampled_divergence(
    logits_SV: Tensor,
    ids_SK: Tensor,
    weights_SK: Tensor,
    logprobs_SK: Tensor,
    temperature: float,
    divergence: Divergence = forward_kl_terms,
) -> Tensor:
    """Unbiased estimate of a divergence from draws of the teacher (random-sampled KD, Anshumann et al. 2025).

    Args:
        ids_SK: the drawn ids.
        weights_SK: what each draw counts, such that the sum of `weight * f(id)` expects to the teacher's mean of f at
            `temperature`: its share of the draws when they came from the teacher itself; 0 in an unused slot.
        logprobs_SK: the teacher's log-probability of each drawn id at `temperature`.
        temperature: divides the student's logits; the value is multiplied by its square, and so is the gradient.

    Returns:
        divergence_S, nats times temperature². A reverse divergence misses the tokens the teacher never draws.
    """
    check_temperature(temperature)
    is_drawn_SK = weights_SK > 0
    student_SV = (widen(logits_SV) / temperature).log_softmax(-1)
    student_SK = student_SV.gather(1, ids_SK.where(is_drawn_SK, 0))
    teacher_SK = logprobs_SK.to(student_SV.dtype).where(is_drawn_SK, 0)
    terms_SK = divergence(student_SK, teacher_SK) / teacher_SK.exp()
    return temperature**2 * (weights_SK * terms_SK).where(is_drawn_SK, 0).sum(-1)
