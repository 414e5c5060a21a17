"""What a term of the loss is, what it sees of a micro-batch, and what a term of one's own gives back.

A term is the mean of its values over its own elements of a whole step, over micro-batches and ranks. It knows which
elements it has and what each is worth; weights, schedules, counts, the log and the report are loops over terms.

Importing this, and every term, costs no torch: a config's rules read names and needs here. What computes is imported
where it computes.

Shapes: B batch, S supervised positions, X elements of a term, V vocabulary, D LLM width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from distill.objective.terms.needs import Held
from shards.targets.header import HEAD_INPUT

if TYPE_CHECKING:
    from torch import Tensor, nn

    from teachers.salmonn import Heard, Salmonn
    from teachers.targets import Targets
    from teachers.words.batch import Batch

# What a step's record has beside its terms, whose names are others
RECORD = ("step", "loss", "learning_rate", "grad_norm", "grad_limit", "skipped", "returns", "agreement",
          "positions", "audio_seconds", "seconds", "tokens_per_second", "audio_hours_per_hour", "waiting", "mfu",
          "agreeing", "compared", "stop")  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """One micro-batch as the student saw it, with gradients."""

    student: "Salmonn"
    batch: "Batch"
    heard: "Heard"  # the Q-Former's queries
    hidden_SD: "Tensor"  # what enters the head
    targets: "Targets | None"  # the teacher's; None: there is no teacher, or the batch only keeps the ranks in step
    loss: object  # the settings, a LossConfig
    blocks: "Mapping[int, Tensor]"  # outputs of the LLM's blocks that a term asked for, by number: [B, T, D]
    projectors: "Mapping[str, nn.Module]"  # learned maps to the teacher's widths, by the names of `Term.projections`
    routing: "Sequence[Tensor]" = ()  # logits of a mixture's routers, layer by layer, that a term asked for: [B*T, E]

    @cached_property
    def logits_SV(self) -> "Tensor":
        """The student's logits at the supervised positions, float32; the built-in terms never hold them all."""
        from teachers.logits import head_logits

        return head_logits(self.student.llm, self.hidden_SD)

    def states(self, layer: int) -> "Tensor":
        """The hidden states of a layer at the supervised positions, [S, D]."""
        return self.hidden_SD if layer == HEAD_INPUT else self.blocks[layer].flatten(0, 1)[self.batch.predicting_S]

    def project(self, name: str, x: "Tensor") -> "Tensor":
        """Features of the student at the teacher's width, float32."""
        return self.projectors[name](x.float()) if name in self.projectors else x.float()


class Term(ABC):
    """A term of the loss; what stands here is that of one with an element a supervised position and no teacher.

    A term is a `SeenTerm`, which computes its values, or a `HeadTerm`, whose values the head's pass finds.
    `m` is a micro-batch (`weighing.MicroBatch`), `loss` the settings, a LossConfig, whose field of the term's name is
    its weight.
    """

    title = ""  # of its curve; empty: its name
    weight: float | None = None  # where LossConfig has no field of its name
    needs_teacher = False  # whether there is nothing of it where no teacher speaks
    only_crossed = False  # whether it is there only where teacher and student have other tokenizers
    needs_routing = False  # whether it looks at the logits of a mixture's routers
    depends_on_split = False  # whether its values depend on what else is in their micro-batch
    settings: Collection[str] = ()  # fields of LossConfig that nothing reads where it has no weight

    @property
    @abstractmethod
    def is_of_head(self) -> bool:
        """Whether its values come out of the head's one pass over the vocabulary."""

    @property
    def identity(self) -> dict:
        """What must stay as it was for a run to go on, of a term that LossConfig does not know."""
        return {"weight": self.weight, "value": type(self).__qualname__}

    def lacks(self, loss, held: Held) -> str | None:
        """Why targets that hold no more cannot serve it, and what to do, as an error says it; None: they can."""
        return None

    def lacks_in(self, student: "Salmonn") -> str | None:
        """Why a student has nothing that could follow it, and what to do, as an error says it; None: it has."""
        return None

    def rows(self, m) -> "Tensor":
        """The batch row of each of its elements: row_X."""
        return m.batch.row_S

    def count(self, m) -> int:
        """How many elements it is the mean of."""
        return len(self.rows(m))

    def factors(self, m, loss) -> list[float]:
        """What it counts on each sample, beside the sample's own weight."""
        return [1.0] * len(m.batch.samples)

    def layers(self, loss) -> Collection[int]:
        """The student's LLM blocks whose outputs it looks at, from 1."""
        return ()

    def projections(self, student: "Salmonn", loss) -> dict[str, tuple[str, int]]:
        """The features that it compares with the teacher's: by a name of one's own, the distance and their width."""
        return {}


class HeadTerm(Term):
    """A term whose values come out of the head's one pass over the vocabulary, see `module.Objective`."""

    is_of_head = True


class SeenTerm(Term):
    """A term whose values are computed from what the student saw."""

    is_of_head = False

    @abstractmethod
    def values(self, seen: Seen) -> "Tensor":
        """Its value at each element, differentiable in the student, float32: value_X."""


@dataclass(frozen=True)
class OwnTerm(SeenTerm):
    """A term of one's own, with one value a supervised position.

    Attributes:
        weight: what the mean counts in the loss.
        value: gives one value a supervised position, value_S, differentiable in the student.
    """

    weight: float = field()  # without the default of a `Term`
    value: "Callable[[Seen], Tensor]"

    @property
    def identity(self) -> dict:
        """Its weight and the name of its function."""
        return {
            "weight": self.weight,
            "value": getattr(self.value, "__qualname__", type(self.value).__qualname__),
        }

    def values(self, seen: Seen) -> "Tensor":
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
