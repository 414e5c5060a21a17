"""What a metric is: it counts a task's answers. Knows no metric by name, no interval and no model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

NOT_AVAILABLE = "not available"  # of a further figure that needs what is not here


@dataclass(frozen=True)
class Prediction:
    """What a model answered for one clip, and what it should have."""

    key: str  # of the row that was asked, where several are one clip
    task: str
    source: str
    references: tuple[str, ...]  # one or more right answers
    hypothesis: str
    ended: bool = True  # the model wrote its end token, instead of running into the length limit


@dataclass(frozen=True)
class Tally:
    """A task's clips as two numbers each: the metric is the sum of the first over the sum of the second."""

    gained: np.ndarray
    possible: np.ndarray
    extra: dict[str, float | str] = field(default_factory=dict)  # further figures

    @property
    def value(self) -> float:
        return float(self.gained.sum() / self.possible.sum())

    @classmethod
    def of_values(cls, values: Sequence[float], extra: dict[str, float | str] | None = None) -> "Tally":
        """Of a metric whose value is the mean over clips."""
        return cls(np.array(values, dtype=float), np.ones(len(values)), extra or {})


@dataclass(frozen=True)
class Metric:
    """One way to score.

    Args:
        title: its name in a scorecard.
        tasks: whose answers it scores.
        tally: counts the answers of one task; the flag says whether English rules apply (`eval.normalize`).
        plain: a text as the metric compares it, under the same flag.
        is_error_rate: lower is better, and quality is 1 - rate; of the others quality is the value.
        best: the value of a perfect answer, where higher is better.
    """

    title: str
    tasks: tuple[str, ...]
    tally: Callable[[Sequence[Prediction], bool], Tally]
    plain: Callable[[str, bool], str]
    is_error_rate: bool = False
    best: float = 1.0

    @property
    def heading(self) -> str:
        """Its title, and whether lower or higher is better."""
        return f"{self.title} {'↓' if self.is_error_rate else '↑'}"

    @property
    def form(self) -> str:
        """How a value is written: a share in percent, what goes further as it is."""
        return "{:.1%}" if self.best == 1 else "{:.2f}"

    @property
    def scale(self) -> int:
        """What the bounds of a value are multiplied with beside it: 100 where that is in percent."""
        return 100 if self.best == 1 else 1

    def lacks(self, value: float) -> float:
        """What a value lacks of the best one, as a share of it: 0 is perfect."""
        return value if self.is_error_rate else 1 - value / self.best

    def quality(self, value):
        """Larger is better: the value, or what an error rate leaves of 1."""
        return np.maximum(0, 1 - value) if self.is_error_rate else value
