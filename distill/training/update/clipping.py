"""The norm above which a step's gradient is scaled down: a fixed one, or one of recent norms. Knows no gradient.

A fixed limit that fits the first steps is loose for the later ones, whose norms are a fraction of theirs.
Source: Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv 2504.02507; here a gradient
beyond the threshold is scaled down to the threshold.
"""

from dataclasses import asdict

from distill.config import TrainConfig
from distill.training.update.statistic import Statistic


class FixedClip:
    """`train.max_grad_norm` at every step."""

    def __init__(self, options: TrainConfig):
        self.limit = options.max_grad_norm

    def add(self, norm: float) -> None:
        """Take in the norm of a step that was done."""

    def state_dict(self) -> dict:
        """What a run that goes on must know, as plain data."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Go on from such data."""


class RunningClip:
    """`train.clip_deviations` above the mean of recent norms; until those are known `train.max_grad_norm`.

    A norm beyond the limit counts as the limit, so that a spike does not raise the limit for the next.
    """

    def __init__(self, options: TrainConfig):
        self.first, self.deviations = options.max_grad_norm, options.clip_deviations
        self.norms = Statistic()

    @property
    def limit(self) -> float:
        """The limit of the next step, from the steps before alone."""
        return self.norms.above(self.deviations) if self.norms.is_known else self.first

    def add(self, norm: float) -> None:
        """Take in the norm of a step that was done."""
        self.norms.add(min(norm, self.limit) if self.norms.is_known else norm)

    def state_dict(self) -> dict:
        """What a run that goes on must know, as plain data."""
        return asdict(self.norms)

    def load_state_dict(self, state: dict) -> None:
        """Go on from such data; there is none where the run had a fixed limit until now."""
        self.norms = Statistic(**state)


CLIPS = {"fixed": FixedClip, "running": RunningClip}  # by the value of `train.clip`
