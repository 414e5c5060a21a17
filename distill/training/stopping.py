"""What ends a run before its last step: a signal, its time, a hang. Knows no model and no loss."""

import faulthandler
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from shards.parent_process import is_in_main_thread

PREEMPTED = 128 + signal.SIGTERM  # exit code of a stage that stopped in order, as the shell counts it
SAY_SECONDS = 1.0  # between the words of a hang watch and the end that it makes
SAME_SECONDS = 1.0  # between two signals that are one request
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # of queues, people, terminals
GRACE_SECONDS = 30.0  # that torchrun and most queues leave a process between SIGTERM and SIGKILL


def is_ignored(number: int) -> bool:
    """Whether whoever started this process wants it to outlive a signal, as `nohup` does; it stays ignored then."""
    return signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def handle_signals(handler: Callable | int, numbers: Sequence[int] = STOP_SIGNALS) -> Iterator[None]:
    """A block in which these signals are handled so, but for those that are ignored; then as they were before.

    In another thread than the main one, which alone Python lets handle them, nothing changes.
    """
    numbers = [number for number in numbers if not is_ignored(number)] if is_in_main_thread() else []
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class StopRequest:
    """True once a signal came while the block runs, or its time is over; a step is never cut in the middle.

    SIGTERM, Ctrl-C, the end of a terminal (SIGHUP) and SIGUSR1, with which a queue tells that time is short, mean the
    same. Where the block runs in another thread than the main one, Python leaves signals to that one.

    Queues signal every process of a job, and some of those pass it on: what follows within a second is the same
    request. A later one ends the process at once.

    Args:
        max_minutes: from now on; 0: no end.
    """

    def __init__(self, max_minutes: float = 0.0):
        self._came: float | None = None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf

    def __bool__(self) -> bool:
        return self._came is not None or time.monotonic() > self._deadline

    def __enter__(self) -> "StopRequest":
        self._handled = handle_signals(self._note)
        self._handled.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handled.__exit__(*error)

    def request(self) -> None:
        """Ask from within the process."""
        self._came = self._came or time.monotonic()

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if self._came is not None and now - self._came > SAME_SECONDS:
            raise KeyboardInterrupt
        self._came = self._came or now


class HangWatch:
    """Ends the process, with the stacks of all its threads on stderr, when a part of a run takes too long.

    A rank that waits for another in a collective waits in C, where no Python signal handler runs; the timer is a thread
    of C too. The launcher then ends the other ranks.

    Args:
        minutes: that a part may take; 0: no end.
        explain: gives what may be the cause, when it is too late; "" where it knows of none.
    """

    def __init__(self, minutes: float, explain: Callable[[], str] = str):
        self.minutes, self.explain = minutes, explain
        self._timer: threading.Timer | None = None
        self._part = ""

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """A block that is watched, such as `step 12`; one inside another counts for itself, then the other anew."""
        outer, self._part = self._part, part
        self.beat()
        try:
            yield
        finally:
            self._part = outer
            if outer:
                self.beat()
            else:
                self._cancel()

    def beat(self) -> None:
        """Count from now on again: a part of many pieces has done one."""
        self._cancel()
        if self.minutes:
            faulthandler.dump_traceback_later(60 * self.minutes + SAY_SECONDS, exit=True, file=sys.__stderr__)
            self._timer = threading.Timer(60 * self.minutes, self._say)
            self._timer.daemon = True
            self._timer.start()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            self._timer = None

    def _say(self) -> None:
        print(
            f"error: {self._part} takes longer than {self.minutes:g} minutes, but train.hang_minutes is that; the "
            f"stacks below show where it waits, and the same command goes on from the last checkpoint. "
            f"{self.explain()}".rstrip(),
            file=sys.__stderr__,
            flush=True,
        )


def warn_of_slow_save(seconds: float, say: Callable[[str], None]) -> None:
    """Tell that a checkpoint may not be written between a queue's SIGTERM and its SIGKILL."""
    if seconds > 0.8 * GRACE_SECONDS:
        say(
            f"a checkpoint took {seconds:.0f} s, but queues kill {GRACE_SECONDS:.0f} s after they ask to stop; let the "
            f"run stop itself before with train.max_minutes, or save to a faster disk."
        )
