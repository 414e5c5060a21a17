"""Scores what a model answered: one metric a task, with a confidence interval, and how much quality a student retains.

A metric is a file of this folder and a line of `METRICS`. It knows text only: no model, no audio.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import numpy as np

from distill.evaluation.metrics.captions import CIDER_D
from distill.evaluation.metrics.exact import EXACT_MATCH
from distill.evaluation.metrics.metric import Metric, Prediction, Tally
from distill.evaluation.metrics.words import PER, WER, rate_of

METRICS = {"wer": WER, "per": PER, "cider_d": CIDER_D, "exact_match": EXACT_MATCH}  # by the name that a scorecard says
CONFIDENCE = 0.95
NUM_RESAMPLES = 1_000

NO_METRICS = MappingProxyType({})


OwnMetric = Callable[[Prediction], float]  # of one's own: an answer's quality, 1 is the best


@dataclass(frozen=True)
class TaskScore:
    """A task's score: the value of its metric and the 95 % bootstrap interval over clips."""

    metric: str
    value: float
    low: float
    high: float
    num_samples: int
    extra: dict[str, float | str] = field(default_factory=dict)  # further metrics; "not available" where one is not


@dataclass(frozen=True)
class Retained:
    """Student's quality divided by the teacher's, with the 95 % interval of a bootstrap over pairs of answers."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Of two metrics on the same clips, with the 95 % interval of a bootstrap over pairs of answers."""

    value: float
    low: float
    high: float


def scored_tasks() -> tuple[str, ...]:
    """The tasks that have a metric. One that is missing here cannot be scored, and says so."""
    return tuple(task for metric in METRICS.values() for task in metric.tasks)


def name_metric(task: str) -> str:
    """The name of a task's metric."""
    return next(name for name, metric in METRICS.items() if task in metric.tasks)


def find_metric(task: str) -> Metric:
    """A task's metric."""
    return METRICS[name_metric(task)]


def _tally_own(predictions: Sequence[Prediction], metric: OwnMetric) -> Tally:
    """What a metric of one's own gives each answer."""
    values = np.array([float(metric(prediction)) for prediction in predictions])
    if not np.isfinite(values).all():
        raise ValueError(
            f"metric of task {predictions[0].task} gave {values[~np.isfinite(values)][0]} for an answer, but must give "
            f"a finite number; correct it."
        )
    return Tally.of_values(values)


def score(predictions: Iterable[Prediction], *, normalize: bool = True, seed: int = 0,
          own: Mapping[str, OwnMetric] = NO_METRICS) -> dict[str, TaskScore]:  # fmt: skip
    """Score the answers of each task.

    Args:
        predictions: answers of one or several tasks, in any order.
        normalize: Whisper's English rules before `wer`, or case and punctuation only; see `normalize_text`. Say which
            beside a WER.
        seed: the seed of the bootstrap; the same answers and seed give the same interval.
        own: metrics of one's own by task, in the place of the library's; the score is their mean over clips.

    Returns:
        By task, in alphabetical order. `wer`, `per`, `exact_match` are fractions; `cider_d` is 0 to 10. Error rates are
        those of the whole set (all errors over all words), not means over clips. `extra["ended"]` is the share of
        answers that ended by themselves, `extra["references"]` how many a clip has, and `extra["chance"]` the metric of
        a model that hears nothing, see `chance_answers`.

    Raises:
        ValueError: a task has no metric, or its references hold no word.
    """
    scores = {}
    for task, group in _by_task(predictions, own).items():
        figures = {}
        if task in own:
            name = f"own {getattr(own[task], '__name__', type(own[task]).__name__)}"  # and no error rate of ours
            tally = _tally_own(group, own[task])
        else:
            metric = find_metric(task)
            name, tally = name_metric(task), metric.tally(group, normalize)
            figures["chance"] = metric.tally(chance_answers(group, normalize), normalize).value
        gained_N, possible_N = _resample(tally, seed)
        low, high = _interval(gained_N / np.maximum(possible_N, 1))
        extra = {
            **tally.extra,
            "ended": float(np.mean([prediction.ended for prediction in group])),
            "references": float(np.mean([len(prediction.references) for prediction in group])),
            **figures,
        }
        scores[task] = TaskScore(name, tally.value, low, high, len(group), extra)
    return scores


def _plain(task: str, normalize: bool, text: str) -> str:
    return find_metric(task).plain(text, normalize)


def chance_answers(predictions: Sequence[Prediction], normalize: bool = True) -> list[Prediction]:
    """What a model that hears nothing would answer to the clips of one task: to each the commonest right answer.

    The commonest is that of most clips, in the words of the task's metric; of several, the one whose words are. For a
    question with two answers that is the majority's share; for a caption, how far one sentence for all clips goes.
    """
    plain = partial(_plain, predictions[0].task, normalize)
    answers = [{plain(reference) for reference in prediction.references} for prediction in predictions]
    count = Counter(answer for clip in answers for answer in clip)
    clips_with = Counter(word for clip in answers for word in {word for answer in clip for word in answer.split()})

    def rank(answer: str) -> tuple[int, float, str]:
        words = answer.split()
        return -count[answer], -sum(clips_with[word] for word in words) / max(1, len(words)), answer

    commonest = min(count, key=rank)
    return [replace(prediction, hypothesis=commonest) for prediction in predictions]


def error_rate(task: str, reference: str, hypothesis: str, *, normalize: bool = True) -> float | None:
    """Word or phone errors over reference words of one answer; None for a task without words, or an empty reference.

    Args:
        normalize: as in `score`.
    """
    if task not in scored_tasks() or not find_metric(task).is_error_rate:
        return None
    return rate_of(partial(_plain, task, normalize), reference, hypothesis)


def mean_error(scores: Mapping[str, TaskScore]) -> float:
    """One number that chooses between checkpoints, the lower the better: the mean over tasks of what each lacks of 1.

    An error rate counts as it is, an exact match as 1 minus its share, CIDEr-D, which reaches 10, as 1 minus a tenth,
    and a metric of one's own as 1 minus its mean.
    """
    own = METRICS["exact_match"]
    known = {name: METRICS.get(score.metric, own) for name, score in scores.items()}
    return float(np.mean([known[name].lacks(score.value) for name, score in scores.items()]))


def is_above_chance(score: TaskScore) -> bool:
    """Whether the whole interval of a score is better than what a model that hears nothing would get."""
    chance = score.extra.get("chance")  # scorecards of before it was measured have none
    if chance is None:
        return True
    is_error_rate = score.metric in METRICS and METRICS[score.metric].is_error_rate
    return score.high < min(1.0, chance) if is_error_rate else score.low > chance


def retained_quality(
    student: Iterable[Prediction], teacher: Iterable[Prediction], *, normalize: bool = True, seed: int = 0
) -> dict[str, Retained]:
    """How much of the teacher's quality a student keeps, by task: 1 is all of it, above 1 the student is better.

    Quality is 1 - WER (not below 0) for error rates, and the metric itself otherwise. Both are resampled with the same
    clips, so that clips that are hard for both do not widen the interval. A task of which the teacher is not shown to
    be above chance (`chance_answers`; the lower end of its own interval decides) is left out: there is nothing to
    retain.

    Raises:
        ValueError: the two did not answer the same clips, or a task has no metric.
    """
    students, teachers = _by_task(student), _by_task(teacher)
    retained = {}
    for task in sorted(students.keys() | teachers.keys()):
        keys = [{prediction.key for prediction in groups[task]} for groups in (students, teachers)]
        if keys[0] != keys[1]:
            raise ValueError(
                f"student's answers of task {task} are {len(keys[0])}, but {len(keys[0] & keys[1])} of them are to "
                f"clips that are among the teacher's {len(keys[1])}; evaluate both on the same manifest."
            )
        metric = find_metric(task)
        ours, theirs = (metric.tally(groups[task], normalize) for groups in (students, teachers))
        chance = metric.tally(chance_answers(teachers[task], normalize), normalize)
        our_N, their_N = (_resampled_quality(metric, tally, seed) for tally in (ours, theirs))
        if _interval(their_N)[0] > metric.quality(chance.value):
            our, their = (metric.quality(tally.value) for tally in (ours, theirs))
            retained[task] = Retained(float(our / their), *_interval(our_N[their_N > 0] / their_N[their_N > 0]))
    return retained


def paired_difference(
    first: Sequence[Iterable[Prediction]],
    second: Sequence[Iterable[Prediction]],
    *,
    normalize: bool = True,
    seed: int = 0,
) -> dict[str, Difference]:
    """How much one way of training scores above another, by task: of each, one or more runs that answered one split.

    Runs are averaged clip by clip, and clips are resampled for both at once: the interval is of the clips, and what
    varies from seed to seed is in it only by its mean.

    Args:
        first, second: answers of each run.
        normalize, seed: as in `score`.

    Raises:
        ValueError: the runs did not answer the same clips.
    """  # fmt: skip
    runs = [[_by_task(answers) for answers in side] for side in (first, second)]
    clips = [{(task, p.key) for task, group in run.items() for p in group} for side in runs for run in side]
    if any(clips[0] != other for other in clips):
        raise ValueError(
            f"clips of the runs are {sorted({len(c) for c in clips})} and not the same ones, but a paired difference "
            f"compares answers to the same; evaluate all on one manifest."
        )
    differences = {}
    for task in runs[0][0]:
        tallies = [[find_metric(task).tally(run[task], normalize) for run in side] for side in runs]
        means = [Tally(sum(t.gained for t in side), sum(t.possible for t in side)) for side in tallies]
        ours_N, theirs_N = (np.divide(*_resample(tally, seed)) for tally in means)
        differences[task] = Difference(means[0].value - means[1].value, *_interval(ours_N - theirs_N))
    return differences


def _resampled_quality(metric: Metric, tally: Tally, seed: int) -> np.ndarray:
    """A metric's quality in each resample."""
    gained_N, possible_N = _resample(tally, seed)
    return metric.quality(gained_N / np.maximum(possible_N, 1))


def _by_task(
    predictions: Iterable[Prediction], own: Mapping[str, OwnMetric] = NO_METRICS
) -> dict[str, list[Prediction]]:
    """The predictions of each task, ordered by key, so that two models' clips stand at the same places."""
    groups, tasks = defaultdict(list), scored_tasks()
    for prediction in predictions:
        if prediction.task not in tasks and prediction.task not in own:
            raise ValueError(
                f"task is {prediction.task!r} ({prediction.key}), but there is a metric for {', '.join(tasks)} only; "
                f"correct the manifest, or name the task in its metric's file in distill/evaluation/metrics/."
            )
        groups[prediction.task].append(prediction)
    return defaultdict(list, {task: sorted(groups[task], key=lambda p: p.key) for task in sorted(groups)})


def _resample(tally: Tally, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Both sums over clips drawn with replacement, as many as there are; one pair a resample.

    The draws depend on the seed and the number of clips only: two models' resamples hold the same clips.
    """
    rng = np.random.default_rng(seed)
    num_clips = len(tally.gained)
    draws = (rng.integers(num_clips, size=num_clips) for _ in range(NUM_RESAMPLES))
    sums = np.array([(tally.gained[draw].sum(), tally.possible[draw].sum()) for draw in draws])
    return sums[:, 0], sums[:, 1]


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95 % of the resamples."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
