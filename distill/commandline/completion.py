"""Completion of the command line: `eval "$(distill completion bash)"`, or zsh or fish. Imports no stage.

The script that is printed asks `distill completion SHELL -- WORD …` what the last word may become, so that it knows
every command, option, recipe and field that there is.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence

from distill.config.recipes import list_recipes

Parsers = Mapping[str, Callable[[], argparse.ArgumentParser]]  # by command: what builds its parser
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


def complete(words: Sequence[str], parsers: Parsers) -> list[str]:
    """What the last word may become, given those before it; empty where a file is meant, or nothing is known."""
    *before, last = words or [""]
    if not before:
        return [name for name in parsers if " " not in name and name.startswith(last)]
    name = " ".join(before[:2]) if before[:2] == ["stats", "model"] else before[0]
    if name not in parsers:
        return []
    actions = parsers[name]()._actions
    if last.startswith("-"):
        options = sorted(option for action in actions for option in action.option_strings if option.startswith("--"))
        return [option for option in options if option.startswith(last)]
    takes_fields = any("key=value" in str(action.metavar) for action in actions)
    found = list_recipes() if takes_fields or name == "new" else []
    return [word for word in [*found, *(_fields(last) if takes_fields else [])] if word.startswith(last)]


def _fields(last: str) -> list[str]:
    """Fields of a config as `section.field=`, and the values of one that has a few, where its name is there."""
    from distill.config import list_fields
    from distill.config.rules import choices_of

    name, equals, _ = last.partition("=")
    if equals:
        return [f"{name}={value}" for value in choices_of(name) or () if isinstance(value, str)]
    return [f"{field}=" for field in list_fields()] if last else []


def main(args: argparse.Namespace, parsers: Parsers) -> int:
    """Run `distill completion`."""
    print("\n".join(complete(args.words, parsers)) if args.words else SCRIPTS[args.shell])
    return 0
