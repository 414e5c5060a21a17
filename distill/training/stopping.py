"""What ends a run before its last step: a signal, its time, a hang. Knows no model and no loss."""

import faulthandler
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

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

    A rank that waits for another in a collective waits in C, where no Python signal handler runs, and may hold Python's
    lock; so the end is a timer of C. The launcher then ends the other ranks. While the outermost block runs, one thread
    puts that timer off, twice in the time that a part may take: a part inside costs a clock's reading, not a thread.

    Args:
        minutes: that a part may take; 0: no end.
        explain: gives what may be the cause, when it is too late; "" where it knows of none.
    """

    def __init__(self, minutes: float, explain: Callable[[], str] = str):
        self.minutes, self.explain = minutes, explain
        self._part = ""
        self._late_at = math.inf  # by the monotonic clock

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """A block that is watched, such as `step 12`; one inside another counts for itself, then the other anew."""
        outer, self._part = self._part, part
        self.beat()
        try:
            with nullcontext() if outer or not self.minutes else self._watching():
                yield
        finally:
            self._part = outer
            if outer:
                self.beat()

    def beat(self) -> None:
        """Count from now on again: a part of many pieces has done one."""
        self._late_at = time.monotonic() + 60 * self.minutes

    @contextmanager
    def _watching(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._put_off, args=(over,), name="hang watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _put_off(self, over: threading.Event) -> None:
        """In a thread: put the end off while parts end in time, and say why it comes where one does not."""
        said_of, wait = 0.0, 0.0
        while not over.wait(wait):
            late_at = self._late_at
            left = max(late_at - time.monotonic(), 0)
            if left or said_of != late_at:
                faulthandler.dump_traceback_later(left + SAY_SECONDS, exit=True, file=sys.__stderr__)
            if not left and said_of != late_at:
                self._say()
                said_of = late_at
            wait = min(left, 30 * self.minutes) or SAY_SECONDS / 10  # a part that is late may still end
        faulthandler.cancel_dump_traceback_later()

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
