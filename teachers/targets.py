"""What a teacher says about a batch, computed now or read from a cache: the same `Targets` either way.

Shapes: S supervised positions, K kept ids, W windows, Q queries a window, E query width.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from shards.sample import Sample
from shards.targets.codecs.table import decode
from shards.targets.distributions import Distribution, HiddenStates
from shards.targets.header import CacheHeader
from shards.targets.record import TargetRecord, identify_sample
from shards.targets.store import TargetReader
from teachers.files.cacheparts import hash_prompts, load_head, load_rows
from teachers.files.loading import hash_frozen_parts, hash_tensors, own_tensors
from teachers.logits import head_logits
from teachers.salmonn import Salmonn
from teachers.words.batch import Batch
from teachers.words.rows import Row, RowTokenizer

QUERIES = "queries_WQE"  # name of the Q-Former's queries among a record's features
FRAMES = "frames_"  # beginning of the names of the encoders' frames
HEAD_INPUT = -1  # number of the layer that enters the head
NUM_IDS_SHOWN = 6  # of an answer's ids in a message


@dataclass(frozen=True)
class Targets:
    """The teacher's word on every supervised position of a batch, row after row, and its Q-Former's queries."""

    distribution: Distribution | HiddenStates
    queries_BWQE: Tensor | None  # None: not cached
    num_windows_B: list[int]
    label_logprobs_S: Tensor  # natural log-probability of each label, at temperature 1
    hidden: Tensor | None = None  # the states that enter the teacher's head, [S, D]; None: not cached
    hidden_by_layer: dict[int, Tensor] = field(default_factory=dict)  # outputs of LLM blocks, 1 is the first: [S, D]
    frames: list[Tensor] | None = None  # of ears that teacher and student share, [B, R, E] each; None: not cached


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
        answers: whose answers are learned: "label" where a clip has one, "teacher": always its own, "both": by turns.
        max_new_tokens: of its own answer.
        num_beams: of it.
        hidden_layers: LLM blocks whose outputs its targets hold, 1 is the first.
    """

    def __init__(self, model: Salmonn, *, k: int | None = None, temperatures: Sequence[float] = (1.0,),
                 answers: str = "label", max_new_tokens: int = 60, num_beams: int = 1,
                 hidden_layers: Sequence[int] = ()):  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.k, self.temperatures, self.answers = k, temperatures, answers
        self.max_new_tokens, self.num_beams, self.hidden_layers = max_new_tokens, num_beams, hidden_layers
        self.vocab = Vocabulary.of(model.tokenizer)
        self.rows = model.rows
        self.widths = {"feature": model.config.qformer_width, "hidden": model.project.out_features}
        self.cache_folder = self.header = None

    @cached_property
    def identity(self) -> dict:
        """What its targets depend on, as plain data: weights by their hashes, prompts, and what is asked of it."""
        asked = ("k", "answers", "max_new_tokens", "num_beams")
        return {
            "teacher_weights": {"own": hash_tensors(own_tensors(self.model)), **hash_frozen_parts(self.model)},
            "prompts": hash_prompts(self.model.rows.prompts),
            **{name: getattr(self, name) for name in asked},
            "temperatures": list(self.temperatures),
            "hidden_layers": list(self.hidden_layers),
        }

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """Put the teacher's own answer where it is the one to learn, and say where that is."""
        samples = [take_student_answer(sample) for sample in samples]
        is_pseudo = [learns_own_answer(sample, self.answers) for sample in samples]
        answers = iter(self.answer([sample for sample, is_own in zip(samples, is_pseudo) if is_own]))
        return [replace(s, text=next(answers)) if is_own else s for s, is_own in zip(samples, is_pseudo)], is_pseudo

    def answer(self, samples: Sequence[Sample]) -> list[str]:
        """The teacher's own answers, greedy or by beam search."""
        if not samples:
            return []
        heard = [sample.as_the_teacher_hears_it for sample in samples]
        return self.model.generate(heard, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)

    @torch.no_grad()
    def targets(self, batch: Batch, frames: list[Tensor] | None = None) -> Targets:
        """Run the teacher on the batch's samples; `frames` of shared ears are taken over when given.

        Raises:
            ValueError: the batch's rows hold other ids of an answer than the teacher's own tokenizer gives.
        """
        own = self.model.collate([sample.as_the_teacher_hears_it for sample in batch.samples]).to(self.model.device)
        for sample, theirs, students in zip(batch.samples, own.rows, batch.rows):
            check_answer_ids(sample, theirs.answer, students.answer, self.model.tokenizer)
        heard = self.model.hear(own, frames)
        with record_blocks(self.model, self.hidden_layers) as outputs:
            hidden_SD = self.model.answer_states(own, heard)
        logits_SV = head_logits(self.model.llm, hidden_SD)
        label_logprobs_S = logits_SV.log_softmax(-1).gather(1, own.labels_S[:, None])[:, 0]
        distribution = Distribution.from_logits(logits_SV, self.k, self.temperatures)
        layers = {n: x_BTD.flatten(0, 1)[own.predicting_S] for n, x_BTD in outputs.items()}
        queries_BWQE = heard.queries_BWQE if self.model.has_queries else None
        return Targets(distribution, queries_BWQE, heard.num_windows_B, label_logprobs_S, hidden_SD, layers)


class CachedTeacher:
    """Targets that the caching job wrote and that travel with the samples. Holds no model.

    Args:
        folder: of the cache, or its URL.
        expected: what this run's teacher is; None takes the cache's word for it.

    Raises:
        ValueError: there is no cache, or it is of another teacher.
    """

    def __init__(self, folder: str | Path, expected: CacheHeader | None = None):
        self.cache_folder, self.model = folder, None
        self.reader = TargetReader(folder, expected)
        self.header = self.reader.header
        identity = self.header.identity
        self.widths = {"feature": identity["teacher_config"]["qformer_width"], "hidden": identity["llm_width"]}
        self.vocab = Vocabulary(**identity["tokenizer"])

    @cached_property
    def rows(self) -> RowTokenizer:
        """Makes the teacher's own rows of a sample, for a student with another tokenizer."""
        return load_rows(self.reader.folder, self.header)

    @property
    def labelled_share(self) -> float:
        """The share of the clips whose text the cache was made with; the others have the teacher's answers."""
        return self.header.identity["answers"]["labelled_share"]

    @property
    def keeps_frames(self) -> bool:
        """Whether the encoders' frames are cached, so that no audio need be decoded."""
        return self.header.identity["features"]["frames"] != "none"

    @property
    def windows(self) -> str | None:
        """The windows whose frames are cached; a student may read fewer. None: no frames are."""
        return self.header.identity["features"]["windows"]

    @cached_property
    def head_weight_VD(self) -> Tensor:
        """The teacher's head, where the targets are hidden states."""
        return load_head(self.reader.folder, self.header)

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """Put the answer that the teacher gave when it was cached where it is the one to learn, and say where."""
        policy = self.header.identity["answers"]["of"]
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
            record.check(identify_row(sample, row), f"{self.cache_folder}: {sample.key}")
        device = batch.labels_S.device
        distribution = decode(*(record.payload for record in records)).to(device)
        layers = {n: join_positions(records, hidden_name(n)).to(device) for n in self._layers}
        hidden_SD = layers.pop(HEAD_INPUT, None)
        if isinstance(distribution, HiddenStates):
            self.head_weight_VD = self.head_weight_VD.to(device)
            codec = self.header.identity["codec"]
            distribution = distribution.with_head(
                self.head_weight_VD, softcap=codec["softcap"], logit_scale=codec["logit_scale"]
            )
            hidden_SD = distribution.hidden_SD
        queries = [record.features.get(QUERIES) for record in records]
        has_queries = all(q is not None for q in queries)
        return Targets(
            distribution=distribution,
            queries_BWQE=pad_rows(queries).to(device) if has_queries else None,
            num_windows_B=[len(q) for q in queries] if has_queries else [],
            label_logprobs_S=torch.cat([torch.tensor(record.label_logprobs_S) for record in records]).to(device),
            hidden=hidden_SD,
            hidden_by_layer=layers,
            frames=self._frames(batch, records, device),
        )

    @property
    def _layers(self) -> list[int]:
        return self.header.identity["features"]["hidden_layers"]

    def _frames(self, batch: Batch, records: Sequence[TargetRecord], device: torch.device) -> list[Tensor] | None:
        """The ears' frames, each row cut or padded with zeros to the longest."""
        names = sorted(name for name in records[0].features if name.startswith(FRAMES))
        if not names:
            return None
        changed = [s.key for s in batch.samples if s.clean_N is not None or s.mel_mask is not None]
        if changed:
            raise ValueError(
                f"sample {changed[0]} is augmented, but {self.cache_folder} holds the encoders' frames of the clean "
                f"clip; cache with cache.frames=none, or train without augmentation."
            )
        return [pad_rows([record.features[name] for record in records]).to(device) for name in names]

    def _record(self, sample: Sample) -> TargetRecord:
        if sample.targets is None:
            raise ValueError(
                f"targets of sample {sample.key} are not there, but this run reads the cache {self.cache_folder}; "
                f"open the stream with targets= that folder, or set teacher.online=true."
            )
        record = TargetRecord.unpack(sample.targets)
        if sample.student_answer is not None:
            return self._join_student(record, TargetRecord.unpack(sample.student_answer), sample.key)
        if record.other is None or not learns_own_answer(sample, "both"):
            return record
        return replace(record.other, features=record.features | record.other.features)

    def _join_student(self, record: TargetRecord, answered: TargetRecord, key: str) -> TargetRecord:
        """Targets of the student's answer, with what of the clip's own record does not depend on the answer."""
        audio_and_prompt, _, _ = record.identity.rpartition(":")
        if not answered.identity.startswith(audio_and_prompt):
            raise ValueError(
                f"{self.cache_folder}: {key} was cached as {record.identity}, but the student's answer belongs to "
                f"{answered.identity}: another audio or prompt; run distill/answers.py again."
            )
        return replace(answered, features=record.features | answered.features)


def take_student_answer(sample: Sample) -> Sample:
    """The sample with the student's answer in the place of its text, token by token, where it comes with one."""
    if sample.student_answer is None:
        return sample
    record = TargetRecord.unpack(sample.student_answer)
    return replace(sample, text=record.answer, answer_ids=tuple(record.answer_ids_S.tolist()))


def learns_own_answer(sample: Sample, policy: str) -> bool:
    """Whether a sample's answer is to be the teacher's own: "both" takes turns, the label in epochs 0, 2, 4 …"""
    if sample.student_answer is not None:
        return False
    return sample.text is None or policy == "teacher" or (policy == "both" and sample.epoch % 2 == 1)


@contextmanager
def record_blocks(model: Salmonn, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While it is open, a pass of the LLM leaves the outputs of these blocks, by number from 1: [B, T, D].

    Raises:
        ValueError: the LLM has no such block.
    """
    blocks, outputs = llm_blocks(model.llm), {}
    handles = []
    for number in layers:
        if not 1 <= number <= len(blocks):
            raise ValueError(
                f"hidden_layers names {number}, but the LLM's blocks are 1 to {len(blocks)} ({HEAD_INPUT} is the input "
                f"of the head); correct cache.hidden_layers."
            )

        def keep(module, inputs, output, number=number):
            outputs[number] = output[0] if isinstance(output, tuple) else output

        handles.append(blocks[number - 1].register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def llm_blocks(llm: nn.Module) -> nn.ModuleList:
    """The blocks of a LLM of any family: `layers`, `h` or what it calls the longest list in its decoder.

    Raises:
        ValueError: there is no such list.
    """
    lists = [module for module in llm.get_decoder().children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{type(llm).__name__} keeps its blocks in no list, but cache.hidden_layers numbers them; leave it empty "
            f"({HEAD_INPUT} alone works), or use a LLM such as Llama, Qwen, GPT-2, GPT-NeoX or BLOOM."
        )
    return max(lists, key=len)


def hidden_name(layer: int) -> str:
    """The name of a layer's states among a record's features."""
    return "hidden_head_SD" if layer == HEAD_INPUT else f"hidden_{layer}_SD"


def join_positions(records: Sequence[TargetRecord], name: str) -> Tensor:
    """A feature of every record, one after the other."""
    return torch.cat([torch.from_numpy(record.features[name]) for record in records])


def pad_rows(rows: Sequence[np.ndarray]) -> Tensor:
    """Rows of several lengths as one tensor, zeros behind the shorter."""
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)


def identify_row(sample: Sample, row: Row) -> str:
    """What targets of a sample belong to: its audio, its prompt's ids and its answer's ids."""
    return identify_sample(sample.sha256, row.before + row.after, row.answer)


def check_answer_ids(sample: Sample, teacher_ids: Sequence[int], student_ids: Sequence[int], tokenizer) -> None:
    """Refuse an answer that teacher and student cut into other ids: one table of tokens can be cut in several ways.

    Args:
        sample: whose answer it is.
        teacher_ids: with the end token.
        student_ids: with the student's.
        tokenizer: the teacher's, which names the ids of both.

    Raises:
        ValueError: naming the sample and both sides' ids from the first that differs.
    """
    theirs, own = list(teacher_ids), list(student_ids)
    if theirs == own:
        return
    start = next((i for i, (a, b) in enumerate(zip(theirs, own)) if a != b), min(len(theirs), len(own)))
    shown = [_show_ids(ids, start, tokenizer) for ids in (own, theirs)]
    raise ValueError(
        f"answer of sample {sample.key} is {sample.text!r}, which the student reads as {shown[0]}, but the teacher as "
        f"{shown[1]} (from id {start} on), and a KL compares id by id; give both the same tokenizer files, end token "
        f"and max_answer_tokens, or set loss.cross_tokenizer=chunk."
    )


def _show_ids(ids: Sequence[int], start: int, tokenizer) -> str:
    """The ids from a place on, the first few, with their tokens."""
    part = list(ids[start : start + NUM_IDS_SHOWN])
    known = range(len(tokenizer))
    tokens = [tokenizer.convert_ids_to_tokens(i) if i in known else "(unknown)" for i in part]
    more = " …" if len(ids) > start + NUM_IDS_SHOWN else ""
    return f"{part}{more} {' '.join(map(str, tokens))}{more} of {len(ids)} ids"


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
            f"id; choose a student of the teacher's family, or set loss.cross_tokenizer=chunk."
        )
