"""Cross-entropy and the divergences between student and teacher, as plain functions of supervised positions.

Everything is float32 (float64 stays float64) and unreduced: one value a position. There is no mask, no ignored label
and no weight here; the caller selects positions, weighs and sums. `fused.py` computes the same without the logits.

A divergence is a function of two natural log-probabilities that gives each token's term; its sum over the tokens is
the divergence. A target kind decides which tokens those are: the whole vocabulary (dense), the kept ids and one bucket
that holds everything else (top-K), or draws from the teacher (sampled).

Shapes: S supervised positions, V vocabulary, K kept or drawn teacher tokens, C = K + 1 (the kept ids and the bucket).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.targets.distributions import Sparse

Divergence = Callable[[Tensor, Tensor], Tensor]


def widen(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 when it already is."""
    return x if x.dtype == torch.float64 else x.float()


def ce(logits_SV: Tensor, labels_S: Tensor) -> Tensor:
    """Cross-entropy of each label under the student.

    Returns:
        ce_S, nats a position.
    """
    return F.cross_entropy(widen(logits_SV), labels_S, reduction="none")


def expect(logweight: Tensor, value: Tensor) -> Tensor:
    """`exp(logweight) * value`, and zero, as its gradient, where the weight is zero, whatever the value is there."""
    is_there = logweight > -torch.inf
    product = logweight.where(is_there, 0).exp() * value.where(is_there, 0)
    return product.where(is_there, 0)


def log_mixture(student: Tensor, teacher: Tensor, teacher_share: float) -> Tensor:
    """`log(share * teacher + (1 - share) * student)`; zero where both are empty, which no term looks at."""
    is_empty = (student == -torch.inf) & (teacher == -torch.inf)
    return torch.logaddexp(
        student.where(~is_empty, 0) + torch.tensor(1 - teacher_share, dtype=student.dtype).log(),
        teacher.where(~is_empty, 0) + torch.tensor(teacher_share, dtype=student.dtype).log(),
    )


def forward_kl_terms(student: Tensor, teacher: Tensor) -> Tensor:
    """Terms of KL(teacher‖student), Hinton et al. 2015."""
    return expect(teacher, teacher - student)


def reverse_kl_terms(student: Tensor, teacher: Tensor) -> Tensor:
    """Terms of KL(student‖teacher), MiniLLM (Gu et al. 2024); infinite where only the teacher has no mass."""
    return expect(student, student - teacher)


def jsd_terms(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Terms of the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024).

    With M = beta * teacher + (1 - beta) * student it is beta * KL(teacher‖M) + (1 - beta) * KL(student‖M).
    """
    mixture = log_mixture(student, teacher, beta)
    return beta * expect(teacher, teacher - mixture) + (1 - beta) * expect(student, student - mixture)


def skewed_kl_terms(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Terms of KL(teacher‖alpha * teacher + (1 - alpha) * student), DistiLLM (Ko et al. 2024)."""
    return expect(teacher, teacher - log_mixture(student, teacher, alpha))


def skewed_reverse_kl_terms(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Terms of KL(student‖alpha * student + (1 - alpha) * teacher), DistiLLM; finite where the teacher has no mass."""
    return expect(student, student - log_mixture(student, teacher, 1 - alpha))


def total_variation_terms(student: Tensor, teacher: Tensor) -> Tensor:
    """Terms of the total variation distance, half the L1 distance (Wen et al. 2023)."""
    return 0.5 * (student.exp() - teacher.exp()).abs()


DIVERGENCES = {
    "forward_kl": forward_kl_terms,
    "reverse_kl": reverse_kl_terms,
    "jsd": jsd_terms,
    "skewed_kl": skewed_kl_terms,
    "skewed_reverse_kl": skewed_reverse_kl_terms,
    "total_variation": total_variation_terms,
}
PARAMETERS = {"jsd": "beta", "skewed_kl": "alpha", "skewed_reverse_kl": "alpha"}


def build_divergence(kind: str, parameter: float | None = None) -> Divergence:
    """The divergence of a name, its parameter fixed.

    Args:
        kind: a key of `DIVERGENCES`.
        parameter: beta of `jsd`, alpha of the skewed ones, strictly between 0 and 1; None for the others.

    Raises:
        ValueError: the name is unknown, or the parameter is missing, superfluous or out of range.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence is {kind!r}, but it must be one of {', '.join(DIVERGENCES)}; correct the name.")
    if kind not in PARAMETERS:
        if parameter is not None:
            raise ValueError(f"parameter of {kind} is {parameter}, but {kind} takes none; leave it out.")
        return DIVERGENCES[kind]
    name = PARAMETERS[kind]
    if parameter is None or not 0 < parameter < 1:
        raise ValueError(
            f"{name} of {kind} is {parameter}, but it must lie strictly between 0 and 1; "
            f"at the ends use forward_kl or reverse_kl."
        )
    return partial(DIVERGENCES[kind], **{name: parameter})


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

    The others are one more outcome on both sides, so nothing is renormalised and the divergence is zero exactly when
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
