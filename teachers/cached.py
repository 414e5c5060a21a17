"""A teacher that has spoken: targets that the caching job wrote and that travel with the samples. Holds no model.

Shapes: B batch, S supervised positions, V vocabulary, W windows, Q queries a window, E query width, D LLM width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.field_types import expand_home
from shards.sample import Sample
from shards.streaming.catalog import hash_shards
from shards.targets.codecs.table import decode
from shards.targets.distributions import HiddenStates
from shards.targets.header import HEAD_INPUT, CacheHeader
from shards.targets.record import Stored, TargetRecord
from shards.targets.store import TargetReader
from teachers.files.cacheparts import load_head, load_rows
from teachers.targets import FRAMES, NO_CODEC, QUERIES, Targets, hidden_name, identify_row
from teachers.teacher import Teacher, learns_own_answer, take_student_answer
from teachers.words.batch import Batch
from teachers.words.rows import Row, RowTokenizer
from teachers.words.vocabulary import Vocabulary, check_answer_ids


class CachedTeacher(Teacher):
    """Reads the targets that come with each sample, and checks that they belong to it.

    Args:
        folder: the folder of the cache, or its URL.
        expected: what this run's teacher is; None takes the cache's word for it.

    Raises:
        ValueError: there is no cache, or it is of another teacher.
    """

    def __init__(self, folder: str | Path, expected: CacheHeader | None = None):
        self.cache_folder = folder = expand_home(folder)
        self.reader = TargetReader(folder, expected)
        self.header = self.reader.header
        identity = self.header.identity
        if identity["codec"]["name"] == NO_CODEC:
            raise ValueError(
                f"{folder} holds frames of ears alone, but targets are asked for; give the folder that `distill cache` "
                f"wrote."
            )
        self.is_asked_alike = True  # whether the student's prompts are the teacher's own, id by id
        self.widths = {"feature": identity["teacher_config"]["qformer_width"], "hidden": identity["llm_width"]}
        if "frames_width" in identity["features"]:
            self.widths["frames"] = identity["features"]["frames_width"]
        self.needs_audio = identity["features"]["frames"] == "none"
        self.labelled_share = identity["answers"]["labelled_share"]

    @property
    def identity(self) -> dict:
        """The cache's."""
        return self.header.identity

    @property
    def vocab(self) -> Vocabulary:
        """That of the tokenizer that the cache was made with."""
        return Vocabulary(**self.identity["tokenizer"])

    @cached_property
    def rows(self) -> RowTokenizer:
        """Makes the teacher's own rows of a sample, for a student with another tokenizer."""
        return load_rows(self.reader.folder, self.header)

    @cached_property
    def head_weight_VD(self) -> Tensor:
        """The teacher's head, where the targets are hidden states."""
        return load_head(self.reader.folder, self.header)

    def ask_as(self, template: str) -> None:
        """Learn in which form the student is asked; in another than its own, the cache's own prompts are checked."""
        self.is_asked_alike = template == self.identity["teacher_config"]["template"]

    def check_shards(self, shards: Sequence[str]) -> None:
        """Refuse audio shards whose targets the cache lacks, or has of others of their names.

        Raises:
            ShardError: see `TargetReader.check_shards`.
        """
        self.reader.check_shards(shards, hash_shards(shards))

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """Put the answer that the teacher gave when it was cached where it is the one to learn, and say where."""
        policy = self.identity["answers"]["of"]
        samples = [take_student_answer(sample) for sample in samples]
        is_pseudo = [learns_own_answer(sample, policy) for sample in samples]
        labelled = [replace(s, text=self._record(s).answer) if own else s for s, own in zip(samples, is_pseudo)]
        return labelled, is_pseudo

    def targets(self, batch: Batch, frames: list[Tensor] | None = None) -> Targets:
        """Read the batch's targets, each checked against the sample it is for; on the batch's device.

        Raises:
            ValueError: a sample has no targets, or they belong to another audio, prompt or answer.
        """
        records = [self._record(sample) for sample in batch.samples]
        for record, sample, row in zip(records, batch.samples, batch.rows):
            if record.answer == sample.text and not np.array_equal(record.answer_ids_S, row.answer):
                check_answer_ids(sample, record.answer_ids_S.tolist(), row.answer, self.rows.tokenizer)
            record.check(identify_row(sample, self._as_asked(sample, row)), f"{self.cache_folder}: {sample.key}")
        device = batch.labels_S.device
        distribution = decode(*(record.payload for record in records)).to(device)
        layers = {n: join([r.features[hidden_name(n)] for r in records], torch.cat, device) for n in self._layers}
        hidden_SD = layers.pop(HEAD_INPUT, None)
        if isinstance(distribution, HiddenStates):
            self.head_weight_VD = self.head_weight_VD.to(device)
            codec = self.identity["codec"]
            distribution = distribution.with_head(
                self.head_weight_VD, softcap=codec["softcap"], logit_scale=codec["logit_scale"]
            )
            hidden_SD = distribution.hidden_SD
        queries = [record.features.get(QUERIES) for record in records]
        has_queries = all(q is not None for q in queries)
        return Targets(
            distribution=distribution,
            queries_BWQE=join(queries, pad, device) if has_queries else None,
            num_windows_B=[len(q.values) for q in queries] if has_queries else [],
            label_logprobs_S=torch.cat([torch.tensor(record.label_logprobs_S) for record in records]).to(device),
            hidden=hidden_SD,
            hidden_by_layer=layers,
            frames=read_frames(batch, records, device, self.cache_folder),
        )

    def kept_frames(self, batch: Batch) -> list[Tensor] | None:
        """The ears' frames of a batch's clips; None where the cache keeps none.

        Raises:
            ValueError: as `read_frames`.
        """
        records = [self._record(sample) for sample in batch.samples]
        return read_frames(batch, records, batch.input_ids_BT.device, self.cache_folder)

    @property
    def _layers(self) -> list[int]:
        return self.identity["features"]["hidden_layers"]

    def _as_asked(self, sample: Sample, row: Row) -> Row:
        """The row with the teacher's own prompt, where the student is asked in another form."""
        if self.is_asked_alike:
            return row
        own = self.rows.row(sample, with_answer=False, first_prompt=False)
        return replace(own, answer=row.answer)

    def _record(self, sample: Sample) -> TargetRecord:
        if sample.targets is None:
            raise ValueError(
                f"targets of sample {sample.key} are not there, but this run reads the cache {self.cache_folder}; "
                f"open the stream with targets= that folder, or set teacher.online=true."
            )
        record = sample.targets
        if sample.student_answer is not None:
            return self._join_student(record, sample.student_answer, sample.key)
        if record.other is None or not learns_own_answer(sample, "both"):
            return record
        return replace(record.other, features=record.features | record.other.features)

    def _join_student(self, record: TargetRecord, answered: TargetRecord, key: str) -> TargetRecord:
        """Targets of the student's answer, with what of the clip's own record does not depend on the answer."""
        audio_and_prompt, _, _ = record.identity.rpartition(":")
        if not answered.identity.startswith(audio_and_prompt):
            raise ValueError(
                f"{self.cache_folder}: {key} was cached as {record.identity}, but the student's answer belongs to "
                f"{answered.identity}: another audio or prompt; run `distill answers` again."
            )
        return replace(answered, features=record.features | answered.features)


def join(features: Sequence[Stored], how: Callable[[list[Tensor]], Tensor], device: torch.device) -> Tensor:
    """A feature of several records as one tensor, float32; it goes to the device as small as it is stored.

    Args:
        features: the same feature of each record.
        how: joins tensors: `torch.cat`, or `pad`.
        device: where it is multiplied out.
    """
    values = how([torch.from_numpy(feature.values) for feature in features]).to(device).float()
    if features[0].scale is None:
        return values
    scale = how([torch.from_numpy(feature.scale) for feature in features]).to(device)
    return values.mul_(scale[..., None])


def read_frames(
    batch: Batch, records: Sequence[TargetRecord], device: torch.device, folder: str | Path
) -> list[Tensor] | None:
    """The ears' frames of a batch, each row padded with zeros to the longest; None where none are kept.

    Raises:
        ValueError: a sample is augmented, but its frames are of the clean clip.
    """
    names = sorted(name for name in records[0].features if name.startswith(FRAMES))
    if not names:
        return None
    changed = [s.key for s in batch.samples if s.clean_N is not None or s.mel_mask is not None]
    if changed:
        raise ValueError(
            f"sample {changed[0]} is augmented, but {folder} holds the encoders' frames of the clean clip; cache with "
            f"cache.frames=none, or train without augmentation."
        )
    return [join([record.features[name] for record in records], pad, device) for name in names]


def pad(rows: list[Tensor]) -> Tensor:
    """Rows of several lengths as one tensor, zeros behind the shorter."""
    return pad_sequence(rows, batch_first=True)
