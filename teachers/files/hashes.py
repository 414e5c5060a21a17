"""Hashes of large files, computed once: remembered by path, size and times, so that later starts are quick.

The memory is a small JSON file in the user's cache folder; without it, or where it cannot be written, files are hashed
again and nothing else changes. Knows no format of weights.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from shards.manifests.manifest import open_atomically

LEAST_BYTES = 1_000_000  # smaller files are hashed each time
SETTLED_SECONDS = 2.0  # a file that was written just now may be written again within one tick of its disk's clock


def memory_path() -> Path:
    """Where hashes are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "hashes.json"


def remember_hash(path: Path) -> str:
    """sha256 of a file, in hex, from memory where path, size, inode and times are those it was computed at."""
    path = Path(path).resolve()
    before = describe_file(path)
    if before[0] >= LEAST_BYTES:
        known = read_memory().get(str(path))
        if known is not None and known[:-1] == before:
            return known[-1]
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    is_settled = time.time_ns() - max(before[2:]) > SETTLED_SECONDS * 1e9
    if before[0] >= LEAST_BYTES and is_settled and describe_file(path) == before:
        with suppress(OSError):  # a home that cannot be written costs the next start some seconds
            memory_path().parent.mkdir(parents=True, exist_ok=True)
            memory = read_memory() | {str(path): [*before, sha256]}
            with open_atomically(memory_path()) as file:
                json.dump(memory, file, indent=0)
    return sha256


def describe_file(path: Path) -> list[int]:
    """Size, inode, and when content and entry last changed, ns: a file that is put in another's place differs."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def read_memory() -> dict[str, list]:
    """What is remembered; nothing where the file is not there or not ours."""
    try:
        memory = json.loads(memory_path().read_text())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(memory, dict) and all(isinstance(entry, list) and len(entry) == 5 for entry in memory.values())
    return memory if is_ours else {}
