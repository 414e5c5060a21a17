"""`distill new [RECIPE] FILE`: a config to start from, with every field and what it means.

What the recipe sets stands there as it is; every other field is commented out, with its default. What a field means is
read from the comments beside the dataclasses, where it is written once.
"""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml

from distill.config import Config, load_config
from distill.config.recipes import list_recipes
from shards.files.write import open_atomically

NEEDED = ("corpus.train", "corpus.test", "teacher.path", "student.llm")  # what nobody can guess
FIELD = re.compile(r"    (\w+): [^#]+?(?:  # (.*))?$")
MORE = re.compile(r"    # (.*)$")  # the rest of a comment that did not fit beside its field


def write_new_config(file: Path, recipe: str | None = None) -> None:
    """Write a config to start from.

    Args:
        file: that is written; what is there stays.
        recipe: whose values it takes: its name, a YAML file or a run's folder; None: nothing but defaults.

    Raises:
        FileExistsError: there is a file of that name.
        FileNotFoundError: there is no such recipe.
    """
    if file.exists():
        raise FileExistsError(f"FILE is {file}, but that exists and is not overwritten; choose another name.")
    if recipe is None and str(file) in list_recipes():
        raise ValueError(f"FILE is {file}, but that is the name of a recipe; write `distill new {file} own.yaml`.")
    config = Config() if recipe is None else load_config(recipe)
    origin = f"from {recipe}" if recipe else "from the defaults: fill in what is empty"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(file) as out:
        out.write(f"# A config of distill, {origin}. What is commented out has the value that stands there.\n")
        out.writelines(f"{line}\n" for line in lines_of(config, () if recipe else NEEDED))


def lines_of(config: Config, needed: tuple[str, ...]) -> Iterator[str]:
    """The YAML, section by section; `needed` fields are never commented out."""
    for outer in dataclasses.fields(Config):
        value, default = getattr(config, outer.name), getattr(Config(), outer.name)
        if not dataclasses.is_dataclass(value):
            yield from field_lines(outer.name, value, value == default, read_comments(Config)[outer.name], "")
            continue
        yield from ("", f"# {value.__doc__.splitlines()[0]}", f"{outer.name}:")
        for field in dataclasses.fields(value):
            own = getattr(value, field.name)
            is_default = own == getattr(default, field.name) and f"{outer.name}.{field.name}" not in needed
            yield from field_lines(field.name, own, is_default, read_comments(type(value))[field.name], "  ")


def field_lines(name: str, value, is_default: bool, comment: str, indent: str) -> Iterator[str]:
    """A field on one line, or below its comment where both are too long for one."""
    line = f"{indent}{'# ' if is_default else ''}{name}: {to_text(plain(value))}"
    if len(line) + len(comment) > 116:
        yield f"{indent}# {comment}"
        yield line
    else:
        yield f"{line}  # {comment}"


def to_text(value) -> str:
    """A value as YAML has it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def plain(value):
    """Tuples as lists, which is how YAML has them."""
    return list(value) if isinstance(value, tuple) else value


@cache
def read_comments(section: type) -> dict[str, str]:
    """What the comment beside each field of a dataclass says."""
    comments: dict[str, str] = {}
    for line in inspect.getsource(section).splitlines():
        if match := FIELD.match(line):
            name, comments[match[1]] = match[1], match[2] or ""
        elif (match := MORE.match(line)) and comments:
            comments[name] += f" {match[1]}"
    return comments


def main(args: argparse.Namespace) -> int:
    """Run `distill new`."""
    write_new_config(args.file, args.recipe)
    print(f"{args.file} is written; `distill pipeline {args.file}` runs it")
    return 0
