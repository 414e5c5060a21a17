"""SHA-256 of files: computed anew where the content must be proved, remembered where a frozen file is only named.

The memory is a small JSON file in the user's cache folder, by path, size, inode and times; without it, or where it
cannot be written, files are hashed again and nothing else changes. Knows no format.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shards.files.usercache import user_cache
from shards.files.write import write_atomically

LEAST_BYTES = 1_000_000  # smaller files are hashed each time
SETTLED_SECONDS = 2.0  # a file that was written just now may be written again within one tick of its disk's clock
MAX_REMEMBERED = 10_000  # files; the oldest are forgotten


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content as it is now, in hex: for checking that a file is whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember_hash(path: Path, compute: Callable[[Path], str] = hash_file, name: str = "") -> str:
    """The hash of a file, from memory where path, size, inode and times are those it was computed at.

    Args:
        path: the path of a file that is written once, such as a model's weights.
        compute: the hash, by default SHA-256 of the bytes.
        name: the name of another hash than that.
    """
    path = Path(path).resolve()
    before, key = describe_file(path), f"{path} {name}".rstrip()
    known = read_memory().get(key) if before[0] >= LEAST_BYTES else None
    if known is not None and known[:-1] == before:
        return known[-1]
    digest = compute(path)
    is_settled = time.time_ns() - max(before[2:]) > SETTLED_SECONDS * 1e9
    if before[0] >= LEAST_BYTES and is_settled and describe_file(path) == before:
        _remember(key, [*before, digest])
    return digest


def memory_path() -> Path:
    """Where hashes are remembered."""
    return user_cache("hashes.json")


def describe_file(path: Path) -> list[int]:
    """Size, inode, and when content and entry last changed, ns: a file that is put in another's place differs."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def read_memory() -> dict[str, list]:
    """What is remembered; nothing where the file is not there or not ours."""
    try:
        memory = json.loads(memory_path().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(memory, dict) and all(isinstance(entry, list) and len(entry) == 5 for entry in memory.values())
    return memory if is_ours else {}


def _remember(key: str, entry: list) -> None:
    with suppress(OSError):  # a home that cannot be written costs the next start some seconds
        memory_path().parent.mkdir(parents=True, exist_ok=True)
        memory = {**read_memory(), key: entry}
        write_atomically(memory_path(), json.dumps(dict(list(memory.items())[-MAX_REMEMBERED:]), indent=0))
