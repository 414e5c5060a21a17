"""Where shards come from: local paths, brace ranges, globs and folders, http(s), and whatever fsspec opens.

Knows names and bytes; nothing of what a shard holds, nor of the local copies (`localcopy.py`). A `pipe:` command
is never run.
"""

import difflib
import glob
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from shards.field_types import expand_home
from shards.files.space import DISK_IS_FULL
from shards.tars.archive import ShardError

SHARD_SUFFIX = ".tar"
TARGETS_SUFFIX = ".targets.tar"
OFFLINE = "OfflineModeIsEnabled"  # huggingface_hub's error, which no other try helps; it may not be installed
NUM_TRIES = 5
FIRST_WAIT_SECONDS = 1.0  # doubled after each failed try
TIMEOUT_SECONDS = 60.0  # without a byte
_PIECE = 4 * 2**20  # bytes
_MAX_EXPANDED = 1_000_000
_Result = TypeVar("_Result")


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Names of the shards that paths, URLs, brace ranges (`{000000..000017}`, `{a,b}`), globs and folders stand for.

    A folder stands for its `*.tar` files except target shards. Order: as given, and sorted within a glob or folder.

    Raises:
        ShardError: nothing matches, a shard is given twice, or a name is a command (`pipe:`).
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    specs = [expand_home(str(spec)) for spec in given]
    names = [name for spec in specs for braced in _expand_braces(spec) for name in _expand_pattern(braced)]
    if not names:
        raise ShardError(f"shards is {given}, but no shard matches; {nearest(str(given[0])) if given else 'name one.'}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ShardError(f"{twice} is given more than once, but each shard is read once; remove it from shards.")
    return names


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL."""
    return "://" in name


def is_http(name: str) -> bool:
    """Whether a URL is read by HTTP, which lists no folder."""
    return name.startswith(("http://", "https://"))


def join_place(folder: str | Path, name: str) -> str | Path:
    """A name in a local or remote folder."""
    if is_remote(str(folder)):
        return f"{str(folder).rstrip('/')}/{name}".rstrip("/")
    return Path(folder) / name


def is_folder(name: str) -> bool:
    """Whether a name stands for all shards of a folder."""
    return name.endswith("/") if is_remote(name) else os.path.isdir(name)


def read_small(name: str) -> bytes | None:
    """A small local or remote file whole; None where there is none.

    Raises:
        ShardError: it exists, but cannot be read.
    """
    if not is_remote(name):
        return Path(name).read_bytes() if Path(name).exists() else None
    try:
        return retry(lambda: _read_all(name), name)
    except FileNotFoundError:
        return None


def retry(call: Callable[[], _Result], name: str, *, first_wait_seconds: float = FIRST_WAIT_SECONDS) -> _Result:
    """`call()`, tried NUM_TRIES times with growing waits; what another try cannot help is not tried again.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the local disk is full.
        ShardError: every try failed.
    """
    for attempt in range(NUM_TRIES):
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in DISK_IS_FULL:
                raise
            last = error
            if type(error).__name__ == OFFLINE:
                raise ShardError(f"{name} could not be read: {last} Else copy the shards here.") from error
            if attempt + 1 < NUM_TRIES:
                time.sleep(first_wait_seconds * 2**attempt)
    raise ShardError(
        f"{name} could not be read in {NUM_TRIES} tries: {last}; look at the network, then resume."
    ) from last


def remote_size(name: str) -> int | None:
    """Bytes of a remote file; None where there is none.

    Raises:
        ShardError: nobody says.
    """

    def ask() -> int:
        with _open_remote(name, 0) as (_, _, length):
            return int(length or 0)

    try:
        return retry(ask, name)
    except FileNotFoundError:
        return None


def download(name: str, path: Path) -> None:
    """Fetch a remote file whole. Append to what an earlier try left where the server can, else begin anew."""
    start = path.stat().st_size if path.exists() else 0
    with _open_remote(name, start) as (source, is_partial, length), open(path, "ab" if is_partial else "wb") as file:
        while piece := source.read(_PIECE):
            file.write(piece)
        if length is not None and file.tell() != length:
            raise OSError(f"{file.tell()} of {length} bytes came")


def _read_all(name: str) -> bytes:
    with _open_remote(name, 0) as (source, _, length):
        data = source.read()
    if length is not None and len(data) != length:
        raise OSError(f"{len(data)} of {length} bytes came")
    return data


@contextmanager
def _open_remote(name: str, start: int) -> Iterator[tuple]:
    """An open stream, whether it begins at byte `start` (else at 0), and the length of the whole file if known."""
    if not is_http(name):
        filesystem, path = open_filesystem(name)
        with filesystem.open(path, "rb") as file:
            file.seek(start)
            yield file, start > 0, filesystem.info(path)["size"]
        return
    import http.client  # here: they cost every command 40 ms
    import urllib.error
    import urllib.request

    request = urllib.request.Request(name, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            is_partial = response.status == 206
            length = response.headers["Content-Length"]
            yield response, is_partial, None if length is None else int(length) + (start if is_partial else 0)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(name) from error
        if 400 <= error.code < 500 and error.code not in (408, 416, 429):
            raise ShardError(
                f"{name} is refused with status {error.code}; look at the address and the rights."
            ) from error
        raise
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error


def open_filesystem(name: str) -> tuple:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        ShardError: its package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{name} cannot be opened: {error}; install fsspec's package for it.") from error


def _expand_braces(spec: str) -> list[str]:
    """`a-{000..002}.tar` and `{x,y}.tar`, several to a name, none within another."""
    if spec.lstrip().startswith("pipe:") or "::" in spec:
        raise ShardError(
            f"shards is {spec!r}, but no command and no chained file system is opened; give paths or URLs."
        )
    match = re.search(r"\{([^{}]*)\}", spec)
    if not match:
        return [spec]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last, width = int(numbers[1]), int(numbers[2]), len(numbers[1])
        if not 0 <= last - first < _MAX_EXPANDED:
            raise ShardError(
                f"shards is {spec!r}, but {match[0]} counts upwards and at most {_MAX_EXPANDED}; write it so."
            )
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise ShardError(
            f"shards is {spec!r}, but {match[0]} is neither a range {{000..017}} nor a list {{a,b}}; write it so."
        )
    return [done for choice in choices for done in _expand_braces(spec[: match.start()] + choice + spec[match.end() :])]


def _expand_pattern(name: str) -> list[str]:
    """The shards of one folder, glob or plain name; an error where there is none."""
    if is_remote(name):
        if not name.endswith("/") and not glob.has_magic(name):
            return [name]
        if is_http(name):
            return _listed(name)
        filesystem, path = open_filesystem(f"{name}*{SHARD_SUFFIX}" if name.endswith("/") else name)
        try:
            found = [filesystem.unstrip_protocol(match) for match in filesystem.glob(path)]
        except OSError as error:
            raise ShardError(
                f"shards is {name!r}, but what is there cannot be listed ({' '.join(str(error).split())}); look at the "
                f"network, or copy the shards here."
            ) from error
    elif os.path.isdir(name):
        found = glob.glob(os.path.join(glob.escape(name), f"*{SHARD_SUFFIX}"))
    elif glob.has_magic(name):
        found = glob.glob(name)
    else:
        found = [name] if os.path.exists(name) else []
    found = sorted(match for match in found if not match.endswith(TARGETS_SUFFIX))
    if not found:
        raise ShardError(f"shards is {name!r} ({os.path.abspath(name)}), but no shard matches; {nearest(name)}")
    return found


def _listed(name: str) -> list[str]:
    """The shards of a folder behind http(s), which only the `index.json` that `distill pack` left there can tell."""
    listing = read_small(f"{name}index.json") if name.endswith("/") else None
    try:
        shards = [f"{name}{shard['name']}" for shard in json.loads(listing or "")["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"shards is {name!r}, but http(s) lists no folder and there is no index.json of distill pack in it; give a "
            f"brace range {{000000..000017}}."
        ) from error
    return shards


def nearest(name: str) -> str:
    """A sentence on what is there instead."""
    folder = os.path.dirname(name) or "."
    if is_remote(name):
        return "look at the address."
    if not os.path.isdir(folder):
        return f"there is no folder {folder}."
    there = sorted(entry for entry in os.listdir(folder) if entry.endswith(SHARD_SUFFIX))
    near = difflib.get_close_matches(os.path.basename(name), there, n=3, cutoff=0.3) or there[:3]
    return f"{folder} has {', '.join(near)}." if near else f"{folder} has no {SHARD_SUFFIX} file."
