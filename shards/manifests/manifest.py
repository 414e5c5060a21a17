"""Manifests: which recording goes with which answer. Knows paths and fields, and never opens an audio file.

Two forms are read, in memory that does not grow with them: SALMONN's `{"annotation": [{"path", "text", "task", "Q"?,
"expand_wav"?}, ...]}` and JSON Lines with the same fields. `source`, `speaker`, and `start` and `end` (seconds, for a
part of a long recording) may be there too; without `source`, a row belongs to the data set its folder is named after.
"""

import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.files.write import open_atomically
from shards.manifests.records import RowError, read_rows

ARRAY = "annotation"
LINES_SUFFIXES = (".jsonl", ".ndjson")
MAX_CHARS_A_ROW = 200_000  # a shard takes a megabyte, and a character up to four bytes
NUM_NAMES_SCANNED = 100_000  # of a folder, when names near a missing one are looked for


@dataclass(frozen=True)
class Entry:
    """One row of a manifest."""

    path: Path  # absolute, or as reached from the working directory
    text: str | None  # the answer; None: unlabelled
    task: str
    question: str | None = None  # the row's "Q"
    source: str = ""  # name of the data set
    more_paths: tuple[Path, ...] = ()  # the row's "expand_wav": recordings that follow the first
    speaker: str | None = None
    start: float = 0.0  # seconds, where the sample is a part of its recording
    end: float | None = None  # seconds; None: the sample is the whole recording
    number: int = 0  # of the row, from 0
    place: str = ""  # in the file, for messages: annotation[3]
    digest: str = ""  # of the row's content as written; see `key`

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every recording of the sample, in order."""
        return (self.path, *self.more_paths)

    @property
    def key(self) -> str:
        """The sample's name in its shard: unique by the row's number, tied to the content by the digest."""
        return f"{self.number:08d}-{self.digest}"


def read_manifest(path: Path, *, root: Path | None = None) -> Iterator[Entry]:
    """Entries of a manifest in its order.

    Args:
        path: SALMONN's JSON or JSON Lines, told by what it holds; where that may be either, by the suffix (.jsonl and
            .ndjson are lines). UTF-8, or UTF-16 with its mark.
        root: the folder that paths are relative to, even those that begin with a slash; by default the manifest's own,
            and absolute paths stand as they are.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: it is not JSON, or a row is not an entry (`RowError`).
    """
    for row in scan_manifest(path, root=root):
        if isinstance(row, RowError):
            raise row
        yield row


@dataclass(frozen=True)
class KnownTasks:
    """The tasks that there are, as a file of prompts has them."""

    names: Collection[str] | None = None  # None: any
    questions: Collection[str] = ()  # those whose rows must bring a question


ANY_TASK = KnownTasks()


def scan_manifest(
    path: Path, *, root: Path | None = None, questions: Collection[str] = ()
) -> Iterator[Entry | RowError]:
    """As `read_manifest`, but a row that is not an entry is yielded as its `RowError`, for the caller to count.

    Args:
        path, root: as there.
        questions: tasks whose rows must bring a question.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise missing_file_error(path)
    rows = read_rows(path, ARRAY, is_lines=path.suffix in LINES_SUFFIXES)
    source = path.resolve().parent.name
    for number, place, value in rows:
        if isinstance(value, RowError):
            yield value
            continue
        try:
            yield _to_entry(value, path, number, place, root, source, questions)
        except RowError as error:
            yield error


def check_tasks(entries: Iterable[Entry], tasks: Collection[str] | None) -> Iterator[Entry]:
    """Pass entries on, and refuse the first whose task is not one of `tasks` (None: all are).

    Raises:
        ValueError: unknown task, with the nearest known one.
    """
    for entry in entries:
        if tasks is not None and entry.task not in tasks:
            raise ValueError(describe_unknown_task(entry, tasks))
        yield entry


def describe_unknown_task(entry: Entry, tasks: Collection[str]) -> str:
    """That the entry's task is none of `tasks`, and the nearest one."""
    near = difflib.get_close_matches(entry.task, tasks, 1)
    hint = f"did you mean {near[0]!r}? Else " if near else ""
    return (
        f"task of {entry.place} is {entry.task!r}, but there are prompts for {', '.join(sorted(tasks))} alone; "
        f"{hint}give the prompts it was made for: --prompts FILE, or teacher.prompts in a config."
    )


def check_paths(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Pass entries on, and refuse the first that names a file which is not there.

    Raises:
        FileNotFoundError: with the nearest names that exist.
    """
    for entry in entries:
        for path in entry.paths:
            if not os.path.exists(path):
                raise missing_file_error(path, place=f"{entry.place}.path")
        yield entry


def missing_file_error(path: Path, *, place: str = "") -> FileNotFoundError:
    """An error that names what exists and is most like the path that does not."""
    parent = path.parent
    missing = path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, missing = parent.parent, parent.name
    names = sorted(itertools.islice((child.name for child in parent.iterdir()), NUM_NAMES_SCANNED))
    near = difflib.get_close_matches(missing, names, 3, cutoff=0.4)
    where, folder = f"{place} is {path}" if place else f"{path} is named", os.path.abspath(parent)
    hint = f"nearest in {folder}: {', '.join(near)}" if near else f"{folder} holds nothing like {missing!r}"
    return FileNotFoundError(f"{where}, but no such file exists; {hint}.")


def to_fields(entry: Entry, folder: Path) -> dict:
    """The entry as a row of a manifest in `folder`, with `source` said and paths relative where they lie below it."""
    fields = {"path": _relative(entry.path, folder), "text": entry.text, "task": entry.task}
    if entry.question is not None:
        fields["Q"] = entry.question
    if entry.more_paths:
        fields["expand_wav"] = [_relative(path, folder) for path in entry.more_paths]
    fields["source"] = entry.source
    if entry.end is not None:
        fields |= {"start": entry.start, "end": entry.end}
    if entry.speaker is not None:
        fields["speaker"] = entry.speaker
    return fields


def write_manifest(path: Path, entries: Iterable[Entry]) -> int:
    """Write SALMONN's JSON, or JSON Lines for .jsonl and .ndjson, one row a line; returns the number of rows.

    The file appears whole or not at all.
    """
    with open_atomically(path) as file:
        return write_rows(file, path, entries)


def write_rows(file, path: Path, entries: Iterable[Entry]) -> int:
    """Write rows in the form that `path` asks for to a file that is open; returns their number."""
    is_lines = path.suffix in LINES_SUFFIXES
    folder = path.resolve().parent
    count = 0
    file.write("" if is_lines else f'{{"{ARRAY}": [')
    for entry in entries:
        file.write("" if is_lines else (",\n" if count else "\n"))
        file.write(json.dumps(to_fields(entry, folder), ensure_ascii=False) + ("\n" if is_lines else ""))
        count += 1
    file.write("" if is_lines else "\n]}\n")
    return count


def _to_entry(
    value: object,
    path: Path,
    number: int,
    place: str,
    root: Path | None,
    source: str,
    questions: Collection[str],
) -> Entry:
    def fail(field: str, reason: str, problem: str):
        return RowError(path, number, f"{place}{field}", reason, problem)

    value = _check_row(value, questions, fail)
    text, more = value.get("text"), value.get("expand_wav") or []
    start, end = _read_part(value, more, fail)
    content = [value["path"], more, text, value["task"], value.get("Q"), start, end]
    first, *rest = (_locate(name, path, root) for name in (value["path"], *more))
    return Entry(
        path=first,
        text=text,
        task=value["task"],
        question=value.get("Q"),
        source=value.get("source") or source,
        more_paths=tuple(rest),
        speaker=value.get("speaker"),
        start=start,
        end=end,
        number=number,
        place=f"{path}: {place.rstrip(': ')}",
        digest=hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8],
    )


def _check_row(value: object, questions: Collection[str], fail: Callable) -> dict:
    """The row with its speaker as text, once every field holds what it may."""
    if not isinstance(value, dict):
        raise fail("", "type", f"is {_describe(value)}, but a row must be an object; mend the row.")
    for field in ("path", "task"):
        if not _is_string(value.get(field)) or not value[field].strip():
            raise fail(
                f".{field}", "type", f"is {_describe(value.get(field))}, but {_rule(value.get(field))}; mend the row."
            )
    value = {**value, "speaker": _read_speaker(value.get("speaker"))}
    for field in ("text", "Q", "source", "speaker"):
        if value.get(field) is not None and not _is_string(value[field]):
            raise fail(f".{field}", "type", f"is {_describe(value[field])}, but {_rule(value[field])}; mend the row.")
    text = value.get("text")
    if text is not None and not text.strip():
        raise fail(".text", "empty_text", "is empty, but an answer must say something; use null for unlabelled audio.")
    if value["task"] in questions and not (value.get("Q") or "").strip():
        task = value["task"]
        raise fail(".Q", "missing_question", f"is missing, but the prompt of task {task!r} is the row's; give it a Q.")
    more = value.get("expand_wav") or []
    if not isinstance(more, list) or not all(map(_is_string, more)):
        raise fail(".expand_wav", "type", f"is {_describe(more)}, but must be a list of strings; mend the row.")
    if sum(map(len, (value["path"], *more, text or "", value.get("Q") or ""))) > MAX_CHARS_A_ROW:
        raise fail("", "too_large", f"has over {MAX_CHARS_A_ROW} characters, which no clip's answer has; mend the row.")
    return value


def _read_part(value: dict, more: list, fail: Callable) -> tuple[float, float | None]:
    """`start` and `end` of a row, both or neither."""
    if value.get("start") is None and value.get("end") is None:
        return 0.0, None
    start, end = value.get("start", 0.0), value.get("end")
    if not all(isinstance(time, int | float) and not isinstance(time, bool) for time in (start, end)):
        raise fail(
            ".end", "type", f"is {_describe(end)} (start {_describe(start)}), but both must be seconds; mend it."
        )
    if not 0 <= start < end or more:
        raise fail(".end", "type", f"is {end} (start {start}), but must be a later part of one recording; mend it.")
    return float(start), float(end)


def _read_speaker(value: object) -> object:
    """A number as its digits: tables write 7 as 7.0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(int(value)) if value == int(value) else str(value)


def _is_string(value: object) -> bool:
    """Whether it is text that can be written as UTF-8 and, as a path, opened."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON lets through
        return False


def _rule(value: object) -> str:
    """What a value breaks that is no usable text."""
    if not isinstance(value, str):
        return "must be a string"
    return "must be whole characters of UTF-8 without NUL" if value.strip() else "must not be empty"


def _locate(name: str, manifest: Path, root: Path | None) -> Path:
    if name.startswith("~/"):
        return Path(name).expanduser()
    return manifest.parent / name if root is None else root / name.lstrip("/")


def _relative(path: Path, folder: Path) -> str:
    path = Path(os.path.abspath(path))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _describe(value: object) -> str:
    return "missing" if value is None else json.dumps(value)[:60]
