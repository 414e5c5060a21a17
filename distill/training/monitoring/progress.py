"""A progress line with rate and time left: a bar in a terminal, a line now and then in a log. Knows no stage."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from shards.status import is_quiet

LOG_SECONDS = 20.0  # between lines where there is no terminal
SHORT_SECONDS = 1.0  # what took less leaves no line


class Progress:
    """Counts towards a total; only the main process shows it.

    Args:
        title: the title of the line.
        total: units to do.
        done: units done before.
        accelerator: whose main process shows the line; None: this one.
        unit: what is counted.
    """

    def __init__(self, title: str, total: int, done: int = 0, accelerator=None, unit: str = "steps"):
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self.began, self.first, self.shown_at = time.monotonic(), done, time.monotonic()
        self.is_shown = (accelerator is None or accelerator.is_main_process) and not is_quiet()
        console = Console(stderr=True)
        self.bar = None
        if self.is_shown and console.is_terminal:
            rate, note = TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[note]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
            self.bar = RichProgress(*columns, note, console=console)

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
            self.row = self.bar.add_task(self.title, total=self.total, completed=self.done, rate="", note="")
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.is_shown and self.done > self.first and time.monotonic() - self.began > SHORT_SECONDS:
            self._line("")

    def advance(self, note: str = "", units: int = 1) -> None:
        """Count `units` more."""
        self.done += units
        if self.bar is not None:
            self.bar.update(self.row, completed=self.done, rate=f"{self.rate:.2f} {self.unit}/s", note=note)
        elif self.is_shown and time.monotonic() - self.shown_at > LOG_SECONDS:
            self._line(note)

    def on_start(self, run, step: int) -> None:
        """Show the line of a run's steps; see `distill.training.monitoring.callbacks`."""
        self.__enter__()

    def on_step(self, run, record: dict[str, float]) -> None:
        """Count a step; one that was done before, where a run went back, is not done any more."""
        self.advance(f"loss {record['loss']:.3f}", int(record["step"]) - self.done)

    def on_close(self, run) -> None:
        """Leave the last line."""
        if self.bar is None or hasattr(self, "row"):
            self.__exit__()

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def _line(self, note: str) -> None:
        self.shown_at = time.monotonic()
        left = (self.total - self.done) / max(self.rate, 1e-9)
        text = f"{self.title}: {self.done}/{self.total}, {self.rate:.2f} {self.unit}/s, {left:.0f} s left  {note}"
        print(text.rstrip(), file=sys.stderr, flush=True)
