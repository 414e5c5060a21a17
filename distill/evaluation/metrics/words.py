"""Error rates: words wrong over words there, by jiwer, and phones alike. Knows nothing of captions."""

import warnings
from collections.abc import Sequence

import jiwer
import numpy as np

from distill.evaluation.metrics.metric import Metric, Prediction, Tally
from distill.evaluation.metrics.normalization import Normalizer, is_latin, normalize_phones, normalize_text


def count_errors(predictions: Sequence[Prediction], plain: Normalizer) -> Tally:
    """Errors and reference words; of several references the one with the lowest rate counts.

    Raises:
        ValueError: no reference has a word.
    """
    measures, characters = [], []
    for prediction in predictions:
        hypothesis = plain(prediction.hypothesis)
        references = dict.fromkeys(plain(reference) for reference in prediction.references)
        best = min(references, key=lambda reference: jiwer.process_words(reference, hypothesis).wer)
        measures.append(jiwer.process_words(best, hypothesis))
        characters.append(jiwer.process_characters(best, hypothesis))
    kinds = {kind: sum(getattr(m, kind) for m in measures) for kind in ("substitutions", "deletions", "insertions")}
    num_words = np.array([m.hits + m.substitutions + m.deletions for m in measures])
    num_characters = sum(c.hits + c.substitutions + c.deletions for c in characters)
    if not num_words.sum():
        raise ValueError(
            f"the references of task {predictions[0].task} are {len(predictions)} empty texts after normalization, but "
            f"an error rate divides by their words; check the manifest's `text`; where all of it is `uh` and the like, "
            f"eval.normalize=false keeps that."
        )
    errors = np.array([m.substitutions + m.deletions + m.insertions for m in measures])
    extra = {kind: float(count / num_words.sum()) for kind, count in kinds.items()}
    extra["cer"] = sum(c.substitutions + c.deletions + c.insertions for c in characters) / max(1, num_characters)
    return Tally(errors, num_words, extra)


def count_words(predictions: Sequence[Prediction], normalize: bool) -> Tally:
    """Word errors; texts of other letters under English rules are said to be so."""
    if normalize and not is_latin(reference for p in predictions for reference in p.references):
        warnings.warn(
            f"texts of task {predictions[0].task} are not written in Latin letters, but eval.normalize=true applies "
            f"English rules, which drop the marks of others; set eval.normalize=false.",
            stacklevel=3,
        )
    return count_errors(predictions, lambda text: normalize_text(text, english=normalize))


def rate_of(plain: Normalizer, reference: str, hypothesis: str) -> float | None:
    """Errors over reference words of one answer; None for an empty reference."""
    if not plain(reference):
        return None
    return float(jiwer.process_words(plain(reference), plain(hypothesis)).wer)


WER = Metric(
    title="WER",
    tasks=(
        "asr",
        "asr_zh",  # of a language without spaces read `cer`
        "asr_de",
        "lyrics_recognition",
        "speech_separation",
        "speaker_diarization_asr",
    ),
    tally=count_words,
    plain=normalize_text,
    is_error_rate=True,
)
# phones are separated by spaces, and no words, so they are never normalized
PER = Metric(
    title="phone error rate",
    tasks=("phone_recognition",),
    tally=lambda predictions, normalize: count_errors(predictions, normalize_phones),
    plain=lambda text, normalize: normalize_phones(text),
    is_error_rate=True,
)
