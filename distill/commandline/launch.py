"""A launcher whose exit codes are ours: `python -m distill.commandline.launch --config_file FILE --module STAGE …`.

It is `accelerate launch` with all its options, but passes every signal on to the ranks (torchrun dies of SIGUSR1, and
accelerate's launcher of one process of any), ends with the first failed rank's exit code (accelerate's is always 1) and
says on one line which rank that was. Knows no stage.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distill.commandline.starting import end_at_once
from distill.training.stopping import GRACE_SECONDS, PREEMPTED, STOP_SIGNALS, is_ignored
from shards.parent_process import end_with_parent

PARENT = "DISTILL_PARENT"  # in the environment: the process that must live as long as this one
OF_OTHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # what torchrun and `accelerate launch` leave there


def bind_to_launcher() -> None:
    """End in order when the launcher or the pipeline that started this process ends, by kill -9 too.

    A process that a shell started is bound to nothing: `nohup distill run …` outlives its shell.
    """
    named = os.environ.pop(PARENT, None)
    if named is None and not any(name in os.environ for name in OF_OTHERS):
        return
    parent = int(named) if named is not None else os.getppid()
    if named is None and not _is_python(parent):  # the launcher is gone, and who adopts orphans took its place
        parent = 0
    end_with_parent(parent, number=signal.SIGTERM, grace_seconds=GRACE_SECONDS)


def name_parent() -> dict[str, str]:
    """What a child's environment needs for `bind_to_launcher` to bind it to this process."""
    return {PARENT: str(os.getpid())}


def _is_python(process: int) -> bool:
    """Whether a process runs Python, as every launcher does; true where that cannot be seen."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True
    return any(name in command for name in (b"python", b"accelerate", b"torchrun"))


def launch(words: Sequence[str]) -> int:
    """Run `accelerate launch` with these words; returns the exit code of the first rank that failed, else 0."""
    pass_signals_on()
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(words)
    os.environ |= name_parent()
    try:
        launch_command(args)
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return report(f"rank {rank} (process {failure.pid} on {socket.gethostname()})", failure.exitcode)
    except subprocess.CalledProcessError as error:
        return report(f"the process on {socket.gethostname()}", error.returncode)
    except SignalException:  # torchrun's own handlers: it passed the signal on and waited
        return PREEMPTED


def report(who: str, code: int) -> int:
    """Say how a rank ended that did not say it itself; returns the exit code as a shell counts it."""
    if code < 0:
        print(
            f"error: {who} was killed by {signal.Signals(-code).name}, so the others were ended; look at the memory "
            f"if nobody killed it: the same command goes on from what is finished.",
            file=sys.stderr,
        )
        return 128 - code
    if code != PREEMPTED:
        print(f"{who} ended first, with exit code {code}: its message stands above", file=sys.stderr)
    return code


def pass_signals_on() -> None:
    """Give every signal that would end this process to its children instead; their end is then ours, or it is at once
    where none has started yet."""
    import psutil

    def pass_on(number: int, frame) -> None:
        children = psutil.Process().children()
        if not children:
            end_at_once(number, frame)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    for number in STOP_SIGNALS:
        if not is_ignored(number):
            signal.signal(number, pass_on)


if __name__ == "__main__":
    bind_to_launcher()
    sys.exit(launch(sys.argv[1:]))
