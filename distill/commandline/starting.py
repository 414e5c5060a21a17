"""The first thing in a stage that a launcher starts: until its imports are done, a signal ends the process at once.

They take seconds, in which nothing has begun. Ctrl-C as Python raises it fills a page there, or is lost: in a callback
of the import system it is only printed, and the stage goes on. Imports nothing that takes time itself.
"""

import os
import signal
import sys

from distill.training.stopping import PREEMPTED, STOP_SIGNALS, is_ignored

STOPPED = "stopped; files that were finished are kept, and the same command goes on from them"
INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, as the shell counts it


def end_at_signals() -> None:
    """Let every signal that stops a stage end this process, with its words and its exit code."""
    for number in STOP_SIGNALS:
        if not is_ignored(number):
            signal.signal(number, end_at_once)


def end_at_once(number: int, frame) -> None:
    """End the process as a stage that was stopped ends."""
    print(STOPPED, file=sys.stderr, flush=True)
    os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)


def raise_at_signals() -> None:
    """What `end_at_signals` did is taken back: what comes now is put away in order."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is end_at_once:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
