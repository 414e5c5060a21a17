"""What each element of a micro-batch counts in a step's loss. Knows batches and targets, no model and no loss function.

A term is the mean over its own elements of the whole step, over micro-batches and ranks: supervised positions for the
cross-entropy (but those of a student's own answer), positions with a target for the divergence, windows, hidden states,
chunks. An element's weight is the term's weight times its sample's, over that global count, so the gradient of a step
does not depend on how it was split.

Shapes: B batch, S supervised positions, W windows shared with the teacher, C chunks of the answers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.objective.alignment import NO_CHUNK, Alignment
from distill.objective.schedule import TERMS, Schedule, parse_schedule
from shards.sample import Sample
from teachers.targets import Targets
from teachers.words.batch import Batch


@dataclass(frozen=True)
class Counts:
    """How many elements a term has in one micro-batch; summed over micro-batches and ranks they divide the term."""

    ce: int = 0
    kl: int = 0
    feature: int = 0
    hidden: int = 0
    chunk: int = 0
    own: int = 0  # of every term of one's own: supervised positions


@dataclass(frozen=True)
class Weights:
    """What each element of a micro-batch counts in the step's loss."""

    ce_S: Tensor
    kl_S: Tensor
    feature_W: Tensor
    hidden_S: Tensor
    chunk_C: Tensor
    own_S: Tensor  # for a term of weight 1


def count(batch: Batch, targets: Targets | None, is_real: bool) -> Counts:
    """Count what `batch` brings to each term; one that only keeps the ranks in step (`is_real` false) none."""
    if not is_real:
        return Counts()
    labelled = sum(len(row.answer) for s, row in zip(batch.samples, batch.rows) if s.student_answer is None)
    if targets is None:
        return Counts(ce=labelled, own=batch.num_supervised)
    crossed = targets.cross
    return Counts(
        ce=labelled,
        kl=batch.num_supervised if crossed is None else int(crossed.is_matched_S.sum()),
        feature=sum(shared_windows(batch, targets)),
        hidden=batch.num_supervised if crossed is None else 0,
        chunk=0 if crossed is None else crossed.alignment.num_chunks,
        own=batch.num_supervised,
    )


def shared_windows(batch: Batch, targets: Targets | None) -> list[int]:
    """Windows of each clip that student and teacher both have."""
    if targets is None or targets.queries_BWQE is None:
        return [0] * len(batch.rows)
    own = [row.num_audio_tokens // targets.queries_BWQE.shape[2] for row in batch.rows]
    return [min(a, b) for a, b in zip(own, targets.num_windows_B)]


def window_rows(batch: Batch, targets: Targets | None) -> Tensor:
    """The batch row of each shared window, row after row: row_W."""
    return torch.repeat_interleave(torch.tensor(shared_windows(batch, targets))).to(batch.labels_S.device)


def chunk_rows(alignment: Alignment, row_S: Tensor) -> Tensor:
    """The batch row of each chunk: row_C."""
    chunk_S = alignment.student_chunk_S
    rows = row_S.new_zeros(alignment.num_chunks + 1)  # the last place takes the tokens without a chunk
    return rows.scatter(0, chunk_S.where(chunk_S != NO_CHUNK, alignment.num_chunks), row_S)[:-1]


def weigh(batch: Batch, targets: Targets | None, is_pseudo: Sequence[bool], sample_weights: Sequence[float],
          loss: LossConfig, totals: Counts, is_real: bool) -> Weights:  # fmt: skip
    """The weights of one micro-batch, given the counts of the whole step over all ranks.

    Args:
        is_pseudo: whether a sample's answer is the teacher's own.
        sample_weights: what a sample counts in every term, see `schedule.sample_weight`.
        loss: the terms' weights at this step.
        totals: counts of the step.
        is_real: False for a stand-in, all of whose weights are 0.
    """
    weight_B = torch.tensor(sample_weights, dtype=torch.float32, device=batch.labels_S.device) * float(is_real)
    factors = [ce_factor(*pair, loss) for pair in zip(batch.samples, is_pseudo)]
    ce_weight_B = weight_B * weight_B.new_tensor(factors)
    no_chunk = batch.row_S[:0]
    is_crossed = targets is not None and targets.cross is not None
    row_C = chunk_rows(targets.cross.alignment, batch.row_S) if is_crossed else no_chunk
    return Weights(
        ce_S=ce_weight_B[batch.row_S] * (loss.ce / max(totals.ce, 1)),
        kl_S=weight_B[batch.row_S] * (loss.kl / max(totals.kl, 1)),
        feature_W=weight_B[window_rows(batch, targets)] * (loss.feature / max(totals.feature, 1)),
        hidden_S=weight_B[batch.row_S] * (loss.hidden / max(totals.hidden, 1)),
        chunk_C=weight_B[row_C] * (loss.chunk / max(totals.chunk, 1)),
        own_S=weight_B[batch.row_S] / max(totals.own, 1),
    )


def ce_factor(sample: Sample, is_pseudo: bool, loss: LossConfig) -> float:
    """What cross-entropy counts on a sample: nothing on the student's own answer, whose words are not the truth."""
    if sample.student_answer is not None:
        return 0.0
    return loss.pseudo_ce if is_pseudo else 1.0


def build_schedules(loss: LossConfig, num_steps: int) -> dict[str, Schedule]:
    """The schedule of every term that has one.

    Raises:
        ValueError: a schedule is longer than the run.
    """
    return {
        name: parse_schedule(text, getattr(loss, name), num_steps, f"loss.schedules.{name}")
        for name, text in loss.schedules.items()
    }


def active_terms(loss: LossConfig, schedules: dict[str, Schedule], *, is_crossed: bool) -> frozenset[str]:
    """The terms whose weight is not 0 throughout the run; chunks are one where the tokenizers differ."""
    return frozenset(
        name
        for name in TERMS
        if (getattr(loss, name) or (name in schedules and schedules[name].kind != "constant" and schedules[name].end))
        and (is_crossed or name != "chunk")
    )


def loss_at(loss: LossConfig, schedules: dict[str, Schedule], step: int) -> LossConfig:
    """The objective with the weights of one step."""
    return replace(loss, **{name: schedule.weight(step) for name, schedule in schedules.items()})


def only_ce(loss: LossConfig) -> LossConfig:
    """The objective of a student without a teacher."""
    schedules = {name: text for name, text in loss.schedules.items() if name == "ce"}
    return replace(loss, kl=0.0, feature=0.0, hidden=0.0, chunk=0.0, schedules=schedules)


def check_tasks(task_weights: Mapping[str, float], known: Collection[str]) -> None:
    """Refuse the weight of a task that no sample can have.

    Raises:
        ValueError: naming the task.
    """
    for task in task_weights:
        if task not in known:
            raise ValueError(f"loss.task_weights names {task}, but the tasks are {', '.join(known)}; correct the name.")
