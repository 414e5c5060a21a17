"""How the weights of the loss terms change over the steps of a run, and what one sample counts.

A schedule is a pure function of the step, so a resumed run needs no state of it. What a weight multiplies is not known
here, and torch is not needed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distill.objective.terms.term import Term


@dataclass(frozen=True)
class Schedule:
    """A weight over the steps of a run: a linear climb to `start`, then from `start` to `end` at the last step.

    Args:
        kind: "constant" (stays at `start`, which `end` must be), "linear" or "cosine".
        start: the weight after the climb.
        end: the weight at the end of the run.
        warmup_steps: optimizer steps below `start`; 0 for none.
        num_steps: optimizer steps of the whole run, the climb among them.

    Raises:
        ValueError: the kind is unknown, a weight is negative or not finite, or the climb is longer than the run.
    """

    kind: str
    start: float
    end: float
    warmup_steps: int
    num_steps: int

    def __post_init__(self):
        if self.kind not in SHAPES:
            raise ValueError(f"schedule is {self.kind!r}, but it must be one of {', '.join(SHAPES)}; correct the name.")
        for name in ("start", "end"):
            weight = getattr(self, name)
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}, but a loss weight must be finite and not negative; correct it.")
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but it must lie between 0 and the run's {self.num_steps} steps; "
                f"shorten the warm-up."
            )

    @property
    def is_ever_above_zero(self) -> bool:
        """Whether the weight is above 0 at some step."""
        return bool(self.start or self.end)

    def weight(self, step: int) -> float:
        """The weight of the update that follows `step` finished ones."""
        if step < self.warmup_steps:
            return self.start * (step + 1) / (self.warmup_steps + 1)
        span = max(1, self.num_steps - 1 - self.warmup_steps)
        passed = min(1.0, (step - self.warmup_steps) / span)
        return self.start + (self.end - self.start) * SHAPES[self.kind](passed)


def parse_schedule(text: str, start: float, num_steps: int, name: str) -> Schedule:
    """A schedule from its short form: `KIND [END] [warmup STEPS]`, as in "cosine 0.1", "constant warmup 300".

    Args:
        text: the short form; a constant one has no end.
        start: the term's own weight.
        num_steps: optimizer steps of the run.
        name: what the error calls it.

    Raises:
        ValueError: the text is not of this form, or the schedule cannot be.
    """
    match = re.fullmatch(r"(\w+)(?:\s+([-+.\deE]+))?(?:\s+warmup\s+(\d+))?", text.strip())
    if not match or (match[2] is None) != (match[1] == "constant"):
        raise ValueError(
            f"{name} is {text!r}, but must read 'constant warmup STEPS', 'linear END' or 'cosine END warmup STEPS'; "
            f"correct it."
        )
    try:
        return Schedule(match[1], start, float(match[2] or start), int(match[3] or 0), num_steps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def weight_of(name: str, term: Term, loss) -> float:
    """A term's weight without a schedule: what LossConfig's field of its name says, or the term itself.

    Args:
        name: the name of the term.
        term: the term.
        loss: the settings.
    """
    return getattr(loss, name) if term.weight is None else term.weight


def build_schedules(terms: Mapping[str, Term], loss, num_steps: int) -> dict[str, Schedule]:
    """The weight of every term over the steps of a run.

    Raises:
        ValueError: a schedule is longer than the run, or of a term that there is not.
    """
    for name in loss.schedules:
        if name not in terms:
            raise ValueError(f"loss.schedules names {name}, but the terms are {', '.join(terms)}; correct the name.")
    found = {}
    for name, term in terms.items():
        weight = weight_of(name, term, loss)
        found[name] = Schedule("constant", weight, weight, 0, num_steps)
        if name in loss.schedules:
            found[name] = parse_schedule(loss.schedules[name], weight, num_steps, f"loss.schedules.{name}")
    return found


SHAPES = {
    "constant": lambda passed: 0.0,
    "linear": lambda passed: passed,
    "cosine": lambda passed: 0.5 * (1 - math.cos(math.pi * passed)),
}


def sample_weight(task: str, task_weights: Mapping[str, float], own_weight: float = 1.0) -> float:
    """What a sample counts: the weight of its task (1 for one that is not named) times its own.

    Raises:
        ValueError: the product is negative or not finite.
    """
    weight = own_weight
    if task in task_weights:
        weight *= task_weights[task]
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"weight of a sample of task {task} is {weight}, but it must be finite and not negative; correct "
            f"loss.task_weights or data.weights."
        )
    return weight
