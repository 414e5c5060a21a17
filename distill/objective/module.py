"""What a student is trained on: the terms of one micro-batch, as a module that DDP and DeepSpeed wrap.

Shapes: S supervised positions, X elements of a term, D LLM width.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.config import LossConfig
from distill.objective.crosstokenizer import fused_cross_loss
from distill.objective.divergences import build_divergence
from distill.objective.features import FEATURES
from distill.objective.fused import fused_ce_kl
from distill.objective.head import Head
from distill.objective.losses import check_temperature
from distill.objective.terms.needs import check_needs, held_by_targets
from distill.objective.terms.term import Seen
from distill.objective.weighing import MicroBatch, Terms, present_terms
from shards.targets.distributions import Sparse
from teachers.blocks import record_blocks
from teachers.experts import record_routers
from teachers.salmonn import Salmonn

AGREEMENT = "agreement"  # among what the head's pass finds beside its terms


class Found(NamedTuple):
    """What the log reads of a micro-batch, without gradient."""

    parts: dict[str, Tensor]  # of the step's loss, by term, weights included
    values: dict[str, Tensor]  # of each element of a term: value_X
    agreement_2: Tensor  # positions at which the teacher's most probable id is the student's too; of how many


class Objective(nn.Module):
    """A student with its losses. The wrapped `forward` does all of it, so no gradient passes the wrapper by.

    Args:
        student: the model that is trained.
        loss: temperature and kinds of the terms; their weights come with each micro-batch.
        dtype: the data type of the products; the losses are float32.
        terms: those that are computed, by name.
        vocab_size: ids that teacher and student share; None: all rows of the head.
        widths: those of the teacher's features, by term; where the student's differs, a projector is learned beside it.
        seed: the seed of the projectors.

    Raises:
        ValueError: the divergence, its parameter or the temperature cannot be.
    """

    def __init__(self, student: Salmonn, loss: LossConfig, dtype: torch.dtype, terms: Terms, *,
                 vocab_size: int | None = None, widths: Mapping[str, int], seed: int = 0):  # fmt: skip
        super().__init__()
        self.student, self.loss, self.dtype, self.terms, self.vocab_size = student, loss, dtype, terms, vocab_size
        self.divergence = build_divergence(loss.kl_kind, loss.kl_parameter)
        check_temperature(loss.temperature)
        self.blocks = sorted({layer for term in terms.values() for layer in term.layers(loss)})
        self.projectors = build_projectors(student, loss, terms, widths, seed)

    def forward(self, m: MicroBatch, weights: Mapping[str, Tensor]) -> tuple[Tensor, Found]:
        """The micro-batch's part of the step's loss, and what the log reads of it.

        Args:
            m: the micro-batch.
            weights: of each element of the terms that have something to say of it, from `weigh`.

        Raises:
            ValueError: the targets do not hold what a term needs.
        """
        with torch.autocast(m.batch.labels_S.device.type, self.dtype, enabled=self.dtype != torch.float32):
            heard = self.student.hear(m.batch, m.frames)
            with record_blocks(self.student, self.blocks) as blocks, self._record_routing() as routing:
                hidden_SD = self.student.answer_states(m.batch, heard)
        seen = Seen(self.student, m.batch, heard, hidden_SD, m.targets, self.loss, blocks, self.projectors, routing)
        terms = present_terms(self.terms, m.targets)
        if m.targets is not None:
            check_needs(terms, self.loss, held_by_targets(m.targets))
        total, of_head = self._from_head(seen, weights)
        parts, values = {}, {}
        for name, term in terms.items():
            if term.is_of_head:
                values[name] = of_head[name]
                parts[name] = (weights[name] * of_head[name]).sum()
            else:
                value_X = term.values(seen)
                part = (value_X * weights[name]).sum()
                values[name], parts[name], total = value_X.detach(), part.detach(), total + part
        if m.targets is None:  # DDP waits for every trained tensor's gradient
            total = total + 0 * sum(p.sum() for p in self.projectors.parameters())
        return total, Found(parts, values, of_head[AGREEMENT])

    def _record_routing(self) -> AbstractContextManager[Sequence[Tensor]]:
        """The routers' logits of the pass inside, where a term looks at them."""
        needs = any(term.needs_routing for term in self.terms.values())
        return record_routers(self.student.llm) if needs else nullcontext(())

    def _from_head(self, seen: Seen, weights: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms that share one pass over the vocabulary: their sum, and each one's values without gradient."""
        loss, targets = self.loss, seen.targets
        common = seen.hidden_SD, Head.of(self.student.llm, self.vocab_size), seen.batch.labels_S
        none_S = torch.zeros(len(seen.batch.labels_S), device=seen.batch.labels_S.device)
        weights = {"ce": none_S, "kl": none_S} | weights  # a pass without any of them keeps the ranks in step
        if targets is not None and targets.cross is not None:
            weights = {"chunk": none_S.new_zeros(targets.cross.alignment.num_chunks)} | weights
            found = fused_cross_loss(*common, targets.cross, weights["ce"], weights["kl"], weights["chunk"],
                                     loss.temperature, loss.chunk_temperature, divergence=self.divergence)  # fmt: skip
            agreement_2 = torch.stack(
                [found.agrees_S, ((weights["kl"] != 0) & targets.cross.is_matched_S).float()]
            ).sum(1)
            parts = {"ce": found.ce_S, "kl": found.kl_S, "chunk": found.chunk_C, AGREEMENT: agreement_2}
            return found.loss, parts
        if targets is None or "kl" not in self.terms:
            empty_S0 = seen.hidden_SD.new_zeros((len(none_S), 0))
            sparse = Sparse(empty_S0.long(), empty_S0, empty_S0.sum(-1))
        else:
            sparse = targets.distribution.at(loss.temperature)
        found = fused_ce_kl(*common, sparse, weights["ce"], weights["kl"], loss.temperature, divergence=self.divergence)
        agreement_2 = torch.stack([found.agrees_S, (weights["kl"] != 0).float()]).sum(1)
        return found.loss_S.sum(), {"ce": found.ce_S, "kl": found.kl_S, AGREEMENT: agreement_2}


def build_projectors(
    student: Salmonn, loss: LossConfig, terms: Terms, widths: Mapping[str, int], seed: int
) -> nn.ModuleDict:
    """A learned map for every pair of features whose widths differ and whose distance needs equal ones."""
    projectors = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for term, own in terms.items():
            for name, (kind, width) in own.projections(student, loss).items():
                if not FEATURES[kind].is_relative and term in widths and widths[term] != width:
                    projectors[name] = build_projector(width, widths[term]).to(student.device)
    return projectors


def build_projector(student_width: int, teacher_width: int) -> nn.Module:
    """A learned linear map from the student's features to the teacher's width.

    It starts as the first rows of an orthogonal matrix, so that lengths and angles survive where there is room.
    """
    projector = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(projector.weight)
    return projector
