"""Files and folders that appear whole or not at all, and a failed write said on one line. Knows no model."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from shards.manifests.manifest import sync_folder, temporary_path


@contextmanager
def as_system_errors() -> Iterator[None]:
    """Let a failed write be the OSError it is: safetensors and tokenizers say its number in a text, torch hides it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@contextmanager
def explain_unwritten(path: Path) -> Iterator[None]:
    """Say of a failed write what cannot be written, why, and what to do.

    Raises:
        OSError: in place of whatever a library raised.
    """
    try:
        with as_system_errors():
            yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}), but must be whole; free space there or name "
            f"another place, then start again: nothing half-written stays."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` write a file, sync it, and only then give it its name.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    temporary = temporary_path(path)
    with explain_unwritten(path):
        try:
            write(temporary)
            sync_file(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into; when the block ends its content is synced and moves into `folder`, over what is there.

    Args:
        folder: is made if it is not there.
        last: the file that moves last, without which the folder counts as empty.

    Raises:
        OSError: something cannot be written; `folder` stays as it was.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name
    with explain_unwritten(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{escape(folder.name)}.*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = temporary_path(folder)
        temporary.mkdir()
        try:
            yield temporary
            for file in (path for path in temporary.rglob("*") if path.is_file()):
                sync_file(file)
            folder.mkdir(exist_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)
            sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
