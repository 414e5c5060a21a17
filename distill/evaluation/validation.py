"""Which of a run's weights are the best: a validation, what it found, and what its split must hold.

Knows answers and scores, no training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from distill.config import EvalConfig
from distill.evaluation.answering import evaluate
from distill.evaluation.metrics.scores import NO_METRICS, OwnMetric, mean_error, scored_tasks
from shards.streaming.catalog import open_catalog
from teachers.salmonn import Salmonn


@dataclass(frozen=True)
class Best:
    """A validation: the one with the lowest error, of a run."""

    step: int = 0  # 0: there was none
    error: float | None = None  # mean over tasks, see `metrics.mean_error`
    scores: dict[str, float] = field(default_factory=dict)  # by task


def validate(
    student: Salmonn,
    folder: str | Path,
    answers: EvalConfig,
    accelerator: Accelerator,
    step: int,
    own: Mapping[str, OwnMetric] = NO_METRICS,
    on_batch: Callable[[], None] = lambda: None,
) -> Best:
    """Let a student in training answer a split; it is in training mode again afterwards. Every rank must call it.

    `own` are metrics of one's own; `on_batch` is called after each batch of answers.
    """
    student.eval()
    scores = evaluate(student, folder, answers, accelerator, title="valid", on_batch=on_batch, own=own)
    student.train()
    return Best(step, mean_error(scores), {task: score.value for task, score in scores.items()})


def check_split(folder: str | Path, own: Mapping[str, OwnMetric] = NO_METRICS) -> None:
    """Refuse a validation split that could not choose between two steps.

    Raises:
        ValueError: there is no shard, no clip has a text, or the answers to a task cannot be scored.
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
