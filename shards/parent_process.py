"""A process that ends with the one that started it, however that one ended. Knows no stage."""

import ctypes
import os
import signal
import sys
import threading
import time

POLL_SECONDS = 0.5  # between looks at whether the parent lives, where the kernel does not tell
PR_SET_PDEATHSIG = 1  # of Linux: the signal that this process gets when the thread that started it ends


def end_with_parent(
    parent: int, *, number: int = signal.SIGKILL, by_kernel: bool = True, grace_seconds: float = 0.0
) -> None:
    """Let this process get a signal as soon as its parent has ended, and SIGKILL if it is still there after a while.

    Args:
        parent: its process id, from before this process began: it may be gone by now.
        number: the signal.
        by_kernel: whether the parent's main thread started this process. The kernel watches that thread alone, so one
            that another thread started looks for itself, every half second.
        grace_seconds: between the signal and SIGKILL.
    """
    is_told = by_kernel and _ask_kernel(number)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), number)
        is_told = True
    threading.Thread(target=_watch, args=(parent, number, is_told, grace_seconds), daemon=True).start()


def is_in_main_thread() -> bool:
    """Whether processes that are started here have the kernel's word for the end of this one."""
    return threading.current_thread() is threading.main_thread()


def _watch(parent: int, number: int, is_told: bool, grace_seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    if not is_told:
        os.kill(os.getpid(), number)
    time.sleep(grace_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _ask_kernel(number: int) -> bool:
    """Whether the kernel will send the signal."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0
    except (OSError, AttributeError):  # no such function in this C library
        return False
