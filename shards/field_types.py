"""What a field of a dataclass takes by its type, whether Python, YAML or a word of a command line gave it.

`Plain` is what YAML left without quotes: it becomes what the field is, so that a name may be `2024` and a share `1e-4`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
NULLS = ("", "~", "null", "Null", "NULL")
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")


class Plain(str):
    """Text that stood without quotes: a number, a truth, nothing at all, or text, as the field is."""


def convert_fields(section, prefix: str) -> None:
    """Give each field of a frozen dataclass its own type, in place.

    Args:
        section: the dataclass, as its `__post_init__` finds it.
        prefix: what stands before a field's name, such as `train.`.

    Raises:
        ValueError: a value is of another type, with the field's name.
    """
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        try:
            converted = convert(value, field.type)
        except TypeError:
            if value is None or is_null(value):
                raise ValueError(f"{key} is empty, but must have a value; give one, or '' for no text.") from None
            raise ValueError(f"{key} is {value!r}, but must be {describe_kind(field.type)}; correct it.") from None
        object.__setattr__(section, field.name, expand_home(converted))


def is_null(value) -> bool:
    """Whether YAML has nothing there."""
    return isinstance(value, Plain) and value in NULLS


def expand_home(value):
    """A path with the home folder that `~/` stands for, as text or `Path`; anything else as it is."""
    is_of_home = isinstance(value, str | Path) and str(value).startswith("~/")
    return type(value)(os.path.expanduser(value)) if is_of_home else value


def to_path(text: str) -> Path:
    """A path as a user types it; a shell leaves `~` alone behind `--root=`."""
    return Path(text).expanduser()


def convert(value, kind):
    """A value as its field's type: 1 where 1.0 is meant, a list for a tuple, numpy's numbers as Python's.

    Raises:
        TypeError: it is of another type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(value, Plain):
        value = read_plain(value, kind if origin not in (Union, UnionType) else _without_none(inner))
    if origin in (Union, UnionType):
        return None if value is None else convert(value, _without_none(inner))
    if origin is dict and isinstance(value, Mapping):
        return {convert(key, inner[0]): convert(one, inner[1]) for key, one in value.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        if origin is tuple and Ellipsis not in inner and len(value) != len(inner):
            raise TypeError(kind)
        return origin(convert(one, inner[0]) for one in value)
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if (kind in (str, bool) or dataclasses.is_dataclass(kind)) and isinstance(value, kind):
        return value
    raise TypeError(kind)


def read_plain(text: Plain, kind):
    """What text without quotes says to a field of a kind; what is none of it stays text, and is refused as such."""
    if text in NULLS:
        return None
    if kind is bool:
        return TRUTHS.get(text.lower(), str(text))
    if kind is int and INTEGER.fullmatch(text):
        return int(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return str(text)
    return str(text)


def _without_none(kinds: tuple):
    return next(kind for kind in kinds if kind is not NoneType)


def describe_kind(kind) -> str:
    """A type in words."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return describe_kind(_without_none(inner))
    if get_origin(kind) is tuple and Ellipsis not in inner:
        return f"a list of {len(inner)}, each {describe_kind(inner[0])}, in brackets"
    if get_origin(kind) in (list, tuple):
        return f"a list, of {describe_kind(inner[0]).removeprefix('a ')} each, in brackets"
    if get_origin(kind) is dict:
        return " to ".join(describe_kind(one) for one in inner) + ", by name"
    return f"a {kind.__name__}" if dataclasses.is_dataclass(kind) else KINDS[kind]
