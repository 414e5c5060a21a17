"""Mean and deviation of a series of which what is recent counts most, in three numbers. Knows not what is counted."""

import math
from dataclasses import dataclass

NUM_FIRST = 25  # values that count alike, and before which nothing is said
RECENT = 0.03  # what each later value counts


@dataclass
class Statistic:
    """An exponential mean and variance.

    The first values give the plain mean and variance, each later one counts 3 %: the figures of Kumar et al., "ZClip",
    2025 (arXiv 2504.02507). The recurrence is West's (1979).
    """

    number: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        """Take in the next value of the series."""
        weight = RECENT if self.is_known else 1 / (self.number + 1)
        away = value - self.mean
        self.mean += weight * away
        self.variance = (1 - weight) * (self.variance + weight * away * away)
        self.number += 1

    @property
    def is_known(self) -> bool:
        """Whether there were enough values to judge another by."""
        return self.number >= NUM_FIRST

    def above(self, deviations: float) -> float:
        """The value that lies so many standard deviations above the mean."""
        return self.mean + deviations * math.sqrt(self.variance)
