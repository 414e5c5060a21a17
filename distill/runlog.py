"""What a run writes while it trains: `metrics.jsonl`, `validation.jsonl` and TensorBoard events. Knows no model.

Only the main process writes. A resumed run repeats steps: readers of the lines take a step's last one, and TensorBoard
is told to forget those it has.
"""

import json
from pathlib import Path

from shards.manifest import naming

METRICS, VALIDATION, EVENTS = "metrics.jsonl", "validation.jsonl", "tensorboard"


class RunLog:
    """The log files of one process' part of a run.

    Args:
        folder: of the run; events go to `tensorboard` inside it.
        start: steps that were done before.
        is_main: whether this process writes.
    """

    def __init__(self, folder: Path, start: int, is_main: bool):
        self.folder, self.is_main = folder, is_main
        if is_main:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports that no other command needs

            self.events = SummaryWriter(str(folder / EVENTS), purge_step=start + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        if self.is_main:
            self.events.close()

    def step(self, record: dict[str, float]) -> None:
        """One step's loss, terms, learning rate, …; `step` among them."""
        self._write(METRICS, record, "train")

    def validation(self, step: int, error: float, scores: dict[str, float]) -> None:
        """One validation: the mean error and each task's score."""
        self._write(VALIDATION, {"step": step, "error": error, **scores}, "valid")

    def _write(self, name: str, record: dict[str, float], group: str) -> None:
        if not self.is_main:
            return
        with naming(self.folder / name), open(self.folder / name, "a") as file:
            file.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if key != "step":
                self.events.add_scalar(f"{group}/{key}", value, record["step"])
