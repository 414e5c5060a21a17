"""The objective once more, as plainly as it can be written: one clip at a time, no padding, all logits, probabilities.

`doctor` holds the fused, batched objective to it. Nothing here is shared with what it judges: rows are laid out again,
the LLM's own forward makes the logits, and divergences are the formulas of probabilities, in float64.

Shapes: T positions of one clip, S supervised positions, K kept ids, C = K + 1 outcomes, V vocabulary, W windows of one
clip, Q queries a window, E width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config import LossConfig
from distill.objective.divergences import build_divergence, plain_kl
from distill.objective.features import FEATURES
from distill.objective.module import Objective
from distill.objective.weighing import MicroBatch
from shards.sample import Sample
from shards.targets.distributions import Sparse
from shards.targets.header import HEAD_INPUT
from teachers.blocks import record_blocks
from teachers.salmonn import Salmonn


def answer_of(student: Salmonn, sample: Sample) -> list[int]:
    """The ids that the student should say: the text's, cut where the student cuts, and its end token."""
    rows = student.rows
    ids = rows.text.encode(sample.text)
    if len(ids) > rows.max_answer_tokens:
        return ids[: rows.max_answer_tokens] + rows.end_ids
    return rows.text.encode(sample.text + rows.end.text) + list(rows.end.tail)


@dataclass(frozen=True)
class Said:
    """What the student says of a few clips, one after the other, and what its teacher says of them."""

    logits_SV: Tensor  # at the answers' tokens
    labels_S: Tensor
    sizes: list[int]  # of each answer, in tokens
    queries_WQE: list[Tensor]  # of each clip
    states_SD: dict[int, Tensor]  # by layer, -1 the input of the head
    targets: object  # the teacher's, or None
    loss: LossConfig
    projectors: Mapping[str, nn.Module]

    def project(self, name: str, features: Tensor) -> Tensor:
        """The student's features times the matrix of a projector, where there is one."""
        if name not in self.projectors:
            return features.double()
        return features.double() @ self.projectors[name].weight.double().T


def answer_clip(objective: Objective, sample: Sample, frames: list[Tensor] | None) -> tuple[Tensor, Tensor, dict]:
    """One clip's answer by the LLM's own forward on a row without padding: logits, queries and states by layer."""
    student = objective.student
    batch = student.collate([sample]).to(student.device)
    windows_WQE = student.hear(batch, frames).queries_BWQE[0]
    queries_WE = windows_WQE.flatten(0, 1)[: batch.rows[0].num_audio_tokens]
    embed = student.llm.get_input_embeddings()
    row, answer = batch.rows[0], answer_of(student, sample)
    before, after, said = (
        embed(torch.tensor(ids, dtype=torch.long, device=student.device)) for ids in (row.before, row.after, answer)
    )
    row_TD = torch.cat([before, student.project(queries_WE).to(before.dtype), after, said])
    place = slice(-len(answer) - 1, -1)
    with record_blocks(student, objective.blocks) as states:
        keep = student.llm.get_output_embeddings().register_forward_pre_hook
        handle = keep(lambda _, args: states.update({HEAD_INPUT: args[0]}))
        logits_TV = student.llm(inputs_embeds=row_TD[None], use_cache=False).logits[0]
    handle.remove()
    states = {layer: x_BTD[0, place] for layer, x_BTD in states.items()}
    return logits_TV[place].double(), windows_WQE[: len(queries_WE) // windows_WQE.shape[1]], states


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


def plain_ce(said: Said) -> Tensor:
    """Mean over the labels of minus their log-probability."""
    return F.cross_entropy(said.logits_SV, said.labels_S)


def plain_divergence(said: Said) -> Tensor:
    """Mean over the positions of which the teacher says something."""
    loss, cross = said.loss, said.targets.cross
    sparse = said.targets.distribution.at(loss.temperature) if cross is None else cross.sparse
    rows = torch.ones_like(said.labels_S, dtype=torch.bool) if cross is None else cross.is_matched_S
    measure = build_divergence(loss.kl_kind, loss.kl_parameter, plain=True)
    value_S = loss.temperature**2 * measure(*outcomes(said.logits_SV, sparse, loss.temperature))
    return value_S[rows].sum() / max(int(rows.sum()), 1)


def plain_chunk(said: Said) -> Tensor:
    """Mean of temperature times the KL of two coins: that a chunk is said, to the power 1 / temperature."""
    cross, temperature = said.targets.cross, said.loss.chunk_temperature
    own_S = -F.cross_entropy(said.logits_SV, said.labels_S, reduction="none")
    coins = []
    for logprobs_S, chunk_S in (
        (own_S, cross.alignment.student_chunk_S),
        (cross.teacher_logprobs_S.double(), cross.alignment.teacher_chunk_S),
    ):
        sums = [logprobs_S[chunk_S == chunk].sum() for chunk in range(cross.alignment.num_chunks)]
        p_C = (torch.stack(sums).clamp(max=-1e-6) / temperature).exp() if sums else logprobs_S[:0]
        coins.append(torch.stack([p_C, 1 - p_C], 1))
    own, teachers = coins
    return temperature * plain_kl(teachers, own).sum() / max(len(own), 1)


def plain_feature(said: Said) -> Tensor:
    """Mean over the windows that both have, clip by clip."""
    measure, values = FEATURES[said.loss.feature_kind].plain, []
    for own_WQE, theirs_WQE, num_windows in zip(
        said.queries_WQE, said.targets.queries_BWQE, said.targets.num_windows_B
    ):
        num_shared = min(len(own_WQE), num_windows)
        values.append(measure(said.project("feature", own_WQE[:num_shared]), theirs_WQE[:num_shared].double()))
    return torch.cat(values).mean()


def plain_hidden(said: Said) -> Tensor:
    """Mean over the answers' tokens and the pairs of layers, clip by clip."""
    measure, means = FEATURES[said.loss.hidden_kind].plain, []
    theirs = said.targets.hidden_by_layer | {HEAD_INPUT: said.targets.hidden}
    for layer, own_layer in said.loss.layer_pairs.items():
        own_SD = said.project(f"hidden{layer}", said.states_SD[own_layer])
        clips = zip(own_SD.split(said.sizes), theirs[layer].double().split(said.sizes))
        means.append(torch.cat([measure(*clip) for clip in clips]).mean())
    return torch.stack(means).mean()


# By term: its second writing, a mean over all its elements with weights left out. A term without one is not compared.
PLAIN: dict[str, Callable[[Said], Tensor]] = {
    "ce": plain_ce,
    "kl": plain_divergence,
    "chunk": plain_chunk,
    "feature": plain_feature,
    "hidden": plain_hidden,
}


def say_plainly(objective: Objective, m: MicroBatch) -> Said:
    """The clips of a micro-batch once more, one at a time, with a gradient.

    Args:
        objective: whose student is asked.
        m: samples with their texts, the teacher's targets of them, and the encoders' frames where they are cached.
    """
    student, clips = objective.student, []
    for b, sample in enumerate(m.batch.samples):
        frames = None if m.frames is None else [x_BRE[b : b + 1] for x_BRE in m.frames]
        clips.append(answer_clip(objective, sample, frames))
    logits, queries, states = zip(*clips)
    answers = [answer_of(student, sample) for sample in m.batch.samples]
    return Said(
        logits_SV=torch.cat(logits)[:, : objective.vocab_size],
        labels_S=torch.tensor([token for answer in answers for token in answer], device=student.device),
        sizes=[len(answer) for answer in answers],
        queries_WQE=list(queries),
        states_SD={layer: torch.cat([clip[layer] for clip in states]) for layer in states[0]},
        targets=m.targets,
        loss=objective.loss,
        projectors=objective.projectors,
    )
