"""A loss term of one's own: what it may look at, and what it gives back. Knows no other term.

Shapes: S supervised positions, V vocabulary, D LLM width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from distill.objective.schedule import TERMS
from teachers.logits import head_logits
from teachers.salmonn import Heard, Salmonn
from teachers.targets import Targets
from teachers.words.batch import Batch

RECORD = ("step", "loss", "learning_rate", "grad_norm", "positions", "audio_seconds", "seconds", "stop")  # of a step


@dataclass(frozen=True)
class Seen:
    """One micro-batch as the student saw it, with gradients."""

    student: Salmonn
    batch: Batch
    heard: Heard  # the Q-Former's queries
    hidden_SD: Tensor  # what enters the head
    targets: Targets | None  # the teacher's; None: there is no teacher, or the batch only keeps the ranks in step

    @cached_property
    def logits_SV(self) -> Tensor:
        """The student's logits at the supervised positions, float32; the built-in terms never hold them all."""
        return head_logits(self.student.llm, self.hidden_SD)


@dataclass(frozen=True)
class OwnTerm:
    """A term of the objective: its mean over all supervised positions of a step, over micro-batches and ranks.

    Attributes:
        weight: what the mean counts in the loss.
        value: gives one value a supervised position, value_S, differentiable in the student.
    """

    weight: float
    value: Callable[[Seen], Tensor]

    def __call__(self, seen: Seen) -> Tensor:
        """Its values, value_S.

        Raises:
            ValueError: they are not one a position.
        """
        value_S = self.value(seen)
        if value_S.shape != seen.batch.labels_S.shape:
            raise ValueError(
                f"values of an own term have shape {tuple(value_S.shape)}, but a micro-batch of "
                f"{seen.batch.num_supervised} supervised positions needs {tuple(seen.batch.labels_S.shape)}; give one "
                f"a position."
            )
        return value_S.float()


def check_own(terms: dict[str, OwnTerm]) -> None:
    """Refuse names that are taken, weights that cannot be, and what is no term.

    Raises:
        ValueError: naming the term.
    """
    for name, term in terms.items():
        if name in TERMS or name in RECORD:
            raise ValueError(f"terms names {name!r}, but that name is taken; choose another.")
        if not isinstance(term, OwnTerm):
            raise ValueError(f"terms[{name!r}] is {term!r}, but must be an OwnTerm; give OwnTerm(weight, function).")
        if not 0 <= term.weight < float("inf"):
            raise ValueError(f"terms[{name!r}].weight is {term.weight}, but a weight is 0 or more; correct it.")
