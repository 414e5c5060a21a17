"""What a teacher says about a batch, computed now or read from a cache: the same `Targets` either way.

Shapes: S supervised positions, K kept ids, W windows, Q queries a window, E query width.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.cache import TargetReader
from shards.codecs import decode
from shards.distributions import Distribution
from shards.header import CacheHeader
from shards.sample import Sample
from shards.targets import TargetRecord, identify_sample
from teachers.batch import Batch, Row
from teachers.salmonn import Salmonn

QUERIES = "queries_WQE"  # name of the Q-Former's queries among a record's features


@dataclass(frozen=True)
class Targets:
    """The teacher's word on every supervised position of a batch, row after row, and its Q-Former's queries."""

    distribution: Distribution
    queries_BWQE: Tensor | None  # None: not cached
    num_windows_B: list[int]


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's ids mean: their hash decides whether two models can be compared id by id."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, tokenizer) -> "Vocabulary":
        ids = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
        return cls(str(tokenizer.name_or_path), len(tokenizer), hashlib.sha256(ids.encode()).hexdigest())


class OnlineTeacher:
    """A frozen SALMONN that computes its targets in every step.

    Args:
        model: the teacher.
        k: ids kept a position; None keeps the whole vocabulary, exact at any temperature.
        temperatures: those the targets can be had at.
        max_new_tokens: of its own answer to a clip without text.
    """

    def __init__(self, model: Salmonn, *, k: int | None = None, temperatures: Sequence[float] = (1.0,),
                 max_new_tokens: int = 60):  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.k, self.temperatures, self.max_new_tokens = k, temperatures, max_new_tokens
        self.vocab = Vocabulary.of(model.tokenizer)
        self.cache_folder = None

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """Give clips without text the teacher's own greedy answer, and say which those are."""
        is_pseudo = [sample.text is None for sample in samples]
        unlabelled = [sample for sample in samples if sample.text is None]
        if not unlabelled:
            return list(samples), is_pseudo
        heard = [sample.as_the_teacher_hears_it for sample in unlabelled]
        answers = iter(self.model.generate(heard, max_new_tokens=self.max_new_tokens))
        return [replace(s, text=next(answers)) if s.text is None else s for s in samples], is_pseudo

    @torch.no_grad()
    def targets(self, batch: Batch, frames: list[Tensor] | None = None) -> Targets:
        """Run the teacher on the batch's samples; `frames` of shared ears are taken over when given."""
        own = self.model.collate([sample.as_the_teacher_hears_it for sample in batch.samples]).to(self.model.device)
        logits_SV, heard = self.model(own, frames)
        distribution = Distribution.from_logits(logits_SV, self.k, self.temperatures)
        return Targets(distribution, heard.queries_BWQE, heard.num_windows_B)


class CachedTeacher:
    """Targets that the caching job wrote and that travel with the samples. Holds no model.

    Args:
        folder: of the cache.
        expected: what this run's teacher is; None takes the cache's word for it.

    Raises:
        ValueError: there is no cache, or it is of another teacher.
    """

    def __init__(self, folder: str | Path, expected: CacheHeader | None = None):
        self.cache_folder, self.model = Path(folder), None
        self.header = TargetReader(self.cache_folder, expected).header
        self.vocab = Vocabulary(**self.header.identity["tokenizer"])

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """Give clips without text the answer the teacher gave when it was cached, and say which those are."""
        records = {s.key: self._record(s) for s in samples if s.text is None}
        labelled = [replace(s, text=records[s.key].answer) if s.text is None else s for s in samples]
        return labelled, [sample.text is None for sample in samples]

    def targets(self, batch: Batch, frames: list[Tensor] | None = None) -> Targets:
        """Read the batch's targets, each checked against the sample it is for; on the batch's device.

        Raises:
            ValueError: a sample has no targets, or they belong to another audio, prompt or answer.
        """
        records = [self._record(sample) for sample in batch.samples]
        for record, sample, row in zip(records, batch.samples, batch.rows):
            record.check(identify_row(sample, row), f"{self.cache_folder}: {sample.key}")
        device = batch.labels_S.device
        distribution = Distribution.concatenate([decode(record.payload) for record in records]).to(device)
        queries = [record.features.get(QUERIES) for record in records]
        if any(q is None for q in queries):
            return Targets(distribution, None, [])
        padded_BWQE = pad_sequence([torch.from_numpy(q) for q in queries], batch_first=True)
        return Targets(distribution, padded_BWQE.to(device, non_blocking=True), [len(q) for q in queries])

    def _record(self, sample: Sample) -> TargetRecord:
        if sample.targets is None:
            raise ValueError(
                f"targets of sample {sample.key} are not there, but this run reads the cache {self.cache_folder}; "
                f"open the stream with targets= that folder, or set teacher.online=true."
            )
        return TargetRecord.unpack(sample.targets)


def identify_row(sample: Sample, row: Row) -> str:
    """What targets of a sample belong to: its audio, its prompt's ids and its answer's ids."""
    return identify_sample(sample.sha256, row.before + row.after, row.answer)


def check_vocabularies(teacher: Vocabulary, student_tokenizer) -> None:
    """Refuse a student whose ids mean other tokens than the teacher's.

    Raises:
        ValueError: naming both tokenizers.
    """
    student = Vocabulary.of(student_tokenizer)
    if student.sha256 != teacher.sha256:
        raise ValueError(
            f"vocabulary of the student ({student.name}, {student.size:,} tokens, {student.sha256[:12]}) is not that "
            f"of the teacher ({teacher.name}, {teacher.size:,} tokens, {teacher.sha256[:12]}), but a KL compares id by "
            f"id; choose a student of the teacher's family, or the cross-tokenizer objective."
        )
