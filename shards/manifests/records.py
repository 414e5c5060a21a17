"""JSON rows one after the other, in memory that does not grow with the file. Knows no field of a manifest.

SALMONN's manifests are one JSON object around an array of a million objects; `json.load` turns 300 MB of it into 2 GB
of Python. Here the array is walked with the standard library's own decoder, a piece of text at a time.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

PIECE_CHARS = 1 << 20
HEAD_BYTES = 1 << 16  # by which the form of a file is told
MAX_DIGITS = 30  # of a whole number
MAX_ROW_CHARS = 1 << 24  # a row that is longer is taken for a file that is broken


class RowError(ValueError):
    """A row that is not what it should be.

    Attributes:
        number: which row, from 0.
        field: where in the file: `annotation[3].text`, `line 4: .task`.
        reason: one word to count by: json, type, empty_text.
    """

    def __init__(self, path: Path, number: int, field: str, reason: str, problem: str):
        super().__init__(path, number, field, reason, problem)
        self.path, self.number, self.field, self.reason, self.problem = self.args

    def __str__(self) -> str:
        return f"{self.path}: {self.field} {self.problem}"


def read_rows(path: Path, key: str, *, is_lines: bool) -> Iterator[tuple[int, str, object]]:
    """Rows of either form as (number, place, value): the content decides, and `is_lines` where it does not.

    Raises:
        ValueError: the file is compressed, or see `read_array`.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is compressed, but a manifest is read as text; run gunzip on it.")
    text = head.decode(_encoding(head), "replace").lstrip()
    yield from read_lines(path) if _is_lines(text, key, is_lines) else read_array(path, key)


def _is_lines(text: str, key: str, is_named_so: bool) -> bool:
    """Whether a file that begins like this is JSON Lines, whatever its name."""
    if is_named_so:
        return not re.match(rf'\[\s*(\{{|\])|\{{\s*"{key}"\s*:\s*\[', text)
    line, _, rest = text.partition("\n")
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and key not in first and (rest.lstrip().startswith("{") or "path" in first)


def _encoding(head: bytes) -> str:
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_lines(path: Path) -> Iterator[tuple[int, str, object]]:
    """Rows of a JSON Lines file as (number, place, value); a line that is not JSON gives a `RowError` for its value."""
    number = 0
    for line_number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        place, strict = f"line {line_number}: ", _Strict()
        try:
            value = strict.decoder.decode(line.decode("utf-8") if isinstance(line, bytes) else line)
            problem = strict.take_problem()
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are a ValueError
            problem = f"is not JSON: {error}"
        if problem:
            value = RowError(path, number, place.rstrip(": "), "json", f"{problem}; mend the line.")
        yield number, place, value
        number += 1


def _read_lines(path: Path) -> Iterator[bytes | str]:
    with path.open("rb") as file:
        head = file.read(2)
    if _encoding(head) == "utf-16":
        with path.open(encoding="utf-16", newline="\n") as file:
            yield from file
        return
    with path.open("rb") as file:
        yield file.readline().removeprefix(codecs.BOM_UTF8)
        yield from file


def read_array(path: Path, key: str) -> Iterator[tuple[int, str, object]]:
    """Rows of the array `key` of a JSON object, or of a bare array, as (number, place, value).

    A row with a number that JSON has not, or a key twice, gives a `RowError` for its value.

    Raises:
        ValueError: the file is not JSON, holds no such array, or holds more behind its end.
    """
    with path.open("rb") as file:
        encoding = _encoding(file.read(3))
    # bytes that are no UTF-8 become halves of surrogates, which no field of a row may hold: one bad row
    with path.open(encoding=encoding, errors="strict" if encoding == "utf-16" else "surrogateescape") as file:
        text = _Text(file, path)
        if text.peek() == "[":
            yield from _rows(text, key)
        else:
            yield from _rows_of_object(text, key)
        text.expect_end()


def _rows_of_object(text: "_Text", key: str) -> Iterator[tuple[int, str, object]]:
    text.expect("{")
    is_found = False
    while text.peek() != "}":
        name = text.value()
        text.expect(":")
        if name != key:
            text.value()
        elif is_found:
            raise text.error(f"has the array {key!r} twice")
        else:
            is_found = True
            yield from _rows(text, key)
        if text.peek() != "}":
            text.expect(",")
    text.expect("}")
    if not is_found:
        raise ValueError(
            f"{text.path} has no array {key!r}, but its rows are read from it; is it another kind of file?"
        )


def _rows(text: "_Text", key: str) -> Iterator[tuple[int, str, object]]:
    text.expect("[")
    number = 0
    while text.peek() != "]":
        place, value = f"{key}[{number}]", text.value()
        if problem := text.take_problem():
            value = RowError(text.path, number, place, "json", f"{problem}; mend the row.")
        yield number, place, value
        number += 1
        if text.peek() != "]":
            text.expect(",")
    text.expect("]")


class _Strict:
    """A decoder that goes on behind what JSON does not allow, or no number holds, and remembers it."""

    def __init__(self):
        self._problem = ""
        self.decoder = json.JSONDecoder(
            parse_constant=self._refuse, parse_float=self._float, parse_int=self._int, object_pairs_hook=self._object
        )

    def take_problem(self) -> str:
        """What was wrong since it was last asked; empty: nothing."""
        problem, self._problem = self._problem, ""
        return problem

    def _refuse(self, text: str) -> float:
        self._problem = f"is not JSON: {text[:20]} is no number"
        return 0.0

    def _float(self, text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else self._refuse(text)

    def _int(self, text: str) -> int | float:
        return int(text) if len(text) <= MAX_DIGITS else self._refuse(text)

    def _object(self, pairs: list[tuple[str, object]]) -> dict:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._problem = f"is not JSON: it has the key {twice!r} twice"
        return fields


class _Text:
    """What has been read and not yet used of a file, and how far down it stands."""

    def __init__(self, file, path: Path):
        self._file, self.path = file, path
        self._buffer, self._start, self._line = "", 0, 1
        self._strict = _Strict()
        self.take_problem = self._strict.take_problem
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space."""
        if not self._has_more():
            raise self.error("ends in the middle")
        return self._buffer[self._start]

    def _has_more(self) -> bool:
        """Whether anything but white space follows; it is gone to."""
        while True:
            while self._start < len(self._buffer) and self._buffer[self._start] in " \t\r\n":
                self._start += 1
            if self._start < len(self._buffer):
                return True
            if not self._fill():
                return False

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"has {self.peek()!r} where {character!r} must be")
        self._start += 1

    def expect_end(self) -> None:
        if self._has_more():
            raise self.error(f"has {self.peek()!r} behind its end, as if two files were joined")

    def value(self) -> object:
        """The next JSON value; more of the file is read until it is whole."""
        self.peek()
        while True:
            try:
                value, end = self._strict.decoder.raw_decode(self._buffer, self._start)
                # a number that touches the end of the buffer may go on in the next piece
                if end < len(self._buffer) or not self._fill():
                    self._start = end
                    return value
                self.take_problem()
            except (ValueError, RecursionError) as error:
                self.take_problem()  # of a row that is not whole yet: it is read again
                if len(self._buffer) - self._start > MAX_ROW_CHARS or not self._fill():
                    raise self.error(f"is not JSON: {getattr(error, 'msg', error)}") from error

    def _fill(self) -> bool:
        """Drop what is used, read a piece more (longer ones for a long row), and say whether there was any."""
        if not self._ended:
            self._line += self._buffer.count("\n", 0, self._start)
            rest = self._buffer[self._start :]
            try:
                piece = self._file.read(max(PIECE_CHARS, len(rest)))
            except UnicodeDecodeError as error:
                raise self.error(f"is not UTF-8: {error.reason}") from error
            self._buffer, self._start, self._ended = rest + piece, 0, not piece
        return not self._ended

    def error(self, problem: str) -> ValueError:
        line = self._line + self._buffer.count("\n", 0, self._start)
        return ValueError(f"{self.path} {problem}, at line {line}; mend or fetch the manifest again.")
