"""Where what a command line names lies: configs, recipes, launch files, runs and saved students. Imports no torch.

A config may be named by its file, by the folder of a run of it, or as a recipe of the package `configs`; a run by its
folder or by its config.
"""

from collections.abc import Iterable
from pathlib import Path

import configs
from distill.commandline.hints import did_you_mean, nearest

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
CONFIG = "config.yaml"  # of a run, in its folder
RECIPES = Path(configs.__file__).parent
LAUNCHES = RECIPES / "accelerate"


def list_recipes(folder: Path = RECIPES) -> list[str]:
    """The names of the recipes, or of the launch files."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


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


def find_run(name: str | Path) -> Path:
    """A run's folder: it itself, or that of a config.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not path.is_file() and str(path) not in list_recipes():
        raise _missing(path, "run", sorted(str(p) for p in path.parent.glob("*") if p.is_dir()), "folders beside it")
    from distill.config import load_config

    folder = load_config(find_config(path)).run_folder
    if not folder.is_dir():
        raise FileNotFoundError(f"run is that of {path}, {folder}, but there is no such folder; train it first.")
    return folder


def find_student(name: str | Path) -> Path:
    """The folder of a saved student: it itself, or that of a run.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(name).expanduser()
    if not (path / "config.json").is_file():
        path = find_run(path)
    for folder in (path, path / "student"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"student is {name}, but neither that folder nor student/ inside it holds a config.json; name a saved student, "
        f"an export or a finished run."
    )


def list_recordings(names: Iterable[Path]) -> list[Path]:
    """Files as they are named, and those of folders that are audio by their suffix, in order."""
    paths = []
    for path in (Path(name).expanduser() for name in names):
        inside = path.rglob("*") if path.is_dir() else [path]
        paths += sorted(file for file in inside if not path.is_dir() or file.suffix.lower() in AUDIO_SUFFIXES)
    return paths


def _find(path: Path, label: str, kind: str, folder: Path) -> Path:
    """A file as it is named, or the one of that name in a folder of the package."""
    if path.is_file():
        return path
    inside = folder / f"{path}.yaml"
    if str(path) == path.name and inside.is_file():
        return inside
    raise _missing(
        path, label, [*sorted(str(p) for p in path.parent.glob("*.yaml")), *list_recipes(folder)], f"{kind}s"
    )


def _missing(path: Path, label: str, names: list[str], kinds: str) -> FileNotFoundError:
    """There is nothing of that name: what looks alike, or all that there is."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(Path(name).stem, []).append(name)
    near = [name for match in nearest(path.stem, by_stem) for name in by_stem[match]]
    there = f"{kinds}: {', '.join(names)}." if names else "check the path."
    return FileNotFoundError(f"{label} is {path}, but there is nothing of that name; {did_you_mean(near, there)}")
