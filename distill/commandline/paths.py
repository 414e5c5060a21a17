"""Where what a command line names lies: runs, saved students, recordings. Imports no torch.

A run may be named by its folder or by its config; where configs lie is in `config/recipes.py`.
"""

from collections.abc import Iterable
from pathlib import Path

from distill.config.recipes import find_config, list_recipes, missing_file
from shards.audio.limits import AUDIO_SUFFIXES


def find_run(name: str | Path) -> Path:
    """A run's folder: it itself, or that of a config.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not path.is_file() and str(path) not in list_recipes():
        raise missing_file(
            path, "run", sorted(str(p) for p in path.parent.glob("*") if p.is_dir()), "folders beside it"
        )
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
    if (path / "device.json").is_file():  # exported for devices
        return path
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
