"""Distillation between models whose tokenizers differ.

Two terms. The likelihood of every chunk of the answer at whose ends both tokenizers agree is matched (approximate
likelihood matching, Minixhofer et al. 2025); it needs the log-probabilities of the answer's own tokens only, which
every cache holds. And where a chunk is the same single token on both sides, the teacher's kept ids that have a twin in
the student's vocabulary are a top-K target like any other, all else being the bucket. Ids without a twin are never
paired by rank: X-Token measured that it hurts.

Shapes: S tokens of the answers, C chunks, M matched tokens, K kept ids, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.objective.alignment import NO_CHUNK, Alignment, align, answer_ends, token_bytes
from distill.objective.divergences import Divergence, forward_kl_terms
from distill.objective.fused import fused_ce_kl
from distill.objective.head import Head
from distill.objective.losses import check_temperature, move_into_bucket
from distill.objective.numerics import expect, widen
from shards.targets.distributions import Sparse
from teachers.words.ending import End

NO_TWIN = -1
CERTAIN = -1e-6  # nats; the gradient of log(1 - p) has no float32 value nearer to 0


def chunk_logprobs(logprobs_S: Tensor, chunk_S: Tensor, num_chunks: int) -> Tensor:
    """Log-probability of each chunk: the sum over its tokens; logprobs_C."""
    sums = logprobs_S.new_zeros(num_chunks + 1)
    # the last place takes the tokens without a chunk
    return sums.index_add(0, chunk_S.where(chunk_S != NO_CHUNK, num_chunks), logprobs_S)[:num_chunks]


def _log_not(log_p: Tensor) -> Tensor:
    """`log(1 - p)`. Its gradient is finite wherever p < 1, which that of a `where` of two formulas is not."""
    return torch.log(-torch.expm1(log_p))


def chunk_likelihood(
    student_logprobs_S: Tensor, teacher_logprobs_S: Tensor, alignment: Alignment, temperature: float = 100.0
) -> Tensor:
    """KL between the teacher's and the student's chance of each chunk against all else.

    With p the chance to the power of 1 / temperature it is the KL of (p, 1 - p) times the temperature, which keeps its
    gradient from vanishing with it. A high temperature brings likely and unlikely chunks to one scale; 100 is ALM's.

    Args:
        student_logprobs_S: the student's log-probability of each of its label tokens: minus its cross-entropy.
        teacher_logprobs_S: the teacher's of each of its own, from the cache.
        alignment: the alignment of the answers' tokens.
        temperature: the temperature of the chunk's chance; it is not that of the KL on tokens.

    Returns:
        chunk_C, nats times temperature; float32, with a gradient for the student only.
    """
    check_temperature(temperature)
    sides = (student_logprobs_S, alignment.student_chunk_S), (teacher_logprobs_S.detach(), alignment.teacher_chunk_S)
    student_C, teacher_C = (
        chunk_logprobs(widen(logprobs_S), chunk_S, alignment.num_chunks).clamp(max=CERTAIN) / temperature
        for logprobs_S, chunk_S in sides
    )
    happens_C = expect(teacher_C, teacher_C - student_C)
    happens_not_C = expect(_log_not(teacher_C), _log_not(teacher_C) - _log_not(student_C))
    return temperature * (happens_C + happens_not_C)


def twin_ids(
    teacher_pieces: Sequence[bytes], student_pieces: Sequence[bytes], end_ids: Mapping[int, int] | None = None
) -> Tensor:
    """The student's id that stands for the same bytes as each of the teacher's, `NO_TWIN` where there is none; twin_V.

    Args:
        teacher_pieces: bytes of every id, from `alignment.token_bytes`.
        student_pieces: the student's.
        end_ids: teacher's end token to the student's: they end an answer alike, though their bytes differ.

    Several ids may stand for the same bytes (byte fallback beside a character of one byte): the first one is taken on
    both sides, the others have no twin, so that no two ids share one.
    """
    student: dict[bytes, int] = {}
    for index, piece in enumerate(student_pieces):
        student.setdefault(piece, index)
    twins = torch.full((len(teacher_pieces),), NO_TWIN, dtype=torch.long)
    seen = {b""}
    for index, piece in enumerate(teacher_pieces):
        if piece in student and piece not in seen:
            twins[index] = student[piece]
        seen.add(piece)
    for teacher_end, student_end in (end_ids or {}).items():
        twins[twins == student_end] = NO_TWIN
        twins[teacher_end] = student_end
    return twins


def matched_targets(
    alignment: Alignment,
    twin_V: Tensor,
    teacher_labels_S: Tensor,
    student_labels_S: Tensor,
    teacher: Sparse,
) -> tuple[Tensor, Sparse]:
    """The teacher's top-K in the student's ids, at the tokens that are the same on both sides.

    Args:
        alignment: the alignment of the answers' tokens.
        twin_V: from `twin_ids`.
        teacher_labels_S: the answers' ids of the teacher.
        student_labels_S: the answers' ids of the student.
        teacher: what it says at each of its positions, at the temperature of the loss.

    Returns:
        The student's positions M, and what the teacher says there; the mass of ids without a twin is with the others.
    """
    teacher_M, student_M = alignment.teacher_single_M, alignment.student_single_M
    is_same_M = twin_V[teacher_labels_S[teacher_M]] == student_labels_S[student_M]
    teacher_M, student_M = teacher_M[is_same_M], student_M[is_same_M]
    ids_MK = twin_V[teacher.ids_SK[teacher_M]]
    has_twin_MK = ids_MK != NO_TWIN
    matched = Sparse(ids_MK.where(has_twin_MK, 0), teacher.logprobs_SK[teacher_M], teacher.log_residual_S[teacher_M])
    return student_M, move_into_bucket(matched, has_twin_MK)


@dataclass(frozen=True)
class CrossTargets:
    """What a teacher with another tokenizer says about the student's supervised positions.

    Attributes:
        alignment: the alignment of the answers' tokens.
        teacher_logprobs_S: the teacher's log-probability of each of its own answer tokens, at temperature 1.
        sparse: the teacher's kept ids as the student's, at every position of the student, at the temperature of the
            loss; unused slots at positions that do not match.
        is_matched_S: the student's positions that have such a target.
    """

    alignment: Alignment
    teacher_logprobs_S: Tensor
    sparse: Sparse
    is_matched_S: Tensor


class Translator:
    """Turns a teacher's targets into a student's, whose tokenizer is another. Holds two vocabularies and no model.

    Args:
        teacher_tokenizer: fast tokenizer of the model that was cached.
        student_tokenizer: the student's.
        teacher_end: what ends the teacher's answers.
        student_end: the student's; they are twins when both are one control token.
    """

    def __init__(self, teacher_tokenizer, student_tokenizer, teacher_end: End, student_end: End):
        self.teacher_pieces, self.student_pieces = token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)
        self.teacher_end, self.student_end = teacher_end, student_end
        is_twin = all(not end.text and len(end.ids) == 1 for end in (teacher_end, student_end))
        ends = {teacher_end.ids[0]: student_end.ids[0]} if is_twin else {}
        self.twin_V = twin_ids(self.teacher_pieces, self.student_pieces, ends)

    def align(self, text: str, teacher_ids: Sequence[int], student_ids: Sequence[int]) -> Alignment:
        """Align one answer's tokens, its end tokens among them.

        Raises:
            ValueError: the tokens of one side do not spell the text.
        """
        teacher = answer_ends(teacher_ids, self.teacher_pieces, text, self.teacher_end)
        student = answer_ends(student_ids, self.student_pieces, text, self.student_end)
        return align(teacher, student, len(text.encode()), 0, 0)  # the end tokens have their places already

    def translate(
        self,
        alignment: Alignment,
        teacher_labels_S: Tensor,
        student_labels_S: Tensor,
        teacher_logprobs_S: Tensor,
        teacher: Sparse,
    ) -> CrossTargets:
        """Targets of a batch; arguments as `matched_targets`, and the teacher's log-probabilities of its own tokens."""
        twin_V = self.twin_V.to(teacher.ids_SK.device)
        positions_M, matched = matched_targets(alignment, twin_V, teacher_labels_S, student_labels_S, teacher)
        shape_SK = len(student_labels_S), teacher.ids_SK.shape[1]
        empty = Sparse(
            teacher.ids_SK.new_zeros(shape_SK),
            teacher.logprobs_SK.new_full(shape_SK, -torch.inf),
            teacher.log_residual_S.new_zeros(shape_SK[0]),
        )
        sparse = Sparse(*(whole.index_copy(0, positions_M, part) for whole, part in zip(empty, matched)))
        is_matched_S = torch.zeros_like(student_labels_S, dtype=torch.bool).index_fill_(0, positions_M, True)
        return CrossTargets(alignment, teacher_logprobs_S, sparse, is_matched_S)


class CrossLoss(NamedTuple):
    """`loss` carries the gradient; the unreduced values, nats, are for the log and carry none."""

    loss: Tensor
    ce_S: Tensor
    kl_S: Tensor
    chunk_C: Tensor
    agrees_S: Tensor


def fused_cross_loss(
    hidden_SD: Tensor,
    head: Head,
    labels_S: Tensor,
    targets: CrossTargets,
    ce_weight_S: Tensor,
    kl_weight_S: Tensor,
    chunk_weight_C: Tensor,
    temperature: float,
    chunk_temperature: float = 100.0,
    *,
    divergence: Divergence = forward_kl_terms,
) -> CrossLoss:
    """Weighted sum of cross-entropy, KL at matched positions and chunk likelihood, without the logits.

    The likelihood of a chunk is a function of the cross-entropies of its tokens. A first pass without gradient finds
    them, and with them the slope of the chunk term in each, which a second pass adds to that token's weight: three
    matrix products with the head instead of two, and the exact gradient.

    Args:
        hidden_SD: the student's states that enter the head; `head` and `labels_S` as in `fused_ce_kl`.
        targets: from `Translator.translate`, at `temperature`.
        ce_weight_S: what a position's cross-entropy counts.
        kl_weight_S: what its KL counts; positions that do not match count nothing whatever it is.
        chunk_weight_C: what a chunk counts.
        temperature: the temperature of the KL, whose value holds its square.
        chunk_temperature: the temperature of the chunks, see `chunk_likelihood`.
        divergence: terms of the KL, as in `fused_ce_kl`.
    """
    common, sparse = (hidden_SD, head, labels_S), targets.sparse
    with torch.no_grad():
        one_S, none_S = torch.ones_like(ce_weight_S), torch.zeros_like(kl_weight_S)
        ce_S = fused_ce_kl(*common, sparse, one_S, none_S, temperature).ce_S
    logprobs_S = (-ce_S).requires_grad_()
    with torch.enable_grad():
        chunk_C = chunk_likelihood(logprobs_S, targets.teacher_logprobs_S, targets.alignment, chunk_temperature)
        slope_S = torch.autograd.grad((chunk_weight_C * chunk_C).sum(), logprobs_S)[0]
    kl_weight_S = kl_weight_S * targets.is_matched_S
    weights = ce_weight_S - slope_S, kl_weight_S
    fused = fused_ce_kl(*common, sparse, *weights, temperature, divergence=divergence)
    # The slopes' share of the value gives way to the chunk term itself.
    exchange = (chunk_weight_C * chunk_C).sum() + (slope_S * ce_S).sum()
    return CrossLoss(fused.loss_S.sum() + exchange.detach(), ce_S, fused.kl_S, chunk_C.detach(), fused.agrees_S)
