"""A cache whose teacher is at hand too, for answers that it does not hold: what a student says within a step.

A round's records are made of these answers, in the step instead of by a job. Knows no student.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distill.caching.capture import Capturer, feature_dtypes
from shards.sample import Sample
from shards.targets.header import CacheHeader
from shards.targets.record import TargetRecord
from teachers.cached import CachedTeacher


class ScoredCache(CachedTeacher):
    """Reads its targets as any cache does, and lets the teacher score what is said now.

    Args:
        folder: the folder of the cache, or its URL.
        expected: what this run's teacher is; None takes the cache's word for it.
        capture: runs the teacher, with the settings of the cache; it hears the clips, so a stream must decode them.

    Raises:
        ValueError: there is no cache, or it is of another teacher.
    """

    scores_any_answer = True

    def __init__(self, folder: str | Path, expected: CacheHeader | None, capture: Capturer):
        super().__init__(folder, expected)
        self.capture = capture

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the records that a round would have of their answers, to the last bit."""
        records = self.capture.score([sample.as_the_teacher_hears_it for sample in samples])
        dtypes = {key: feature_dtypes(self.capture.config.cache, record) for key, record in records.items()}
        stored = {key: TargetRecord.unpack(r.pack(dtypes[key]), as_stored=True) for key, r in records.items()}
        return [replace(sample, student_answer=stored[sample.key]) for sample in samples]
