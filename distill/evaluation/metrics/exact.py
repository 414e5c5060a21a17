"""Exact match: 1 where an answer equals a reference as `normalize_answer` writes both, whatever the language."""

from collections.abc import Sequence

from distill.evaluation.metrics.metric import Metric, Prediction, Tally
from distill.evaluation.metrics.normalization import normalize_answer


def count_right(predictions: Sequence[Prediction], normalize: bool) -> Tally:
    """The share of answers that are right."""
    return Tally.of_values(
        [normalize_answer(p.hypothesis) in set(map(normalize_answer, p.references)) for p in predictions]
    )


EXACT_MATCH = Metric(
    title="exact match",
    tasks=(
        "gender_recognition",
        "emotion_recognition",
        "speaker_verification",
        "count_audio",
        "count_word",
        "keywords",
        "slot_filling",
        "info_retrieval",
        "info_retrieval_wotext",
        "phone_retrieval",
        "time_QA",
        "audio_time",
        "QA",
        "gender_QA",
        "inference_QA",
    ),
    tally=count_right,
    plain=lambda text, normalize: normalize_answer(text),
)
