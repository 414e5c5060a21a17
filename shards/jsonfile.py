"""JSON that this library wrote and reads back: an object with the fields it needs, or one sentence on what is wrong.

A disk, an editor or another program may have left anything under a file's name. Knows no file in particular.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

NAMES = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


class ShapeError(ValueError):
    """What is wrong with a JSON text, as the end of a sentence that begins with the file's name."""


def read_object(path: str | Path, fields: Mapping[str, type]) -> dict:
    """The object in a JSON file.

    Args:
        path: the file.
        fields: those that must be there, with their types; `float` takes whole numbers too.

    Raises:
        FileNotFoundError: there is no such file.
        ShapeError: the text is no JSON, no object, or one without these fields; callers name file and remedy.
    """
    return parse_object(Path(path).read_bytes(), fields)


def parse_object(data: bytes | str, fields: Mapping[str, type]) -> dict:
    """As `read_object`, of a text.

    Raises:
        ShapeError: see `read_object`.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = str(error).splitlines()[0] if isinstance(error, ValueError) else "too deep"
        raise ShapeError(f"is not JSON ({problem})") from error
    if not isinstance(value, dict):
        raise ShapeError(f"holds {show(value)}, but an object is needed")
    for name, kind in fields.items():
        if name not in value:
            raise ShapeError(f"has no {name!r}")
        if not is_a(value[name], kind):
            raise ShapeError(f"has {name!r} {show(value[name])}, but {NAMES[kind]} is needed")
    return value


def is_a(value: object, kind: type) -> bool:
    """Whether a JSON value is of a type; a number is neither a truth value nor infinite."""
    if kind in (int, float):
        kinds = int if kind is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def show(value: object) -> str:
    """A value in a sentence, cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
