"""The objective once more, as plainly as it can be written: one clip at a time, no padding, all logits, probabilities.

`doctor` holds the fused, batched objective to it. Nothing here is shared with what it judges: rows are laid out again,
the LLM's own forward makes the logits, and divergences are the formulas of probabilities, in float64.

Shapes: T positions of one clip, S supervised positions, K kept ids, C = K + 1 outcomes, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config import LossConfig
from distill.objective.crossteacher import CrossedTargets
from distill.objective.divergences import build_divergence, plain_kl
from shards.sample import Sample
from shards.targets.distributions import Sparse
from teachers.salmonn import Salmonn


def answer_of(student: Salmonn, sample: Sample) -> list[int]:
    """The ids that the student should say: the text's, cut where the student cuts, and its end token."""
    rows = student.rows
    ids = rows.text.encode(sample.text)
    if len(ids) > rows.max_answer_tokens:
        return ids[: rows.max_answer_tokens] + rows.end_ids
    return rows.text.encode(sample.text + rows.end.text) + list(rows.end.tail)


def answer_logits(student: Salmonn, sample: Sample, vocab_size: int, frames: list[Tensor] | None) -> Tensor:
    """Logits of one clip's answer, by the LLM's own forward on a row without padding: logits_SV."""
    batch = student.collate([sample]).to(student.device)
    queries_WE = student.hear(batch, frames).queries_BWQE[0].flatten(0, 1)[: batch.rows[0].num_audio_tokens]
    embed = student.llm.get_input_embeddings()
    row, answer = batch.rows[0], answer_of(student, sample)
    before, after, said = (
        embed(torch.tensor(ids, dtype=torch.long, device=student.device)) for ids in (row.before, row.after, answer)
    )
    row_TD = torch.cat([before, student.project(queries_WE).to(before.dtype), after, said])
    logits_TV = student.llm(inputs_embeds=row_TD[None], use_cache=False).logits[0]
    return logits_TV[-len(answer) - 1 : -1, :vocab_size].double()


def outcomes(logits_SV: Tensor, teacher: Sparse, temperature: float) -> tuple[Tensor, Tensor]:
    """Student's and teacher's probabilities of the kept ids and of all others together: q_SC and p_SC."""
    ids_SK, logprobs_SK, log_residual_S = teacher
    q_SV = (logits_SV / temperature).softmax(-1)
    is_kept_SK = (logprobs_SK > -torch.inf) & (ids_SK < logits_SV.shape[1])
    p_SK = logprobs_SK.double().exp()
    lost_S = (p_SK * ~is_kept_SK).sum(-1)
    q_SK = q_SV.gather(1, ids_SK.where(is_kept_SK, 0)) * is_kept_SK
    p_SC = torch.cat([p_SK * is_kept_SK, (log_residual_S.double().exp() + lost_S)[:, None]], 1)
    is_outside_SV = torch.ones_like(q_SV).scatter_add_(1, ids_SK.where(is_kept_SK, 0), -is_kept_SK.double())
    return torch.cat([q_SK, (q_SV * is_outside_SV).sum(-1, keepdim=True)], 1), p_SC


def chunk_values(student_logprobs_S: Tensor, targets: CrossedTargets, temperature: float) -> Tensor:
    """For each chunk, temperature times the KL of two coins: that the chunk is said, to the power 1 / temperature."""
    alignment = targets.cross.alignment
    coins = []
    for logprobs_S, chunk_S in (
        (student_logprobs_S, alignment.student_chunk_S),
        (targets.cross.teacher_logprobs_S.double(), alignment.teacher_chunk_S),
    ):
        sums = [logprobs_S[chunk_S == chunk].sum() for chunk in range(alignment.num_chunks)]
        p_C = (torch.stack(sums).clamp(max=-1e-6) / temperature).exp() if sums else logprobs_S[:0]
        coins.append(torch.stack([p_C, 1 - p_C], 1))
    return temperature * plain_kl(coins[1], coins[0])


def plain_terms(
    student: Salmonn,
    samples: list[Sample],
    targets,
    loss: LossConfig,
    vocab_size: int,
    frames: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each term that the head computes: the mean over all its elements, weights left out, with a gradient.

    Args:
        samples: with their texts.
        targets: the teacher's of the same samples, or None.
        loss: kinds and temperatures.
        vocab_size: ids that take part.
        frames: of the encoders, a row a sample, where they are cached; None: the ears run.
    """
    heard = [None if frames is None else [x_BRE[b : b + 1] for x_BRE in frames] for b in range(len(samples))]
    logits_SV = torch.cat([answer_logits(student, s, vocab_size, own) for s, own in zip(samples, heard)])
    answers = [token for sample in samples for token in answer_of(student, sample)]
    labels_S = torch.tensor(answers, device=logits_SV.device)
    logprobs_S = -F.cross_entropy(logits_SV, labels_S, reduction="none")
    terms = {"ce": -logprobs_S.mean()}
    if targets is None:
        return terms
    if targets.cross is not None:
        cross = targets.cross
        sparse, rows = cross.sparse, cross.is_matched_S
        chunk_C = chunk_values(logprobs_S, targets, loss.chunk_temperature)
        terms["chunk"] = chunk_C.sum() / max(len(chunk_C), 1)
    else:
        sparse = targets.distribution.at(loss.temperature)
        rows = torch.ones_like(labels_S, dtype=torch.bool)
    q_SC, p_SC = outcomes(logits_SV, sparse, loss.temperature)
    value_S = loss.temperature**2 * build_divergence(loss.kl_kind, loss.kl_parameter, plain=True)(q_SC, p_SC)
    terms["kl"] = value_S[rows].sum() / max(int(rows.sum()), 1)
    return terms
