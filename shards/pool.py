"""Work spread over processes, with results in the order of the work and a bounded amount of it in flight."""

import itertools
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from shards.parent_process import end_with_parent, is_in_main_thread
from shards.status import is_quiet

SHORT_SECONDS = 1.0  # of work that no bar is drawn for
IN_FLIGHT = 4  # pieces of work a worker, so that none waits and memory stays small


def count_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: Callable, pieces: Iterable, *, workers: int) -> Iterator:
    """`function` of each piece, in their order, `IN_FLIGHT * workers` of them at a time.

    Args:
        function: a module's own, so that it can be sent to another process.
        pieces: read only as far as there is room.
        workers: processes; 0 or 1 computes here.

    Raises:
        whatever `function` raises, at that piece; the processes end then, and when the caller stops early.
    """
    pieces = iter(pieces)
    first = list(itertools.islice(pieces, 2))
    pieces = itertools.chain(first, pieces)
    if workers <= 1 or len(first) < 2:  # a process takes longer to start than a piece to do
        yield from map(function, pieces)
        return
    # Spawned, not forked: the caller may have threads (torch's, a progress bar's) that a fork would leave locked.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker,
                               initargs=(os.getpid(), is_in_main_thread()))  # fmt: skip
    try:
        pending = deque(pool.submit(function, piece) for piece in itertools.islice(pieces, IN_FLIGHT * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, piece) for piece in itertools.islice(pieces, 1))
            yield result
    except BrokenProcessPool as error:
        raise ValueError(f"a worker of {workers} was killed, most likely for memory; use fewer workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


@contextmanager
def progress_bar(description: str, total: int, *, show: bool):
    """A function that moves a bar (count, rate, time left) on by a number of samples; without `show`, does nothing.

    What is done within SHORT_SECONDS shows no bar.
    """
    if not show or is_quiet():
        yield lambda count: None
        return
    began, done, bar = time.monotonic(), 0, None

    def advance(count: int) -> None:
        nonlocal done, bar
        done += count
        if bar is None and time.monotonic() - began > SHORT_SECONDS:
            bar = start_bar(description, total, time.monotonic() - began)
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def start_bar(description: str, total: int, elapsed: float):
    """A bar on stderr whose one task began `elapsed` seconds ago."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class RateColumn(TextColumn):
        def render(self, task):
            # rich knows no speed before a few steps, nor of a task that was over at once
            mean = task.completed / task.elapsed if task.elapsed else 0.0
            self.text_format = f"{mean if task.finished else task.speed or mean:.0f} samples/s"
            return super().render(task)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(""),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    progress.add_task(description, total=total)
    progress.tasks[0].start_time -= elapsed
    progress.start()
    return progress


def _start_worker(parent: int, by_kernel: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers when it is ready
    end_with_parent(parent, by_kernel=by_kernel)
