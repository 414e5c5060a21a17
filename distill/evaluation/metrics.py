"""Scores what a model answered: one metric a task, with a confidence interval, and how much quality a student retains.

WER is jiwer's on normalised text (`wording.py`), captions are scored by `captioning.py`, questions by exact match. It
knows text only: no model, no audio. SPICE and METEOR need Java and are reported as not available, never as 0.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import jiwer
import numpy as np

from distill.evaluation.captioning import bleu_4, cider_d, rouge_l
from distill.evaluation.wording import Normaliser, is_latin, normalise_text, plain_answer, plain_phones, split_caption

# Task to metric. A task that is missing here cannot be scored, and says so.
METRICS = MappingProxyType(
    {
        "asr": "wer",
        "asr_zh": "wer",  # of a language without spaces read `cer`
        "asr_de": "wer",
        "lyrics_recognition": "wer",
        "speech_separation": "wer",
        "speaker_diarization_asr": "wer",
        "phone_recognition": "per",
        "audiocaption": "cider_d",
        "audiocaption_v2": "cider_d",
        "audiocaption_zh": "cider_d",
        "audiocaption_de": "cider_d",
        "audio_speech_description": "cider_d",
        "fluent_speech_audio": "cider_d",
        "audio_story_telling": "cider_d",
        "music_description": "cider_d",
        "translation_ec": "cider_d",  # of translations read `bleu_4`
        "translation_ce": "cider_d",
        "translation_en2ja": "cider_d",
        "translation_en2de": "cider_d",
        "speech_query": "cider_d",
        "speech_audio_query": "cider_d",
        "speech_audio_coreasoning": "cider_d",
        "gender_recognition": "exact_match",
        "emotion_recognition": "exact_match",
        "speaker_verification": "exact_match",
        "count_audio": "exact_match",
        "count_word": "exact_match",
        "keywords": "exact_match",
        "slot_filling": "exact_match",
        "info_retrieval": "exact_match",
        "info_retrieval_wotext": "exact_match",
        "phone_retrieval": "exact_match",
        "time_QA": "exact_match",
        "audio_time": "exact_match",
        "QA": "exact_match",
        "gender_QA": "exact_match",
        "inference_QA": "exact_match",
    }
)
ERROR_RATES = ("wer", "per")  # lower is better, and quality is 1 - rate; of the others quality is the value
NOT_AVAILABLE = "not available"
CONFIDENCE = 0.95
NUM_RESAMPLES = 1_000

NO_METRICS = MappingProxyType({})


@dataclass(frozen=True)
class Prediction:
    """What a model answered for one clip, and what it should have."""

    key: str  # of the row that was asked, where several are one clip
    task: str
    source: str
    references: tuple[str, ...]  # one or more right answers
    hypothesis: str
    ended: bool = True  # the model wrote its end token, instead of running into the length limit


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
class _Tally:
    """A task's clips as two numbers each: the metric is the sum of the first over the sum of the second."""

    gained: np.ndarray
    possible: np.ndarray
    extra: dict[str, float | str]

    @property
    def value(self) -> float:
        return float(self.gained.sum() / self.possible.sum())


def _tally_words(predictions: Sequence[Prediction], normalise: Normaliser) -> _Tally:
    """Word errors and reference words; of several references the one with the lowest rate counts."""
    measures, characters = [], []
    for prediction in predictions:
        hypothesis = normalise(prediction.hypothesis)
        normalised = dict.fromkeys(normalise(reference) for reference in prediction.references)
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
    return _tally_words(predictions, plain_phones)


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
    """1 where the answer equals a reference, see `wording.plain_answer`, whatever `normalise` is."""
    right = [plain_answer(p.hypothesis) in set(map(plain_answer, p.references)) for p in predictions]
    return _Tally(np.array(right, dtype=float), np.ones(len(right)), {})


_TALLIES = MappingProxyType(
    {
        "wer": _tally_words,
        "per": _tally_phones,
        "cider_d": _tally_captions,
        "exact_match": _tally_exact,
    }
)


def _tally_own(predictions: Sequence[Prediction], metric: OwnMetric) -> _Tally:
    """What a metric of one's own gives each answer."""
    values = np.array([float(metric(prediction)) for prediction in predictions])
    if not np.isfinite(values).all():
        raise ValueError(
            f"metric of task {predictions[0].task} gave {values[~np.isfinite(values)][0]} for an answer, but must give "
            f"a finite number; correct it."
        )
    return _Tally(values, np.ones(len(values)), {})


def score(predictions: Iterable[Prediction], *, normalise: bool = True, seed: int = 0,
          own: Mapping[str, OwnMetric] = NO_METRICS) -> dict[str, TaskScore]:  # fmt: skip
    """Score the answers of each task.

    Args:
        predictions: answers of one or several tasks, in any order.
        normalise: Whisper's English rules before `wer`, or case and punctuation only; see `normalise_text`. Say which
            beside a WER.
        seed: of the bootstrap; the same answers and seed give the same interval.
        own: metrics of one's own by task, in the place of the library's; the score is their mean over clips.

    Returns:
        By task, in alphabetical order. `wer`, `per`, `exact_match` are fractions; `cider_d` is 0 to 10. Error rates are
        those of the whole set (all errors over all words), not means over clips. `extra["ended"]` is the share of
        answers that ended by themselves, `extra["references"]` how many a clip has, and `extra["chance"]` the metric of
        a model that hears nothing, see `chance_answers`.

    Raises:
        ValueError: a task is not in `METRICS`, or its references hold no word.
    """
    scores = {}
    for task, group in _by_task(predictions, own).items():
        figures = {}
        if task in own:
            name = f"own {getattr(own[task], '__name__', type(own[task]).__name__)}"  # and no error rate of ours
            tally = _tally_own(group, own[task])
        else:
            name, tally = METRICS[task], _tally(task, group, normalise)
            figures["chance"] = _tally(task, chance_answers(group, normalise), normalise).value
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


def _tally(task: str, predictions: Sequence[Prediction], normalise: bool) -> _Tally:
    if normalise and METRICS[task] == "wer" and not is_latin(r for p in predictions for r in p.references):
        warnings.warn(
            f"texts of task {task} are not written in Latin letters, but eval.normalise=true applies English rules, "
            f"which drop the marks of others; set eval.normalise=false.",
            stacklevel=3,
        )
    return _TALLIES[METRICS[task]](predictions, partial(normalise_text, english=normalise))


def chance_answers(predictions: Sequence[Prediction], normalise: bool = True) -> list[Prediction]:
    """What a model that hears nothing would answer to the clips of one task: to each the commonest right answer.

    The commonest is that of most clips, in the words of the task's metric; of several, the one whose words are. For a
    question with two answers that is the majority's share; for a caption, how far one sentence for all clips goes.
    """
    metric = METRICS[predictions[0].task]
    plain = {
        "wer": partial(normalise_text, english=normalise),
        "per": plain_phones,
        "cider_d": lambda caption: " ".join(split_caption(caption)),
        "exact_match": plain_answer,
    }[metric]
    answers = [{plain(reference) for reference in prediction.references} for prediction in predictions]
    count = Counter(answer for clip in answers for answer in clip)
    clips_with = Counter(word for clip in answers for word in {word for answer in clip for word in answer.split()})

    def rank(answer: str) -> tuple[int, float, str]:
        words = answer.split()
        return -count[answer], -sum(clips_with[word] for word in words) / max(1, len(words)), answer

    commonest = min(count, key=rank)
    return [replace(prediction, hypothesis=commonest) for prediction in predictions]


def error_rate(task: str, reference: str, hypothesis: str, *, normalise: bool = True) -> float | None:
    """Word or phone errors over reference words of one answer; None for a task without words, or an empty reference.

    Args:
        normalise: as in `score`.
    """
    if task not in METRICS or METRICS[task] not in ERROR_RATES:
        return None
    rules = plain_phones if METRICS[task] == "per" else partial(normalise_text, english=normalise)
    if not rules(reference):
        return None
    return float(jiwer.process_words(rules(reference), rules(hypothesis)).wer)


def mean_error(scores: Mapping[str, TaskScore]) -> float:
    """One number that chooses between checkpoints, the lower the better: the mean over tasks of what each lacks of 1.

    An error rate counts as it is, an exact match as 1 minus its share, CIDEr-D, which reaches 10, as 1 minus a tenth,
    and a metric of one's own as 1 minus its mean.
    """
    lacks = {
        "wer": lambda value: value,
        "per": lambda value: value,
        "exact_match": lambda value: 1 - value,
        "cider_d": lambda value: 1 - value / 10,
    }
    own = lacks["exact_match"]
    known = [lacks.get(score.metric, own) for score in scores.values()]
    return float(np.mean([lack(score.value) for lack, score in zip(known, scores.values())]))


def is_above_chance(score: TaskScore) -> bool:
    """Whether the whole interval of a score is better than what a model that hears nothing would get."""
    chance = score.extra.get("chance")  # scorecards of before it was measured have none
    if chance is None:
        return True
    return score.high < min(1.0, chance) if score.metric in ERROR_RATES else score.low > chance


def retained_quality(
    student: Iterable[Prediction], teacher: Iterable[Prediction], *, normalise: bool = True, seed: int = 0
) -> dict[str, Retained]:
    """How much of the teacher's quality a student keeps, by task: 1 is all of it, above 1 the student is better.

    Quality is 1 - WER (not below 0) for error rates, and the metric itself otherwise. Both are resampled with the same
    clips, so that clips that are hard for both do not widen the interval. A task of which the teacher is not shown to
    be above chance (`chance_answers`; the lower end of its own interval decides) is left out: there is nothing to
    retain.

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
        ours, theirs = (_tally(task, groups[task], normalise) for groups in (students, teachers))
        chance = _tally(task, chance_answers(teachers[task], normalise), normalise)
        our_N, their_N = (_quality(task, *_resample(tally, seed)) for tally in (ours, theirs))
        if _interval(their_N)[0] > _quality(task, chance.gained.sum(), chance.possible.sum()):
            our, their = (_quality(task, tally.gained.sum(), tally.possible.sum()) for tally in (ours, theirs))
            retained[task] = Retained(float(our / their), *_interval(our_N[their_N > 0] / their_N[their_N > 0]))
    return retained


def _quality(task: str, gained, possible):
    """Larger is better: the metric, or what an error rate leaves of 1."""
    value = gained / np.maximum(possible, 1)
    return np.maximum(0, 1 - value) if METRICS[task] in ERROR_RATES else value


def _by_task(
    predictions: Iterable[Prediction], own: Mapping[str, OwnMetric] = NO_METRICS
) -> dict[str, list[Prediction]]:
    """The predictions of each task, ordered by key, so that two models' clips stand at the same places."""
    groups = defaultdict(list)
    for prediction in predictions:
        if prediction.task not in METRICS and prediction.task not in own:
            raise ValueError(
                f"task is {prediction.task!r} ({prediction.key}), but there is a metric for {', '.join(METRICS)} only; "
                f"correct the manifest, or add the task to METRICS in distill/evaluation/metrics.py."
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
