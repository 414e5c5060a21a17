"""The command line: `distill COMMAND …`. Reads the words, and imports a stage only when they are right.

What there is to call is in `commands.py`; here words become a call.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from distill.command import Parser, add_flags, guard
from distill.commandline.commands import COMMANDS, find_unknown
from distill.config.suggestions import COMMANDS as OTHER_COMMANDS
from distill.config.suggestions import did_you_mean, nearest
from shards.status import set_quiet

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")  # that decide what a run does
FLAGS = ("--debug", "--quiet")  # of every command, before it as good as behind it


class Version(argparse.Action):
    """Print our version and those of the packages that decide what a run does, without importing them."""

    def __call__(self, parser, *_) -> NoReturn:
        from importlib.metadata import version
        from platform import python_version

        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        print(f"distill-audio {version('distill-audio')}, Python {python_version()}, {versions}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the top level alone; a command's own is built when it is chosen."""
    lines = "\n".join(f"  {name:<12} {command.help}" for name, command in COMMANDS.items() if " " not in name)
    parser = Parser(
        prog="distill",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distill a SALMONN audio language model into a small 4-bit student.",
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


def read_description(module: str) -> str:
    """The first paragraph of a module's docstring, without importing it."""
    docstring = ast.get_docstring(ast.parse(Path(importlib.util.find_spec(module).origin).read_text()))
    return docstring.split("\n\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, which is 2 where the words are none that it takes."""
    words = list(sys.argv[1:] if argv is None else argv)
    while len(words) > 1 and words[0] in FLAGS:
        words = [*words[1:], words[0]]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
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
        set_quiet()
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
    return stage(args, **given_to(stage, args))


def given_to(stage, args: argparse.Namespace) -> dict:
    """What a stage asks for beside its arguments, by the names that its `main` takes.

    Args:
        stage: takes `tasks` where it checks a manifest's tasks, which are those of the file `args.prompts`, and
            `parsers` where it knows every command.
        args: the arguments of the command line.
    """
    asked, given = inspect.signature(stage).parameters, {}
    if "parsers" in asked:
        given["parsers"] = {name: partial(build_command_parser, name) for name in COMMANDS}
    if "tasks" in asked:
        from shards.manifests.manifest import KnownTasks
        from teachers.words.prompts import load_prompts

        prompts = load_prompts(args.prompts, "{}")
        given["tasks"] = KnownTasks(prompts.by_task.keys(), prompts.asking)
    return given
