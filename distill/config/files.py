"""What a config is read from, one over the other: YAML files and `section.key=value` words. Knows no field.

A file that differs from another one in a few keys names that one as `base`, relative to itself: it is read first.
Scalars without quotes stay `Plain` text until the type of their field says what they are.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from yaml.composer import Composer

from shards.field_types import Plain, expand_home

BASE = "base"  # the key of the file that a file is read over
MOST_VALUES = 10_000  # in one file, aliases counted as often as they stand there
MOST_LEVELS = 8  # of lists and mappings in each other
TAGS = {f"tag:yaml.org,2002:{name}" for name in
        ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "seq", "map")}  # fmt: skip

if yaml.__with_libyaml__:  # five times as fast

    class Loader(Composer, yaml.CSafeLoader):
        """libyaml's parser, composed in Python: nodes too deep end in a RecursionError and not in a dead process."""

        def __init__(self, text: str):
            Composer.__init__(self)
            yaml.CSafeLoader.__init__(self, text)

    Dumper: type = yaml.CSafeDumper
else:
    Loader, Dumper = yaml.SafeLoader, yaml.SafeDumper


def read_files(path: Path) -> list[tuple[Path, dict]]:
    """What a YAML file says, after what the file says that it names as its base.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the base has a base itself.
    """
    own = read_file(path, "config")
    if BASE not in own:
        return [(path, own)]
    base = path.parent / expand_home(str(own.pop(BASE)))
    theirs = read_file(base, f"{BASE} of {path}")
    if BASE in theirs:
        raise ValueError(
            f"{BASE} of {path} is {base}, but that has the base {theirs[BASE]} itself and one level is all there is; "
            f"name {theirs[BASE]} and write the other keys out."
        )
    return [(base, theirs), (path, own)]


def read_file(path: Path, name: str) -> dict:
    """One YAML file, as it stands there."""
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"{name} is {path}, but there is no such file; YAML files beside it: {near}.")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is {path}, but that is not YAML ({one_line(error)}); correct the file.") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        what = "a list" if isinstance(tree, list) else "one value"
        raise ValueError(f"{name} is {path}, but that holds {what} and a config is keys and values; correct the file.")
    return tree


def read_words(overrides: Sequence[str], is_text: Callable[[str], bool]) -> dict:
    """What `section.key=value` words say.

    Args:
        overrides: the words.
        is_text: whether the field of a key takes text: such a value is what stands there, unless it is quoted.
    """
    tree: dict = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ValueError(f"override is {word!r}, but must read section.key=value in one word; correct the command.")
        try:
            value = Plain(text.strip()) if is_text(".".join(parts)) and text[:1] not in ("'", '"') else read_yaml(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(
                f"override is {word!r}, but its value is not YAML ({one_line(error)}); correct the command."
            ) from error
        for part in reversed(parts):
            value = {Plain(part): value}
        lay_over_(tree, value)
    return tree


def lay_over_(tree: dict, layer: Mapping) -> None:
    """Put what a layer says over a tree, in place: mappings meet key by key, anything else takes the other's place."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            lay_over_(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def read_yaml(text: str):
    """One YAML document as dicts, lists, quoted `str` and unquoted `Plain`; None where it is empty.

    Raises:
        yaml.YAMLError: it is no YAML, has a key twice, a tag of code, or more in it than any config has.
    """
    try:
        node = _compose(text, Loader)
    except (yaml.YAMLError, UnicodeError):
        node = _compose(text, yaml.SafeLoader)  # which shows the place
    return None if node is None else _read_node(node, [], 0)


def _compose(text: str, kind: type) -> yaml.Node | None:
    loader = kind(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _read_node(node: yaml.Node, seen: list, level: int):
    """A node as plain data; `seen` grows by one a node."""
    seen.append(node)
    if len(seen) > MOST_VALUES or level > MOST_LEVELS:
        raise yaml.MarkedYAMLError(problem="it holds more values, or deeper ones, than a config", problem_mark=None)
    if node.tag not in TAGS:
        raise _error(f"could not determine a constructor for the tag {node.tag!r}", node)
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(one, seen, level + 1) for one in node.value]
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else Plain(node.value)
    tree: dict = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error("found a key that is a list or a mapping", key)
        if key.value in tree:
            raise _error(f"found duplicate key {key.value}", key)
        tree[Plain(key.value)] = _read_node(value, seen, level + 1)
    return tree


def _error(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def one_line(error: Exception) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())
