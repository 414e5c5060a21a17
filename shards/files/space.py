"""Whether a disk has room for what is about to be written, and what is said where not. Knows paths and bytes."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPARE = 1.2  # a file system that is filled to the last byte is slow, and what is needed is an estimate
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_space(folder: Path, needed_bytes: int, what: str, *, remedy: str) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OSError: ENOSPC, with what is needed and free, and where.
    """
    existing = Path(os.path.abspath(folder))
    while not existing.exists():
        existing = existing.parent
    free, needed = shutil.disk_usage(existing).free, int(SPARE * needed_bytes)
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} in {folder} need about {needed / 1e9:.3g} GB, but the file system at {_mount_point(existing)} has "
            f"{free / 1e9:.3g} GB free; {remedy}.",
        )


@contextmanager
def explain_full_disk(folder: Path, needs: str) -> Iterator[None]:
    """Turn the system's word for a full disk into one that says what is free, and what needs more."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise OSError(
            error.errno,
            f"disk of {folder} is full ({error.strerror}): {shutil.disk_usage(folder).free:,} bytes are free, but "
            f"{needs} more; free some space and start again, finished shards are kept.",
        ) from error


def _mount_point(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if os.path.ismount(parent))
