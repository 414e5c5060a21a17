"""Which terms a run has, and what each element of a micro-batch counts in a step's loss. Computes no loss.

A term is the mean over its own elements of the whole step, over micro-batches and ranks. An element's weight is the
term's weight times its sample's, over that global count, so the gradient of a step does not depend on how it was split.

Shapes: B batch, X elements of a term.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.objective.schedule import Schedule
from distill.objective.terms import TERMS
from distill.objective.terms.term import RECORD, Term
from teachers.targets import Targets
from teachers.teacher import Teacher
from teachers.words.batch import Batch

Terms = Mapping[str, Term]  # by name


@dataclass(frozen=True)
class MicroBatch:
    """One backward's worth of a step, on this rank."""

    batch: Batch
    targets: Targets | None
    is_pseudo: list[bool]  # whether a sample's answer is the teacher's own
    sample_weights: list[float]  # what a sample counts in every term
    is_real: bool  # False: a silent stand-in that keeps the ranks in step
    frames: list[Tensor] | None  # of ears that teacher and student share


def present_terms(terms: Terms, targets: Targets | None) -> dict[str, Term]:
    """The terms that have something to say of a batch with these targets."""
    return {name: term for name, term in terms.items() if targets is not None or not term.needs_teacher}


def count(terms: Terms, m: MicroBatch) -> dict[str, int]:
    """How many elements each term has in a micro-batch; summed over micro-batches and ranks they divide the term."""
    here = present_terms(terms, m.targets) if m.is_real else {}
    return {name: term.count(m) if name in here else 0 for name, term in terms.items()}


def weigh(terms: Terms, m: MicroBatch, loss: LossConfig, weights: Mapping[str, float],
          totals: Mapping[str, int]) -> dict[str, Tensor]:  # fmt: skip
    """What each element of a micro-batch counts, by term: weight_X of those that have something to say of it.

    Args:
        m: a stand-in counts nothing.
        loss: the settings.
        weights: the weights of the terms at this step.
        totals: counts of the whole step over all ranks.
    """
    weight_B = torch.tensor(m.sample_weights, dtype=torch.float32, device=m.batch.labels_S.device) * float(m.is_real)
    return {
        name: (weight_B * weight_B.new_tensor(term.factors(m, loss)))[term.rows(m)]
        * (weights[name] / max(totals[name], 1))
        for name, term in present_terms(terms, m.targets).items()
    }


def active_terms(terms: Terms, schedules: Mapping[str, Schedule], teacher: Teacher) -> dict[str, Term]:
    """The terms that a run computes: those whose weight is not 0 throughout, and that its teacher can serve."""
    return {
        name: term
        for name, term in terms.items()
        if schedules[name].is_ever_above_zero
        and (teacher.has_targets or not term.needs_teacher)
        and (teacher.is_crossed or not term.only_crossed)
    }


def without_teacher(loss: LossConfig) -> LossConfig:
    """The settings of a student without a teacher."""
    silent = [name for name, term in TERMS.items() if term.needs_teacher and term.weight is None]
    schedules = {name: text for name, text in loss.schedules.items() if name not in silent}
    return replace(loss, **dict.fromkeys(silent, 0.0), schedules=schedules)


def check_own(terms: Terms) -> None:
    """Refuse names that are taken, weights that cannot be, and what is no term.

    Raises:
        ValueError: naming the term.
    """
    for name, term in terms.items():
        if name in TERMS or name in RECORD:
            raise ValueError(f"terms names {name!r}, but that name is taken; choose another.")
        if not isinstance(term, Term):
            raise ValueError(f"terms[{name!r}] is {term!r}, but must be a Term; give OwnTerm(weight, function).")
        if term.weight is None or not 0 <= term.weight < float("inf"):
            raise ValueError(f"terms[{name!r}].weight is {term.weight}, but a weight is 0 or more; correct it.")


def check_tasks(task_weights: Mapping[str, float], known: Collection[str]) -> None:
    """Refuse the weight of a task that no sample can have.

    Raises:
        ValueError: naming the task.
    """
    for task in task_weights:
        if task not in known:
            raise ValueError(f"loss.task_weights names {task}, but the tasks are {', '.join(known)}; correct the name.")
