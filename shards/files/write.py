"""Files and folders that appear whole or not at all: the one home of every atomic write. Knows no content.

What is written lies under a hidden name beside its place (`.NAME.….tmp`) until it is synced; then it is renamed, and
the folder is synced. A process that is killed leaves the hidden name at most.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path


@contextmanager
def open_atomically(path: Path, mode: str = "w") -> Iterator:
    """A file that gets its name only when the block ends without an exception.

    Args:
        path: its name; what was there before stays until then.
        mode: "w" (UTF-8) or "wb".

    Raises:
        OSError: it cannot be written; the error names it.
    """
    temporary = temporary_path(path)
    try:
        with naming(path), open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file of bytes, or of text in UTF-8.

    Raises:
        OSError: as `open_atomically`.
    """
    with open_atomically(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def create_once(path: Path, content: bytes | str) -> None:
    """Write a whole file unless there is one: of two processes one wins, and both find its file.

    Raises:
        OSError: it cannot be written.
    """
    temporary = temporary_path(path)
    try:
        write_atomically(temporary, content)
        with suppress(FileExistsError):
            os.link(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def name_file(temporary: Path, path: Path) -> None:
    """Give a file that was written under another name in the same folder its own name, synced.

    Raises:
        OSError: as `open_atomically`.
    """
    with naming(path):
        _sync_file(temporary)
    _rename(temporary, path)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """A folder to write into that gets the name `path` when the block ends without an exception.

    Raises:
        OSError: something cannot be written, or there is a folder of this name that is not empty.
    """
    temporary = temporary_path(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync_tree(temporary)
        _rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        remove_leftovers(folder.parent, escape(folder.name))
        temporary = temporary_path(folder)
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            folder.mkdir(exist_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)
            sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what a killed process left of files and folders whose names match; only where nobody else writes them."""
    for leftover in folder.glob(f".{pattern}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that no other process takes, of this host, container or node."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block whose failed writes name their file: the system's word for a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None and error.strerror == os.strerror(error.errno):
            error.filename = str(path)
        raise


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
    """Say of a failed write what cannot be written, why, and what to do, in place of whatever a library raised."""
    try:
        with as_system_errors():
            yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}), but must be whole; free space there or name "
            f"another place, then start again: nothing half-written stays."
        ) from error


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    sync_folder(path.parent)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            _sync_file(path)
    sync_folder(folder)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
