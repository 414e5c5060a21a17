"""Steps that are left out: a loss or a norm that is not finite, or far above those of the steps before. Knows no model.

A step that is left out changes no weight, is said with its clips, and counted. After some in a row the run goes back to
its last good checkpoint and on from there with the clips that come next, as Chowdhery et al., PaLM, 2022 (arXiv
2204.02311, section 5.1) did by hand; or it ends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

from distill.config import TrainConfig
from distill.training.update.statistic import Statistic

NUM_SHOWN = 8  # keys of a bad step that are named


class BadStepsError(RuntimeError):
    """Too many steps in a row had to be left out."""


class Fault(NamedTuple):
    """Why a step is left out."""

    name: str
    value: float
    rule: str
    is_bad: bool = True  # False: it says nothing of the model or its samples, and does not end a run


class BadSteps:
    """Judges the steps of a run, and counts those that are left out.

    Args:
        options: what a spike is, and how many are too many.
        say: is told of each.
    """

    def __init__(self, options: TrainConfig, say: Callable[[str], None]):
        self.options, self.say = options, say
        self.load_state_dict({})

    def find_fault(self, loss: float, norm: float) -> Fault | None:
        """What is wrong with a step; a good one is taken into the statistic of the next."""
        seen = (("loss", loss, self.losses), ("grad_norm", norm, self.norms))
        for name, value, _ in seen:
            if not math.isfinite(value):
                return Fault(name, value, "must be finite")
        deviations = self.options.spike_deviations
        for name, value, statistic in seen:
            if deviations and statistic.is_known and value > statistic.above(deviations):
                limit = statistic.above(deviations)
                return Fault(name, value, f"is a spike above {limit:.4g} with train.spike_deviations={deviations:g}")
        self.losses.add(loss)
        self.norms.add(norm)
        return None

    def note(self, step: int, fault: Fault | None, list_keys: Callable[[], Sequence[str]]) -> bool:
        """Count a step; True: the run must go back. `list_keys` gives the keys of its samples on all ranks.

        Raises:
            BadStepsError: it is one too many.
        """
        if fault is None:
            self.in_a_row = 0
            return False
        self.left_out += 1
        self.total += 1
        self.in_a_row += fault.is_bad
        keys = list_keys()
        named = ", ".join(keys[:NUM_SHOWN]) + (f" and {len(keys) - NUM_SHOWN} more" if len(keys) > NUM_SHOWN else "")
        why = "" if fault.rule == "must be finite" else f", which {fault.rule}"
        self.say(f"step {step} is skipped: {fault.name} {fault.value:.6g}{why}, keys {named}")
        if not fault.is_bad or self.in_a_row < self.options.max_bad_steps:
            return False
        if self.returns < self.options.max_returns:
            return True
        raise BadStepsError(
            f"{fault.name} is {fault.value:.6g} for {self.in_a_row} steps in a row, but {fault.rule}; look at samples "
            f"{named}, lower train.learning_rate, or set train.max_returns above {self.returns} to go on without them; "
            f"checkpoints before them are kept."
        )

    def count_return(self, counts: Mapping[str, int]) -> None:
        """Keep the `counts` of before the run went back, and count that it did."""
        self.total, self.returns = counts["skipped"], counts["returns"] + 1

    @property
    def counts(self) -> dict[str, int]:
        """For the log: the steps that were left out so far, and how often the run went back; nothing if none was."""
        return {"skipped": self.total, "returns": self.returns} if self.total else {}

    def state_dict(self) -> dict:
        """What a run that goes on must know, as plain data; empty where there is nothing."""
        if not self.total and not self.options.spike_deviations:
            return {}
        counts = {name: getattr(self, name) for name in COUNTS}
        return counts | {"losses": asdict(self.losses), "norms": asdict(self.norms)}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on where another stood."""
        # in a row now; of the steps up to here; of all that were tried; times that the run went back
        self.in_a_row, self.left_out, self.total, self.returns = (state.get(name, 0) for name in COUNTS)
        self.losses, self.norms = (Statistic(**state.get(name, {})) for name in ("losses", "norms"))


COUNTS = ("in_a_row", "left_out", "total", "returns")


def is_good(state: Mapping) -> bool:
    """Whether a checkpoint, by the state of its bad steps, was written while steps went well."""
    return not state.get("in_a_row", 0)
