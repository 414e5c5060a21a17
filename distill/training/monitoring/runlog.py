"""What a run writes of its steps: `metrics.jsonl` and `validation.jsonl`, and how they are read again. Knows no model.

A resumed run repeats steps: of the lines of one step the last counts. A killed one may leave half a line.
"""

import json
from pathlib import Path

from shards.files.write import naming
from shards.jsonfile import ShapeError, parse_object

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"


class RunLog:
    """The callback that writes the lines.

    Args:
        folder: the folder of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_start(self, run, step: int) -> None:
        """End the half line that a killed process may have left."""
        for name in (METRICS, VALIDATION):
            path = self.folder / name
            if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                self._write(name, "")

    def on_step(self, run, record: dict[str, float]) -> None:
        """One step's loss, terms, learning rate, …; `step` among them."""
        self._write(METRICS, json.dumps(record))

    def on_validation(self, run, step: int, error: float, scores: dict[str, float]) -> None:
        """One validation: the mean error and each task's score."""
        self._write(VALIDATION, json.dumps({"step": step, "error": error, **scores}))

    def _write(self, name: str, line: str) -> None:
        with naming(self.folder / name), open(self.folder / name, "a") as file:
            file.write(line + "\n")


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """The steps of a `metrics.jsonl` or `validation.jsonl`, in order, and the number of lines that could not be read.

    A resumed run repeats steps after its checkpoint: the last record of a step counts. A killed run may leave half a
    line.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, but a report is drawn from it; name the folder of a run that trained."
        )
    records, num_unreadable = {}, 0
    for line in path.read_text().splitlines():
        try:
            record = parse_object(line, {"step": int})
            if not all(isinstance(value, int | float) for value in record.values()):  # a loss may be NaN
                raise ShapeError("has a figure that is no number")
            records[record["step"]] = record
        except ShapeError:
            num_unreadable += 1
    return [records[step] for step in sorted(records)], num_unreadable


def read_table(folder: Path, num_steps: int) -> list[dict]:
    """The first steps of a run, a record each, with what validations found as `valid/…`: a table for pandas."""
    if not (folder / METRICS).exists():
        return []
    records, _ = read_metrics(folder / METRICS)
    found = read_metrics(folder / VALIDATION)[0] if (folder / VALIDATION).exists() else []
    scores = {r["step"]: {f"valid/{name}": value for name, value in r.items() if name != "step"} for r in found}
    return [r | scores.get(r["step"], {}) for r in records if r["step"] <= num_steps]
