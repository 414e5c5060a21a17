"""What every stage's `main` needs: its words become a config, and an error becomes one line and an exit code.

Knows no stage by name: which there are is in `commandline/commands.py`.
"""

import argparse
import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from distill.commandline.launch import bind_to_launcher
from distill.commandline.starting import INTERRUPTED, STOPPED, raise_at_signals
from distill.config.recipes import find_config
from distill.training.stopping import PREEMPTED, STOP_SIGNALS, handle_signals, is_ignored
from shards.status import is_quiet, set_quiet

ENDED = "exit code {}: see the message above; the same command goes on from what is finished"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
KEPT_BYTES, MAPPED_BYTES = 2**30, 2**25  # freed memory that a process keeps; what is larger than 2**25 it gives back
LAST_WORDS = (  # of a process that gets no chance to say any
    "ended without a word: exit code -9 is kill -9 or no memory left, 1 below threads' stacks is train.hang_minutes; "
    "the same command goes on from what is finished"
)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line in the form of ours."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`.\n")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What every command takes."""
    parser.add_argument("--quiet", action="store_true", help="print only results and errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A config and `key=value` words, as every stage of the pipeline takes them."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, a run's folder, or the name of a recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="fields to change, such as train.steps=200"
    )


def read_config_arguments(args: argparse.Namespace) -> None:
    """`args.config` becomes the `Config`, and `args.path` the file that it was read from; words come in any order.

    Raises:
        FileNotFoundError: there is no such file, run or recipe.
        ValueError: no word names one, or the config is wrong.
    """
    from distill.config import load_config

    words = [args.config, *args.overrides]
    named = [word for word in words if "=" not in word or Path(word).exists()]
    if not named:
        raise ValueError(
            f"CONFIG is {args.config}, but that sets a field and the config to set it in is not named; write "
            f"CONFIG {' '.join(words)}, with a YAML file, a run's folder or a recipe's name."
        )
    words.remove(named[0])
    args.path, args.overrides = str(find_config(named[0])), words
    args.config = load_config(args.path, args.overrides)


def run_stage(stage, argv: Sequence[str] | None = None) -> int:
    """What `accelerate launch -m distill.STAGE CONFIG [key=value …]` does: `stage(config)` behind the guard."""
    parser = Parser(description=(sys.modules[stage.__module__].__doc__ or "").split("\n\n")[0])
    add_config_arguments(parser)
    add_flags(parser)
    args = parser.parse_intermixed_args(argv)
    if args.quiet or is_quiet():
        set_quiet()

    def work() -> int:
        read_config_arguments(args)
        result = stage(args.config)
        return result if isinstance(result, int) else 0

    return guard(work, debug=args.debug)


def guard(work, *, debug: bool) -> int:
    """Run `work` and turn a user's error into one line and an exit code.

    `KeyError` and the like are bugs of ours and keep their traceback.
    """
    raise_at_signals()
    bind_to_launcher()
    keep_freed_memory()
    tell_launcher(LAST_WORDS)
    try:
        with stop_in_order():
            code = int(work() or 0)
            sys.stdout.flush()  # a reader that is gone is found here, not at the interpreter's end
        if code:  # the stage has said why
            tell_launcher(ENDED.format(code))
        return code
    except KeyboardInterrupt as stopped:
        print(STOPPED, file=sys.stderr)
        if not isinstance(stopped, StoppedError):
            return INTERRUPTED
        tell_launcher(ENDED.format(PREEMPTED))
        return PREEMPTED
    except BrokenPipeError:  # whoever read our lines, as `head` does, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would say so at its end
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, RuntimeError) as error:
        if debug:
            raise
        text = f"error: {describe(error)}"
        print(text, file=sys.stderr)
        tell_launcher(text)
        return 1


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next: giving pages back and fetching them again costs a CPU time.

    How often it would give them back depends on what else lies on the heap, so on which modules were imported. With
    another C library nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


class StoppedError(KeyboardInterrupt):
    """A queue, a launcher or the end of a terminal asked to stop."""


@contextmanager
def stop_in_order() -> Iterator[None]:
    """A block that every signal ends as Ctrl-C does, so that what it holds is put away; the second ends it at once."""

    numbers = [number for number in STOP_SIGNALS if number != signal.SIGINT and not is_ignored(number)]

    def stop(number: int, frame) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise StoppedError

    with handle_signals(stop, numbers):
        yield


def describe(error: Exception) -> str:
    """What a user reads of an error: its text, where it is ours, or what it means, where the system or torch speaks."""
    if isinstance(error, OSError) and error.strerror:
        if error.strerror != os.strerror(error.errno):  # ours, with the system's number
            return error.strerror
        if error.errno == errno.EEXIST:
            return f"{error.filename} is a file, but a folder is to be made there; name another one."
        return (
            f"{error.filename or 'a file'} cannot be used ({error.strerror}), but this command needs it; check its "
            f"path, its rights and the free space."
        )
    if isinstance(error, OSError):  # a library's may fill a page, as that of a hub which is offline
        return " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported here
        return (
            f"memory of the GPU is full ({'. '.join(str(error).split('. ')[:3])}), but a step must fit; lower "
            f"train.micro_batch_size, data.batch_seconds, cache.batch_size or eval.batch_size, or set "
            f"student.quantization=nf4."
        )
    return str(error) or type(error).__name__


def tell_launcher(text: str) -> None:
    """Leave an error where torchrun and `accelerate launch` look for it: it is then the last line of their report."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):  # it was said already
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report))
