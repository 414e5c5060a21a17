"""What ends a run before its last step: a signal that asks for it, or losses that are not finite. Knows no model."""

import math
import signal
import time
from collections.abc import Callable, Sequence

PREEMPTED = 128 + signal.SIGTERM  # exit code of a stage that stopped in order, as the shell counts it
SAME_SECONDS = 1.0  # between two signals that are one request
NUM_SHOWN = 8  # keys of a bad step that are named


class StopRequest:
    """True once SIGTERM or Ctrl-C came while the block runs; a step is never cut in the middle.

    Queues signal every process of a job, and some of those pass it on: what follows within a second is the same
    request. A later one ends the process at once.
    """

    def __init__(self):
        self._came: float | None = None

    def __bool__(self) -> bool:
        return self._came is not None

    def __enter__(self) -> "StopRequest":
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if self._came is not None and now - self._came > SAME_SECONDS:
            raise KeyboardInterrupt
        self._came = self._came or now


class BadStepsError(RuntimeError):
    """Too many steps in a row had a loss that is not finite."""


class BadSteps:
    """Counts the steps in a row whose loss or gradient is not finite.

    Args:
        most: that end the run.
        say: is told of each.
    """

    def __init__(self, most: int, say: Callable[[str], None]):
        self.most, self.say, self.count = most, say, 0

    def check(self, record: dict, keys: Sequence[str]) -> None:
        """Count a step by its metrics; `keys` are its samples.

        Raises:
            BadStepsError: it is one too many.
        """
        if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
            self.count = 0
            return
        self.count += 1
        named = ", ".join(keys[:NUM_SHOWN])
        self.say(f"step {record['step']} is skipped: loss {record['loss']}, keys {named}")
        if self.count >= self.most:
            raise BadStepsError(
                f"loss is {record['loss']} for {self.count} steps in a row, but must be finite; look at samples "
                f"{named}, or lower train.learning_rate; checkpoints before them are kept."
            )
