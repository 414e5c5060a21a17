"""Dashboards that follow a run, through accelerate's own trackers: TensorBoard, Weights & Biases, MLflow, Trackio, …

None is needed: `metrics.jsonl` holds everything. No tracker reaches for the network on its own: without credentials in
the environment Weights & Biases writes offline, and MLflow writes into the run's folder. A tracker that fails while a
run trains is left off, and the run goes on.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

# accelerate's trackers, and the packages that they need
TRACKERS = {"aim": "aim", "clearml": "clearml", "comet_ml": "comet_ml", "dvclive": "dvclive", "mlflow": "mlflow",
            "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}  # fmt: skip
TENSORBOARD = "tensorboard"  # the tracker, and the folder of its events
MLFLOW_PLACE = "MLFLOW_TRACKING_URI"
_OURS: set[str] = set()  # places that runs of this process gave MLflow, which are no wish of anybody for the next run
LOGIN = ("WANDB_API_KEY", "WANDB_MODE")  # what says that somebody wants Weights & Biases online


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not here.

    Raises:
        ValueError: with the line that installs it.
    """
    for name in names:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise ValueError(
                f"train.trackers names {name}, but its package is not installed; run `pip install {TRACKERS[name]}`, "
                f"or leave {name} out."
            )


class Trackers:
    """The callback that feeds the trackers.

    Args:
        names: the names of accelerate's trackers.
        folder: the folder of the run.
        describe: gives what the run is, as plain data.
        say: is told what a user should know.
    """

    def __init__(self, names: Sequence[str], folder: Path, describe: Callable[[], dict], say: Callable[[str], None]):
        check_trackers(names)
        self.names, self.folder, self.describe, self.say = names, folder, describe, say
        self.trackers = []

    def on_start(self, run, step: int) -> None:
        """Open them; TensorBoard forgets the steps that are done again."""
        for name in dict.fromkeys(self.names):
            self._guard(lambda name=name: self.trackers.append(self._open(name, step)), name)

    def on_step(self, run, record: dict[str, float]) -> None:
        """One step, as `train/…`."""
        self._log({f"train/{key}": value for key, value in record.items() if key != "step"}, record["step"])

    def on_validation(self, run, step: int, error: float, scores: dict[str, float]) -> None:
        """One validation, as `valid/…`."""
        self._log({"valid/error": error} | {f"valid/{task}": value for task, value in scores.items()}, step)

    def on_close(self, run) -> None:
        """Close them."""
        for tracker in self.trackers:
            self._guard(tracker.finish, tracker.name)
        self.trackers = []

    def _open(self, name: str, step: int):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # it looks for every tracker's package

        kind = LOGGER_TYPE_TO_CLASS[name]
        if name == TENSORBOARD:
            tracker = kind(TENSORBOARD, str(self.folder), purge_step=step + 1)
        elif kind.requires_logging_directory:
            tracker = kind(self.folder.name, str(self.folder))
        else:
            tracker = kind(self.folder.name, **self._stay_here(name))
        tracker.start()
        if name != TENSORBOARD:  # whose events lie beside the run's config
            tracker.store_init_configuration(flatten(self.describe()))
        return tracker

    def _stay_here(self, name: str) -> dict[str, str]:
        """Let a tracker write into the run's folder unless the environment says otherwise."""
        if name == "mlflow" and os.environ.get(MLFLOW_PLACE) in (None, *_OURS):
            place = f"sqlite:///{self.folder.absolute()}/mlflow.db"  # a folder of files it refuses, from 3.17 on
            _OURS.add(place)
            os.environ[MLFLOW_PLACE] = place
        if name != "wandb":
            return {}
        if not any(variable in os.environ for variable in LOGIN):
            os.environ["WANDB_MODE"] = "offline"
            self.say(f"wandb writes to {self.folder}/wandb alone; set WANDB_MODE=online to send, or `wandb sync` later")
        return {"dir": str(self.folder)}

    def _log(self, values: dict[str, float], step: int) -> None:
        for tracker in list(self.trackers):
            self._guard(lambda tracker=tracker: tracker.log(values, step=step), tracker.name)

    def _guard(self, work: Callable[[], object], name: str) -> None:
        """Do a tracker's work; when it fails, say so and go on without that tracker."""
        try:
            work()
        except Exception as error:
            from distill.config.credentials import SECRET_VALUE  # a config is checked against the trackers of this file

            self.trackers = [tracker for tracker in self.trackers if tracker.name != name]
            reason = SECRET_VALUE.sub("…", " ".join(str(error).split()))[:200]
            self.say(f"tracker {name} failed ({type(error).__name__}: {reason}); the run goes on without it")


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested plain data as dotted names with values that every tracker takes."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        key = re.sub(r"[^\w.]", "_", f"{prefix}{name}")
        if isinstance(value, dict):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
