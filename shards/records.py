"""JSON rows one after the other, in memory that does not grow with the file. Knows no field of a manifest.

SALMONN's manifests are one JSON object around an array of a million objects; `json.load` turns 300 MB of it into 2 GB
of Python. Here the array is walked with the standard library's own decoder, a piece of text at a time.
"""

import json
from collections.abc import Iterator
from pathlib import Path

PIECE_CHARS = 1 << 20
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


def read_lines(path: Path) -> Iterator[tuple[int, str, object]]:
    """Rows of a JSON Lines file as (number, place, value); a line that is not JSON gives a `RowError` for its value."""
    with path.open("rb") as file:
        number = 0
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"line {line_number}: "
            try:
                value = json.loads(line, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are a ValueError
                value = RowError(path, number, place.rstrip(": "), "json", f"is not JSON: {error}; mend the line.")
            yield number, place, value
            number += 1


def read_array(path: Path, key: str) -> Iterator[tuple[int, str, object]]:
    """Rows of the array `key` of a JSON object, or of a bare array, as (number, place, value).

    Raises:
        ValueError: the file is not JSON, or holds no such array.
    """
    with path.open(encoding="utf-8") as file:
        text = _Text(file, path)
        if text.peek() == "[":
            yield from _rows(text, key)
            return
        text.expect("{")
        while text.peek() != "}":
            name = text.value()
            text.expect(":")
            if name == key:
                yield from _rows(text, key)
                return
            text.value()
            if text.peek() != "}":
                text.expect(",")
    raise ValueError(f"{path} has no array {key!r}, but its rows are read from it; is it another kind of file?")


def _rows(text: "_Text", key: str) -> Iterator[tuple[int, str, object]]:
    text.expect("[")
    number = 0
    while text.peek() != "]":
        yield number, f"{key}[{number}]", text.value()
        number += 1
        if text.peek() != "]":
            text.expect(",")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


class _Text:
    """What has been read and not yet used of a file, and how far down it stands."""

    def __init__(self, file, path: Path):
        self._file, self._path = file, path
        self._buffer, self._start, self._line = "", 0, 1
        self._decoder = json.JSONDecoder(parse_constant=_refuse_constant)
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space."""
        while True:
            while self._start < len(self._buffer) and self._buffer[self._start] in " \t\r\n":
                self._start += 1
            if self._start < len(self._buffer):
                return self._buffer[self._start]
            if not self._fill():
                raise self._error("ends in the middle")

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self._error(f"has {self.peek()!r} where {character!r} must be")
        self._start += 1

    def value(self) -> object:
        """The next JSON value; more of the file is read until it is whole."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._start)
                # a number that touches the end of the buffer may go on in the next piece
                if end < len(self._buffer) or not self._fill():
                    self._start = end
                    return value
            except (ValueError, RecursionError) as error:
                if len(self._buffer) - self._start > MAX_ROW_CHARS or not self._fill():
                    raise self._error(f"is not JSON: {getattr(error, 'msg', error)}") from error

    def _fill(self) -> bool:
        """Drop what is used, read a piece more (longer ones for a long row), and say whether there was any."""
        if not self._ended:
            self._line += self._buffer.count("\n", 0, self._start)
            rest = self._buffer[self._start :]
            try:
                piece = self._file.read(max(PIECE_CHARS, len(rest)))
            except UnicodeDecodeError as error:
                raise self._error(f"is not UTF-8: {error.reason}") from error
            self._buffer, self._start, self._ended = rest + piece, 0, not piece
        return not self._ended

    def _error(self, problem: str) -> ValueError:
        line = self._line + self._buffer.count("\n", 0, self._start)
        return ValueError(f"{self._path} {problem}, at line {line}; mend or fetch the manifest again.")
