"""What a config is read from, one over the other: YAML files and `section.key=value` words. Knows no field.

A file that differs from another one in a few keys names that one as `base`, relative to itself: it is read first.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

BASE = "base"  # the key of the file that a file is read over


def read_files(path: Path) -> list[tuple[Path, DictConfig]]:
    """What a YAML file says, after what the file says that it names as its base.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the base has a base itself.
    """
    own = read_file(path, "config")
    if BASE not in own:
        return [(path, own)]
    base = path.parent / str(own.pop(BASE))
    theirs = read_file(base, f"{BASE} of {path}")
    if BASE in theirs:
        raise ValueError(
            f"{BASE} of {path} is {base}, but that has the base {theirs[BASE]} itself and one level is all there is; "
            f"name {theirs[BASE]} and write the other keys out."
        )
    return [(base, theirs), (path, own)]


def read_file(path: Path, name: str) -> DictConfig:
    """One YAML file, as it stands there."""
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"{name} is {path}, but there is no such file; YAML files beside it: {near}.")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is {path}, but that is not YAML ({flatten(error)}); correct the file.") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{name} is {path}, but that holds a list and a config is keys and values; correct the file.")
    return tree


def read_words(overrides: Sequence[str]) -> DictConfig:
    """What `section.key=value` words say."""
    for word in overrides:
        if "=" not in word:
            raise ValueError(f"override is {word!r}, but must read section.key=value in one word; correct the command.")
        try:
            OmegaConf.from_dotlist([word])
        except yaml.YAMLError as error:
            raise ValueError(
                f"override is {word!r}, but its value is not YAML ({flatten(error)}); correct the command."
            ) from error
    return OmegaConf.from_dotlist(list(overrides))


def flatten(error: Exception) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())
