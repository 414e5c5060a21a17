"""Where a config lies that is named: a YAML file, that of a run's folder, or a recipe of the package `configs`."""

from pathlib import Path

import configs
from distill.config.suggestions import did_you_mean, nearest

CONFIG = "config.yaml"  # of a run, in its folder
RECIPES = Path(configs.__file__).parent
LAUNCHES = RECIPES / "accelerate"


def list_recipes(folder: Path = RECIPES) -> list[str]:
    """The names of the recipes, or of the launch files."""
    return sorted(recipe_files(folder))


def recipe_files(folder: Path = RECIPES) -> dict[str, Path]:
    """The recipes by name, or the launch files: those of a folder, and of its rooms but that of the launch files."""
    paths = (path for path in folder.rglob("*.yaml") if folder == LAUNCHES or path.parent != LAUNCHES)
    return {path.stem: path for path in paths}


def find_config(name: str | Path) -> Path:
    """The YAML file that is named: it itself, that of a run's folder, or a recipe's.

    Raises:
        FileNotFoundError: there is none, with those that may be meant.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / CONFIG).is_file():
            return path / CONFIG
        if str(path) not in list_recipes():
            raise FileNotFoundError(f"config is {path}, but that folder holds no {CONFIG}; name a YAML file or a run.")
    return _find(path, "config", "recipe", RECIPES)


def find_launch(name: str | Path) -> Path:
    """The launch file that is named: it itself, or by its name in the package.

    Raises:
        FileNotFoundError: there is none, with those that may be meant.
    """
    return _find(Path(name).expanduser(), "--launch", "launch file", LAUNCHES)


def _find(path: Path, label: str, kind: str, folder: Path) -> Path:
    """A file as it is named, or the one of that name in a folder of the package."""
    if path.is_file():
        return path
    inside = recipe_files(folder)
    if str(path) in inside:
        return inside[str(path)]
    raise missing_file(
        path, label, [*sorted(str(p) for p in path.parent.glob("*.yaml")), *list_recipes(folder)], f"{kind}s"
    )


def missing_file(path: Path, label: str, names: list[str], kinds: str) -> FileNotFoundError:
    """There is nothing of that name: what looks alike, or all that there is."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(Path(name).stem, []).append(name)
    near = [name for match in nearest(path.stem, by_stem) for name in by_stem[match]]
    there = f"{kinds}: {', '.join(names)}." if names else "check the path."
    return FileNotFoundError(f"{label} is {path}, but there is nothing of that name; {did_you_mean(near, there)}")
