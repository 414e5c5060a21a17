"""Scores what a model answered: one metric a task, with a confidence interval, and how much quality a student retains.

WER is jiwer's on normalised text, captions are scored by `captioning.py`, questions by exact match. It knows text only:
no model, no audio. SPICE and METEOR need Java and are reported as not available, never as 0.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

import jiwer
import numpy as np

from distill.captioning import bleu_4, cider_d, rouge_l

# Task to metric. A task that is missing here cannot be scored, and says so.
METRICS = MappingProxyType(
    {
        "asr": "wer",
        "phone_recognition": "per",
        "audiocaption": "cider_d",
        "audiocaption_v2": "cider_d",
        "gender_recognition": "exact_match",
        "QA": "exact_match",
    }
)
ERROR_RATES = ("wer", "per")  # lower is better, and quality is 1 - rate; of the others quality is the value
NOT_AVAILABLE = "not available"
CONFIDENCE = 0.95
NUM_RESAMPLES = 1_000

Normaliser = Callable[[str], str]


@dataclass(frozen=True)
class Prediction:
    """What a model answered for one clip, and what it should have."""

    key: str
    task: str
    source: str
    references: tuple[str, ...]  # one or more right answers
    hypothesis: str
    ended: bool = True  # the model wrote its end token, instead of running into the length limit


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


@cache
def _build_normaliser(english: bool) -> Normaliser:
    """Whisper's normalisers: transformers ships the rules, the list of words is openai/whisper's (MIT; see NOTICE)."""
    # Imported here: transformers takes seconds, and who only shows scores needs none of it.
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if not english:
        return BasicTextNormalizer()
    return EnglishTextNormalizer(json.loads((Path(__file__).parent / "spelling.json").read_text()))


def normalise_text(text: str, english: bool = True) -> str:
    """What both texts go through before words are compared.

    Args:
        text: an answer or a reference.
        english: Whisper's English rules, the ones papers report with: case, punctuation, contractions, British
            spelling, numbers. They join spoken digits (`four seven` becomes `47`, one word), so that one wrong digit
            makes the whole number wrong. False: case, punctuation and brackets only; the choice for strings of digits
            and for other languages.
    """
    return " ".join(_build_normaliser(english)(text).split())


@dataclass(frozen=True)
class _Tally:
    """A task's clips as two numbers each: the metric is the sum of the first over the sum of the second."""

    gained: np.ndarray
    possible: np.ndarray
    extra: dict[str, float | str]


def _tally_words(predictions: Sequence[Prediction], normalise: Normaliser) -> _Tally:
    """Word errors and reference words; of several references the one with the lowest rate counts."""
    measures, characters = [], []
    for prediction in predictions:
        hypothesis = normalise(prediction.hypothesis)
        normalised = [normalise(reference) for reference in prediction.references]
        best = min(normalised, key=lambda reference: jiwer.process_words(reference, hypothesis).wer)
        measures.append(jiwer.process_words(best, hypothesis))
        characters.append(jiwer.process_characters(best, hypothesis))
    kinds = {kind: sum(getattr(m, kind) for m in measures) for kind in ("substitutions", "deletions", "insertions")}
    num_words = np.array([m.hits + m.substitutions + m.deletions for m in measures])
    num_characters = sum(c.hits + c.substitutions + c.deletions for c in characters)
    if not num_words.sum():
        raise ValueError(
            f"the references of task {predictions[0].task} are {len(predictions)} empty texts after normalisation, but "
            f"an error rate divides by their words; check the manifest's `text`, or set normalise to False."
        )
    errors = np.array([m.substitutions + m.deletions + m.insertions for m in measures])
    extra = {kind: float(count / num_words.sum()) for kind, count in kinds.items()}
    extra["cer"] = sum(c.substitutions + c.deletions + c.insertions for c in characters) / max(1, num_characters)
    return _Tally(errors, num_words, extra)


def _tally_phones(predictions: Sequence[Prediction], normalise: Normaliser) -> _Tally:
    """Phone errors and reference phones: separated by spaces, and no words, so never normalised."""
    return _tally_words(predictions, str.strip)


def _tally_captions(predictions: Sequence[Prediction], normalise: Normaliser) -> _Tally:
    """CIDEr-D and the others; captions are always lower-cased and stripped of punctuation, whatever `normalise` is."""
    hypotheses = [prediction.hypothesis for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    scores = np.array(cider_d(hypotheses, references))
    extra = {
        "bleu_4": bleu_4(hypotheses, references),
        "rouge_l": float(np.mean([rouge_l(h, r) for h, r in zip(hypotheses, references)])),
        "spice": NOT_AVAILABLE,
        "meteor": NOT_AVAILABLE,
    }
    return _Tally(scores, np.ones(len(scores)), extra)


def _tally_exact(predictions: Sequence[Prediction], normalise: Normaliser) -> _Tally:
    """1 where the answer equals a reference without case, punctuation and outer spaces."""
    plain = partial(normalise_text, english=False)
    right = [plain(p.hypothesis) in {plain(reference) for reference in p.references} for p in predictions]
    return _Tally(np.array(right, dtype=float), np.ones(len(right)), {})


_TALLIES = MappingProxyType(
    {
        "wer": _tally_words,
        "per": _tally_phones,
        "cider_d": _tally_captions,
        "exact_match": _tally_exact,
    }
)


def score(predictions: Iterable[Prediction], *, normalise: bool = True, seed: int = 0) -> dict[str, TaskScore]:
    """Score the answers of each task.

    Args:
        predictions: answers of one or several tasks, in any order.
        normalise: Whisper's English rules before `wer`, or case and punctuation only; see `normalise_text`. Say which
            beside a WER.
        seed: of the bootstrap; the same answers and seed give the same interval.

    Returns:
        By task, in alphabetical order. `wer`, `per`, `exact_match` are fractions; `cider_d` is 0 to 10. Error rates are
        those of the whole set (all errors over all words), not means over clips. `extra["ended"]` is the share of
        answers that ended by themselves.

    Raises:
        ValueError: a task is not in `METRICS`, or its references hold no word.
    """
    scores = {}
    for task, group in _by_task(predictions).items():
        tally = _TALLIES[METRICS[task]](group, partial(normalise_text, english=normalise))
        gained_N, possible_N = _resample(tally, seed)
        low, high = _interval(gained_N / np.maximum(possible_N, 1))
        value = float(tally.gained.sum() / tally.possible.sum())
        extra = {**tally.extra, "ended": float(np.mean([prediction.ended for prediction in group]))}
        scores[task] = TaskScore(METRICS[task], value, low, high, len(group), extra)
    return scores


def error_rate(task: str, reference: str, hypothesis: str, *, normalise: bool = True) -> float | None:
    """Word or phone errors over reference words of one answer; None for a task without words, or an empty reference.

    Args:
        normalise: as in `score`.
    """
    if task not in METRICS or METRICS[task] not in ERROR_RATES:
        return None
    rules = str.strip if METRICS[task] == "per" else partial(normalise_text, english=normalise)
    if not rules(reference):
        return None
    return float(jiwer.process_words(rules(reference), rules(hypothesis)).wer)


def mean_error(scores: Mapping[str, TaskScore]) -> float:
    """One number that chooses between checkpoints, the lower the better: the mean over tasks of what each lacks of 1.

    An error rate counts as it is, an exact match as 1 minus its share, CIDEr-D, which reaches 10, as 1 minus a tenth.
    """
    lacks = {
        "wer": lambda value: value,
        "per": lambda value: value,
        "exact_match": lambda value: 1 - value,
        "cider_d": lambda value: 1 - value / 10,
    }
    return float(np.mean([lacks[score.metric](score.value) for score in scores.values()]))


def retained_quality(
    student: Iterable[Prediction], teacher: Iterable[Prediction], *, normalise: bool = True, seed: int = 0
) -> dict[str, Retained]:
    """How much of the teacher's quality a student keeps, by task: 1 is all of it, above 1 the student is better.

    Quality is 1 - WER (not below 0) for error rates, and the metric itself otherwise. Both are resampled with the same
    clips, so that clips that are hard for both do not widen the interval. A task of which the teacher has no quality at
    all is left out: there is nothing to retain.

    Raises:
        ValueError: the two did not answer the same clips, or a task is not in `METRICS`.
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
        rules = partial(normalise_text, english=normalise)
        tallies = [_TALLIES[METRICS[task]](groups[task], rules) for groups in (students, teachers)]
        ours, theirs = (_quality(task, tally.gained.sum(), tally.possible.sum()) for tally in tallies)
        if theirs:
            our_N, their_N = (_quality(task, *_resample(tally, seed)) for tally in tallies)
            retained[task] = Retained(float(ours / theirs), *_interval(our_N[their_N > 0] / their_N[their_N > 0]))
    return retained


def _quality(task: str, gained, possible):
    """Larger is better: the metric, or what an error rate leaves of 1."""
    value = gained / np.maximum(possible, 1)
    return np.maximum(0, 1 - value) if METRICS[task] in ERROR_RATES else value


def _by_task(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """The predictions of each task, ordered by key, so that two models' clips stand at the same places."""
    groups = defaultdict(list)
    for prediction in predictions:
        if prediction.task not in METRICS:
            raise ValueError(
                f"task is {prediction.task!r} ({prediction.key}), but there is a metric for {', '.join(METRICS)} only; "
                f"correct the manifest, or add the task to METRICS in distill/metrics.py."
            )
        groups[prediction.task].append(prediction)
    return defaultdict(list, {task: sorted(groups[task], key=lambda p: p.key) for task in sorted(groups)})


def _resample(tally: _Tally, seed: int) -> tuple[np.ndarray, np.ndarray]:
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
