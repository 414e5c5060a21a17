"""What a student is trained on: CE + KL + feature loss of one micro-batch, as a module that DDP and DeepSpeed wrap.

Shapes: B batch, S supervised positions, W windows, Q queries a window, E query width, D LLM width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.config import LossConfig
from distill.features import feature_loss
from distill.fused import fused_ce_kl
from distill.head import head_weight, logit_transform
from teachers.batch import Batch
from teachers.salmonn import Heard, Salmonn
from teachers.targets import Targets

TERMS = ("ce", "kl", "feature")


@dataclass(frozen=True)
class Weights:
    """What each element of a micro-batch counts in the step's loss: a term's weight over its global count."""

    ce_S: Tensor
    kl_S: Tensor
    feature: float  # a window


@dataclass(frozen=True)
class Counts:
    """How many elements a term has in one micro-batch; summed over micro-batches and ranks they divide the term."""

    ce: int
    kl: int
    feature: int


def count(batch: Batch, targets: Targets | None, is_real: bool) -> Counts:
    """Count what `batch` brings to each term; one that only keeps the ranks in step (`is_real` false) none."""
    if not is_real:
        return Counts(0, 0, 0)
    has_features = targets is not None and targets.queries_BWQE is not None
    windows = sum(shared_windows(batch, targets)) if has_features else 0
    return Counts(batch.num_supervised, batch.num_supervised if targets is not None else 0, windows)


def shared_windows(batch: Batch, targets: Targets) -> list[int]:
    """Windows of each clip that student and teacher both have."""
    own = [row.num_audio_tokens // targets.queries_BWQE.shape[2] for row in batch.rows]
    return [min(a, b) for a, b in zip(own, targets.num_windows_B)]


def weigh(batch: Batch, is_pseudo: list[bool], loss: LossConfig, totals: Counts, is_real: bool) -> Weights:
    """The weights of one micro-batch, given the counts of the whole step over all ranks."""
    device = batch.labels_S.device
    scale_S = torch.tensor([loss.pseudo_ce if p else 1.0 for p in is_pseudo], device=device)[batch.row_S]
    real = float(is_real)
    return Weights(
        ce_S=scale_S * (real * loss.ce / max(totals.ce, 1)),
        kl_S=torch.full_like(scale_S, real * loss.kl / max(totals.kl, 1)),
        feature=real * loss.feature / max(totals.feature, 1),
    )


class Objective(nn.Module):
    """A student with its losses. The wrapped `forward` does all of it, so no gradient passes the wrapper by.

    Args:
        student: the model that is trained.
        loss: weights, temperature and kind of the terms.
        dtype: of the products; the losses are float32.
    """

    def __init__(self, student: Salmonn, loss: LossConfig, dtype: torch.dtype):
        super().__init__()
        self.student, self.loss, self.dtype = student, loss, dtype

    def forward(self, batch: Batch, targets: Targets | None, weights: Weights,
                frames: list[Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The micro-batch's part of the step's loss, and each term's part of it (detached, weights included)."""
        with torch.autocast(batch.labels_S.device.type, self.dtype, enabled=self.dtype != torch.float32):
            heard = self.student.hear(batch, frames)
            hidden_SD = self.student.answer_states(batch, heard)
        fused = self._ce_kl(hidden_SD, batch, targets, weights)
        terms = {"ce": (weights.ce_S * fused.ce_S).sum(), "kl": (weights.kl_S * fused.kl_S).sum()}
        total = fused.loss_S.sum()
        feature = self._feature(heard, batch, targets) if self.loss.feature else None
        if feature is not None:
            terms["feature"] = (feature.sum() * weights.feature).detach()
            total = total + feature.sum() * weights.feature
        return total, terms

    def _ce_kl(self, hidden_SD: Tensor, batch: Batch, targets: Targets | None, weights: Weights):
        llm = self.student.llm
        if targets is None or not self.loss.kl:
            empty = hidden_SD.new_zeros((len(hidden_SD), 0))
            ids, logprobs, residual = empty.long(), empty, empty.sum(-1)
            kl_weight_S = torch.zeros_like(weights.kl_S)
        else:
            ids = targets.distribution.ids_SK
            logprobs, residual = targets.distribution.at(self.loss.temperature)
            kl_weight_S = weights.kl_S
        return fused_ce_kl(
            hidden_SD, head_weight(llm.get_output_embeddings()), batch.labels_S, ids, logprobs, residual,
            weights.ce_S, kl_weight_S, self.loss.temperature, **logit_transform(llm.config),
        )  # fmt: skip

    def _feature(self, heard: Heard, batch: Batch, targets: Targets | None) -> Tensor | None:
        """The distance of each shared window's queries, one value a window."""
        if targets is None or targets.queries_BWQE is None:
            return None
        shared = shared_windows(batch, targets)
        theirs = targets.queries_BWQE.to(heard.queries_BWQE)
        own_WQE = torch.cat([heard.queries_BWQE[b, :w] for b, w in enumerate(shared)])
        theirs_WQE = torch.cat([theirs[b, :w] for b, w in enumerate(shared)])
        sample_W = torch.repeat_interleave(torch.tensor(shared)).to(own_WQE.device)
        return feature_loss(self.loss.feature_kind, own_WQE, theirs_WQE, sample_W)
