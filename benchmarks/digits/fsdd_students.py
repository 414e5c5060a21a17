"""What the benchmarks on real spoken digits share: their config and seeds, and how a trained student is scored."""

import statistics
from collections.abc import Sequence
from threading import Lock

from distill.config import Config
from distill.evaluation.agreement import Predictions, predict_answers
from distill.evaluation.answering import answer, evaluate
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import Difference
from students.student import load_student
from teachers.salmonn import Salmonn

CONFIG = "configs/fsdd.yaml"
SEEDS = (0, 1, 2)
LOADING = Lock()  # transformers builds one model at a time, on a device that it sets for every thread


def load_trained(config: Config) -> Salmonn:
    """The student of a finished run."""
    with LOADING:
        return load_student(config.run_folder / "student")


def score_wer(model: Salmonn, config: Config) -> float:
    """Its WER on the test split."""
    return evaluate(model, config.shards("test"), config.eval)["asr"].value


def examine(model: Salmonn, config: Config, teacher: Predictions | None = None) -> tuple[list[Prediction], Predictions]:
    """Its answers to the test split, and what it predicts of the right ones, beside its teacher's predictions."""
    shards = config.shards("test")
    return answer(model, shards, config.eval), predict_answers(model, shards, config.eval, teacher)


def describe_percents(values: Sequence[float], digits: int = 2) -> str:
    """Two cells of a table: mean ± standard deviation in percent, and each value."""
    mean, deviation = 100 * statistics.mean(values), 100 * statistics.stdev(values)
    each = ", ".join(f"{100 * value:.{digits}f}" for value in values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} | {each}"


def describe_points(difference: Difference) -> str:
    """A cell of a table: a difference of error rates in points, and the interval of a paired bootstrap over clips."""
    d = difference
    return f"{100 * d.value:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
