"""Completion of the command line: `eval "$(distill completion bash)"`, or zsh or fish. Imports no stage.

The script that is printed asks `distill completion SHELL -- WORD …` what the last word may become, so that it knows
every command, option, recipe and field that there is.
"""

import argparse
from collections.abc import Sequence

from distill.commandline.commands import COMMANDS
from distill.commandline.places import list_recipes

SCRIPTS = {
    "bash": """_distill() {
  local IFS=$'\\n' words=("${COMP_WORDS[@]:1:COMP_CWORD}")
  COMPREPLY=($(distill completion bash -- "${words[@]}"))
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o default -F _distill distill""",
    "zsh": """_distill() {
  local -a found
  found=("${(@f)$(distill completion zsh -- "${(@)words[2,CURRENT]}")}")
  compadd -S '' -- ${found:#} || _files
}
compdef _distill distill""",
    "fish": """complete -c distill -a '(distill completion fish -- (commandline -opc)[2..] (commandline -ct))'""",
}


def complete(words: Sequence[str]) -> list[str]:
    """What the last word may become, given those before it; empty where a file is meant, or nothing is known."""
    *before, last = words or [""]
    if not before:
        return [name for name in COMMANDS if " " not in name and name.startswith(last)]
    name = " ".join(before[:2]) if before[:2] == ["stats", "model"] else before[0]
    if name not in COMMANDS:
        return []
    if last.startswith("-"):
        return [option for option in _options(name) if option.startswith(last)]
    takes_fields = any("key=value" in metavar for metavar in _metavars(name))
    found = list_recipes() if takes_fields or name == "new" else []
    return [word for word in [*found, *(_fields(last) if takes_fields else [])] if word.startswith(last)]


def _fields(last: str) -> list[str]:
    """Fields of a config as `section.field=`, and the values of one that has a few, where its name is there."""
    from distill.config import list_fields
    from distill.config.rules import CHOICES

    name, equals, _ = last.partition("=")
    if equals:
        return [f"{name}={value}" for value in CHOICES.get(name, ()) if isinstance(value, str)]
    return [f"{field}=" for field in list_fields()] if last else []


def _parser(name: str) -> argparse.ArgumentParser:
    from distill.cli import build_command_parser

    return build_command_parser(name)


def _options(name: str) -> list[str]:
    return sorted(o for action in _parser(name)._actions for o in action.option_strings if o.startswith("--"))


def _metavars(name: str) -> list[str]:
    return [str(action.metavar) for action in _parser(name)._actions]


def main(args: argparse.Namespace) -> int:
    """Run `distill completion`."""
    print("\n".join(complete(args.words)) if args.words else SCRIPTS[args.shell])
    return 0
