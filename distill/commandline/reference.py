"""`python -m distill.commandline.reference FILE`: every field and command, as Markdown, from where each is written.

Fields are read from the dataclasses and the comments beside them, commands from their parsers. Imports no torch.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from distill.cli import build_command_parser
from distill.commandline.commands import COMMANDS
from distill.commandline.new_config import plain, read_comments, to_text
from distill.config import Config
from shards.files.write import open_atomically

OF_A_MACHINE = {"workers": "a process a CPU"}  # defaults that differ from machine to machine
INTRO = """# All fields and commands

Made by `make docs` from the dataclasses of `distill/config/fields.py` and the parsers of the commands: change it there.
"""


def make_reference() -> str:
    """The whole page."""
    return "\n".join([INTRO, *field_lines(), "", *command_lines(), ""])


def field_lines() -> Iterator[str]:
    """A table a section of the config."""
    config, head = Config(), ("| field | default | what it is |", "|---|---|---|")
    comments = read_comments(Config)
    single = [name for name in comments if not dataclasses.is_dataclass(getattr(config, name))]
    yield from ("## Fields of a config", "", *head)
    yield from (row(name, getattr(config, name), comments[name]) for name in single)
    for name in (name for name in comments if name not in single):
        section = getattr(config, name)
        yield from ("", f"### {name}", "", section.__doc__.splitlines()[0], "", *head)
        for field, comment in read_comments(type(section)).items():
            yield row(f"{name}.{field}", getattr(section, field), comment)


def row(name: str, default, comment: str) -> str:
    """One field's line."""
    return f"| `{name}` | `{to_text(plain(default))}` | {escape(comment)} |"


def command_lines() -> Iterator[str]:
    """A part a command: what it does, and what it takes."""
    yield from ("## Commands", "", "Every command also takes `--quiet`, `--debug` and `--help`.")
    for name, command in COMMANDS.items():
        parser = build_command_parser(name)
        yield from ("", f"### distill {name}", "", f"{command.help[:1].upper()}{command.help[1:]}.", "")
        actions = [a for a in parser._actions if a.dest not in ("help", "quiet", "debug")]
        if actions:
            yield from ("| word | what it is |", "|---|---|")
            yield from (f"| `{describe_word(action)}` | {escape(describe_action(action))} |" for action in actions)


def describe_word(action: argparse.Action) -> str:
    """How an argument is written."""
    name = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    values = "" if action.nargs == 0 else f"{name} …" if action.nargs in ("+", "*") else str(name)
    return " ".join([*action.option_strings[-1:], values]).strip().replace("|", "\\|")


def describe_action(action: argparse.Action) -> str:
    """Its help, with its default."""
    default = OF_A_MACHINE.get(action.dest, action.default)
    return (action.help or "") % {**vars(action), "default": default}


def escape(text: str) -> str:
    """Text that may stand in a cell."""
    return text.replace("|", "\\|").replace("<", "\\<")


def main() -> None:
    """Write the page."""
    with open_atomically(Path(sys.argv[1])) as file:
        file.write(make_reference())


if __name__ == "__main__":
    main()
