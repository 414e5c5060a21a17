"""Which of a run's weights are the best: a validation, what it found, and what its split must hold.

Knows answers and scores, no training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from distill.config import EvalConfig, TrainConfig
from distill.evaluation.answering import evaluate
from distill.evaluation.metrics.scores import NO_METRICS, OwnMetric, mean_error, scored_tasks
from shards.streaming.catalog import open_catalog
from teachers.salmonn import Salmonn

MEAN = "mean"  # over tasks, in the place of a task's name


@dataclass(frozen=True)
class Best:
    """A validation: the one with the lowest error, of a run."""

    step: int = 0  # 0: there was none
    error: float | None = None  # what chooses it: of one task, or the mean over all, see `metrics.mean_error`
    scores: dict[str, float] = field(default_factory=dict)  # by task

    def is_stale(self, step: int, every: int, patience: int) -> bool:
        """Whether `patience` validations, one every `every` steps, found none that is better up to a step."""
        return patience > 0 and self.step > 0 and step // every - self.step // every >= patience


def validate(
    student: Salmonn,
    folder: str | Path,
    answers: EvalConfig,
    accelerator: Accelerator,
    step: int,
    *,
    chosen_by: str = MEAN,
    own: Mapping[str, OwnMetric] = NO_METRICS,
    on_batch: Callable[[], None] = lambda: None,
) -> Best:
    """Let a student in training answer a split; it is in training mode again afterwards. Every rank must call it.

    `chosen_by` is the task whose error chooses between steps, or "mean"; `own` are metrics of one's own; `on_batch` is
    called after each batch of answers.
    """
    student.eval()
    scores = evaluate(student, folder, answers, accelerator, title="valid", on_batch=on_batch, own=own)
    student.train()
    chosen = scores if chosen_by == MEAN else {chosen_by: scores[chosen_by]}
    return Best(step, mean_error(chosen), {task: score.value for task, score in scores.items()})


def check_is_there(options: TrainConfig) -> None:
    """Refuse what only a validation could do where there is none.

    Raises:
        ValueError: naming the option.
    """
    for name, value, off in (("early_stop", options.early_stop, 0), ("best_metric", options.best_metric, MEAN)):
        if value != off:
            raise ValueError(
                f"train.{name} is {value!r}, but there is no validation split; pack one (corpus.valid, or valid= of "
                f"Distiller), or leave train.{name} at {off!r}."
            )


def check_split(folder: str | Path, own: Mapping[str, OwnMetric] = NO_METRICS, chosen_by: str = MEAN) -> None:
    """Refuse a validation split that could not choose between two steps.

    Raises:
        ValueError: there is no shard, no clip has a text, the answers to a task cannot be scored, or the task whose
            error chooses is not there.
    """
    catalog = open_catalog(folder)
    tasks = [catalog.tasks[number] for number in np.unique(catalog.task_ids[catalog.has_text])]
    if not tasks:
        raise ValueError(
            f"valid is {folder}, but none of its {len(catalog):,} clips has a text that answers are compared with; "
            f"pack some that have one, or set corpus.valid_share=0 and remove the folder to train without."
        )
    unknown = [task for task in tasks if task not in scored_tasks() and task not in own]
    if unknown:
        raise ValueError(
            f"valid is {folder} with answers to {', '.join(unknown)}, but there are metrics of "
            f"{', '.join(scored_tasks())} alone; leave these clips out, or set corpus.valid_share=0 and remove the "
            f"folder."
        )
    if chosen_by not in (MEAN, *tasks):
        raise ValueError(
            f"train.best_metric is {chosen_by!r}, but valid is {folder} with answers to {', '.join(tasks)}; name "
            f"one of these, or set it to {MEAN}."
        )
