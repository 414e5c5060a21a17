"""The command line: `distill COMMAND …`. Reads the words, and imports a stage only when they are right.

What there is to call is in `commands.py`; here words become a call, and an error becomes a line and an exit code.
"""

import argparse
import ast
import errno
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from distill.commandline.commands import COMMANDS, add_config_arguments, find_unknown, read_config_arguments
from distill.commandline.hints import COMMANDS as OTHER_COMMANDS
from distill.commandline.hints import did_you_mean, nearest
from distill.launch import bind_to_launcher
from distill.training.stopping import PREEMPTED, STOP_SIGNALS, is_ignored
from shards.parent import is_in_main_thread
from shards.telling import hush, is_quiet

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")  # that decide what a run does
FLAGS = ("--debug", "--quiet")  # of every command, before it as good as behind it


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line in the form of ours."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`.\n")


class Version(argparse.Action):
    """Print our version and those of the packages that decide what a run does, without importing them."""

    def __call__(self, parser, *_) -> NoReturn:
        from importlib.metadata import version
        from platform import python_version

        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        print(f"distill-audio {version('distill-audio')}, Python {python_version()}, {versions}")
        parser.exit()


ENDED = "exit code {}: see the message above; the same command goes on from what is finished"
LAST_WORDS = (  # of a process that gets no chance to say any
    "ended without a word: exit code -9 is kill -9 or no memory left, 1 below threads' stacks is train.hang_minutes; "
    "the same command goes on from what is finished"
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the top level alone; a command's own is built when it is chosen."""
    lines = "\n".join(f"  {name:<12} {command.help}" for name, command in COMMANDS.items() if " " not in name)
    parser = Parser(
        prog="distill",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distil a SALMONN audio language model into a small 4-bit student.",
        epilog=f"commands, in the order of the pipeline:\n{lines}\n\n"
        "`distill COMMAND --help` tells more. Errors are one line; --debug shows where they come from.",
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND")
    parser.add_argument("--version", nargs=0, action=Version, help="its version, and those of the libraries below it")
    add_flags(parser)
    return parser


def build_command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    command = COMMANDS[name]
    parser = Parser(prog=f"distill {name}", description=read_description(command.module))
    (command.takes or importlib.import_module(command.module).add_arguments)(parser)
    if command.has_json:
        parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else on stdout")
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What every command takes."""
    parser.add_argument("--quiet", action="store_true", help="print only results and errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def read_description(module: str) -> str:
    """The first paragraph of a module's docstring, without importing it."""
    docstring = ast.get_docstring(ast.parse(Path(importlib.util.find_spec(module).origin).read_text()))
    return docstring.split("\n\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, which is 2 where the words are none that it takes."""
    words = list(sys.argv[1:] if argv is None else argv)
    while len(words) > 1 and words[0] in FLAGS:
        words = [*words[1:], words[0]]
    if words[:2] == ["stats", "model"]:
        words = ["stats model", *words[2:]]
    if not words or words[0] not in COMMANDS:
        return refuse_command(words)
    name, *rest = words
    try:
        parser = build_command_parser(name)
        if wrong := find_unknown(rest, parser):
            parser.exit(2, f"error: {wrong}\n")
        args = parser.parse_intermixed_args(rest)  # options and key=value words in any order
    except SystemExit as end:
        return int(end.code or 0)
    if args.quiet:
        hush()
    return guard(lambda: call(name, args), debug=args.debug)


def refuse_command(words: Sequence[str]) -> int:
    """Print the help, or the commands that an unknown one may mean; returns the exit code."""
    parser = build_parser()
    try:
        args, _ = parser.parse_known_args(words)
    except SystemExit as end:
        return int(end.code or 0)
    if args.command is None:
        parser.print_help()
        return 0 if not words else 2
    hint = did_you_mean(nearest(args.command, COMMANDS, OTHER_COMMANDS), "see `distill --help`.")
    print(f"error: command is {args.command}, but there is none of that name; {hint}", file=sys.stderr)
    return 2


def call(name: str, args: argparse.Namespace) -> int:
    """Read what the arguments name, then import the stage and run it."""
    command = COMMANDS[name]
    command.reads(args)
    stage = importlib.import_module(command.module).main
    return stage(args, **known_tasks(stage, args))


def known_tasks(stage, args: argparse.Namespace) -> dict:
    """For stages that check a manifest's tasks, `tasks`, those of `args.prompts`, and `questions`, see there."""
    if "tasks" not in inspect.signature(stage).parameters:
        return {}
    from teachers.words.prompts import load_prompts

    prompts = load_prompts(args.prompts, "{}")
    return {"tasks": prompts.by_task.keys(), "questions": prompts.asking}


class StoppedError(KeyboardInterrupt):
    """A queue, a launcher or the end of a terminal asked to stop."""


@contextmanager
def stop_in_order() -> Iterator[None]:
    """A block that every signal ends as Ctrl-C does, so that what it holds is put away; the second ends it at once."""

    def stop(number: int, frame) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise StoppedError

    numbers = [n for n in STOP_SIGNALS if n != signal.SIGINT and not is_ignored(n)] if is_in_main_thread() else []
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def guard(work, *, debug: bool) -> int:
    """Run `work` and turn a user's error into one line and an exit code.

    `KeyError` and the like are bugs of ours and keep their traceback.
    """
    bind_to_launcher()
    tell_launcher(LAST_WORDS)
    try:
        with stop_in_order():
            code = int(work() or 0)
            sys.stdout.flush()  # a reader that is gone is found here, not at the interpreter's end
        if code:  # the stage has said why
            tell_launcher(ENDED.format(code))
        return code
    except KeyboardInterrupt as stopped:
        print("stopped; files that were finished are kept, and the same command goes on from them", file=sys.stderr)
        if not isinstance(stopped, StoppedError):
            return 130
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


def run_stage(stage, argv: Sequence[str] | None = None) -> int:
    """What `accelerate launch -m distill.STAGE CONFIG [key=value …]` does: `stage(config)` behind the guard."""
    parser = Parser(description=(sys.modules[stage.__module__].__doc__ or "").split("\n\n")[0])
    add_config_arguments(parser)
    add_flags(parser)
    args = parser.parse_intermixed_args(argv)
    if args.quiet or is_quiet():
        hush()

    def work() -> int:
        read_config_arguments(args)
        result = stage(args.config)
        return result if isinstance(result, int) else 0

    return guard(work, debug=args.debug)
