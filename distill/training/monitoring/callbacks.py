"""What hears of a run while it trains: the built-in logs, then callbacks of one's own, in the order they were given.

Only the main process calls them, between steps and after all ranks have done the step, so they need no lock and no
question of rank, and must start no collective. Each call is watched as a step is (`train.hang_minutes`). An exception
ends the run as any other: what was saved stays, and the same call goes on from there. A run that has nothing left to do
has no events.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path


class Callback:
    """The events; a callback has those that it wants, and need not inherit from here.

    `run` is the `Distiller`: its `student`, `options`, `run_folder` and `request_stop()` are there to be used.
    """

    def on_start(self, run, step: int) -> None:
        """Before the first step of this call; `step` steps were done before."""

    def on_step(self, run, record: dict[str, float]) -> None:
        """After a step: what `metrics.jsonl` says of it, `record["step"]` from 1, `loss` and each term in nat."""

    def on_validation(self, run, step: int, error: float, scores: dict[str, float]) -> None:
        """After a validation: the mean error that chooses the best step, and the score of each task."""

    def on_save(self, run, step: int, folder: Path) -> None:
        """When the checkpoint of a step is whole on disk."""

    def on_end(self, run, result) -> None:
        """After the last step, or when a signal or `request_stop()` ended the run; not after an exception."""

    def on_close(self, run) -> None:
        """The last of all, after an exception too: for what must be closed."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """Passes the events of a run on.

    Args:
        run: the `Distiller` that they are told of.
        callbacks: in order.

    Raises:
        ValueError: one has no event, or one that there is not.
    """

    def __init__(self, run, callbacks: Sequence):
        self.run, self.callbacks = run, [check_callback(callback) for callback in callbacks]

    def tell(self, event: str, *args) -> None:
        """Call every callback that has this event."""
        for callback in self.callbacks:
            if hasattr(callback, event):
                with self._watch(event, callback):
                    getattr(callback, event)(self.run, *args)

    def close(self) -> None:
        """Call every `on_close`, each though another failed; the first error is raised."""
        errors = []
        for callback in self.callbacks:
            try:
                with self._watch("on_close", callback):
                    getattr(callback, "on_close", lambda run: None)(self.run)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _watch(self, event: str, callback):
        """A block that `train.hang_minutes` holds for: a tracker that waits for its server is named then."""
        return self.run.hang_watch(f"{event} of {type(callback).__name__}")


def check_callback(callback):
    """Refuse an object without an event, and one with an event that nothing would ever call."""
    names = [name for name in dir(callback) if name.startswith("on_")]
    unknown = [name for name in names if name not in EVENTS]
    if unknown or not names:
        what = f"the event {unknown[0]}" if unknown else "no event"
        near = difflib.get_close_matches(unknown[0], EVENTS, 1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else "see docs/extending.md."
        raise ValueError(f"callback {type(callback).__name__} has {what}, but events are {', '.join(EVENTS)}; {hint}")
    return callback
