"""The divergences between student and teacher: one more is one function, its plain twin and one line in `DIVERGENCES`.

Each is written twice. `terms` is what trains: from two natural log-probabilities each token's term, whose sum over the
tokens is the divergence; which tokens those are is a matter of the target kind (`losses`). `plain` is the formula of
the paper, in probabilities; doctor holds the first to it, and the two share nothing.

Shapes: S positions, C outcomes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from distill.objective.numerics import expect, log_mixture

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Callable[["Tensor", "Tensor"], "Tensor"]  # its parameter fixed
TINY = 1e-300


@dataclass(frozen=True)
class DivergenceKind:
    """A divergence, which may still lack its parameter.

    Attributes:
        terms: computes it of student's and teacher's natural log-probabilities of the same tokens, one value a token.
        plain: computes it of student's and teacher's probabilities, q_SC and p_SC, one value a position.
        parameter: the paper's name of what both take beside that, strictly between 0 and 1; empty: they take nothing.
    """

    terms: Callable[..., "Tensor"]
    plain: Callable[..., "Tensor"]
    parameter: str = ""

    def check(self, name: str, value: float | None) -> None:
        """Refuse a parameter that is missing, superfluous or out of range.

        Args:
            name: the name of the divergence.
            value: the value of its parameter; None: it is not given.

        Raises:
            ValueError: naming `loss.kl_parameter`.
        """
        if not self.parameter and value is not None:
            raise ValueError(f"loss.kl_parameter is {value}, but {name} takes none; leave it out.")
        if self.parameter and (value is None or not 0 < value < 1):
            raise ValueError(
                f"loss.kl_parameter is {value}, but {name} takes one strictly between 0 and 1 (its {self.parameter}); "
                f"set it, or use forward_kl or reverse_kl."
            )


def plain_kl(a_SC: "Tensor", b_SC: "Tensor") -> "Tensor":
    """KL(a‖b) of probabilities, where 0 log 0 is 0."""
    return (a_SC * (a_SC.clamp(min=TINY).log() - b_SC.clamp(min=TINY).log())).where(a_SC > 0, 0.0).sum(-1)


def forward_kl_terms(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Terms of KL(teacher‖student), Hinton et al. 2015."""
    return expect(teacher, teacher - student)


def reverse_kl_terms(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Terms of KL(student‖teacher), MiniLLM (Gu et al. 2024); infinite where only the teacher has no mass."""
    return expect(student, student - teacher)


def jsd_terms(student: "Tensor", teacher: "Tensor", beta: float) -> "Tensor":
    """Terms of the generalized Jensen-Shannon divergence of GKD (Agarwal et al. 2024).

    With M = beta * teacher + (1 - beta) * student it is beta * KL(teacher‖M) + (1 - beta) * KL(student‖M).
    """
    mixture = log_mixture(student, teacher, beta)
    return beta * expect(teacher, teacher - mixture) + (1 - beta) * expect(student, student - mixture)


def plain_jsd(q_SC: "Tensor", p_SC: "Tensor", beta: float) -> "Tensor":
    """The same of probabilities."""
    m_SC = beta * p_SC + (1 - beta) * q_SC
    return beta * plain_kl(p_SC, m_SC) + (1 - beta) * plain_kl(q_SC, m_SC)


def skewed_kl_terms(student: "Tensor", teacher: "Tensor", alpha: float) -> "Tensor":
    """Terms of KL(teacher‖alpha * teacher + (1 - alpha) * student), DistiLLM (Ko et al. 2024)."""
    return expect(teacher, teacher - log_mixture(student, teacher, alpha))


def skewed_reverse_kl_terms(student: "Tensor", teacher: "Tensor", alpha: float) -> "Tensor":
    """Terms of KL(student‖alpha * student + (1 - alpha) * teacher), DistiLLM; finite where the teacher has no mass."""
    return expect(student, student - log_mixture(student, teacher, 1 - alpha))


def total_variation_terms(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Terms of the total variation distance, half the L1 distance (Wen et al. 2023)."""
    return 0.5 * (student.exp() - teacher.exp()).abs()


DIVERGENCES = {
    "forward_kl": DivergenceKind(forward_kl_terms, lambda q, p: plain_kl(p, q)),
    "reverse_kl": DivergenceKind(reverse_kl_terms, lambda q, p: plain_kl(q, p)),
    "jsd": DivergenceKind(jsd_terms, plain_jsd, "beta"),
    "skewed_kl": DivergenceKind(skewed_kl_terms, lambda q, p, alpha: plain_kl(p, alpha * p + (1 - alpha) * q), "alpha"),
    "skewed_reverse_kl": DivergenceKind(
        skewed_reverse_kl_terms, lambda q, p, alpha: plain_kl(q, alpha * q + (1 - alpha) * p), "alpha"
    ),
    "total_variation": DivergenceKind(total_variation_terms, lambda q, p: (p - q).abs().sum(-1) / 2),
}


def build_divergence(name: str, parameter: float | None = None, *, plain: bool = False) -> Divergence:
    """A divergence with its parameter fixed.

    Args:
        name: a key of `DIVERGENCES`.
        parameter: strictly between 0 and 1, where it takes one.
        plain: give the formula of probabilities instead of the terms.

    Raises:
        ValueError: the name is unknown, or the parameter is missing, superfluous or out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"loss.kl_kind is {name!r}, but must be one of {', '.join(DIVERGENCES)}; correct it.")
    kind = DIVERGENCES[name]
    kind.check(name, parameter)
    function = kind.plain if plain else kind.terms
    return partial(function, **{kind.parameter: parameter}) if kind.parameter else function
