"""What a student is trained on: the terms of one micro-batch, as a module that DDP and DeepSpeed wrap.

Shapes: B batch, S supervised positions, W windows, Q queries a window, E query width, D LLM width, V vocabulary.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from distill.config import LossConfig
from distill.config.rules import check_divergence
from distill.objective.crosstokenizer import fused_cross_loss
from distill.objective.divergences import build_divergence
from distill.objective.features import FEATURES, feature_loss
from distill.objective.fused import fused_ce_kl
from distill.objective.head import head_weight
from distill.objective.losses import check_temperature
from distill.objective.terms.term import OwnTerm, Seen
from distill.objective.weighing import TERMS, Weights, shared_windows, window_rows
from shards.targets.codecs.table import codec_of
from shards.targets.distributions import Sparse
from shards.targets.header import CacheHeader
from teachers.blocks import record_blocks
from teachers.logits import logit_transform
from teachers.salmonn import Heard, Salmonn
from teachers.targets import HEAD_INPUT, Targets
from teachers.words.batch import Batch


class Objective(nn.Module):
    """A student with its losses. The wrapped `forward` does all of it, so no gradient passes the wrapper by.

    Args:
        student: the model that is trained.
        loss: temperature and kinds of the terms; their weights come with each micro-batch.
        dtype: the data type of the products; the losses are float32.
        active: the terms that are computed.
        vocab_size: ids that teacher and student share; None: all rows of the head.
        widths: of the teacher's features, by term; where the student's differs, a projector is learned beside it.
        seed: the seed of the projectors.
        own: terms of one's own, by name.

    Raises:
        ValueError: the divergence, its parameter or the temperature cannot be.
    """

    def __init__(self, student: Salmonn, loss: LossConfig, dtype: torch.dtype, *,
                 active: frozenset[str] = frozenset(TERMS), vocab_size: int | None = None,
                 widths: dict[str, int] | None = None, seed: int = 0,
                 own: Mapping[str, OwnTerm] = MappingProxyType({})):  # fmt: skip
        super().__init__()
        self.own = own
        self.student, self.loss, self.dtype, self.active, self.vocab_size = student, loss, dtype, active, vocab_size
        self.divergence = build_divergence(loss.kl_kind, loss.kl_parameter)
        check_temperature(loss.temperature)
        self.projectors = build_projectors(student, loss, active, widths or {}, seed)

    def forward(self, batch: Batch, targets: Targets | None, weights: Weights,
                frames: list[Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The micro-batch's part of the step's loss, and each term's part of it (detached, weights included)."""
        with torch.autocast(batch.labels_S.device.type, self.dtype, enabled=self.dtype != torch.float32):
            heard = self.student.hear(batch, frames)
            with record_blocks(self.student, self.own_layers) as outputs:
                hidden_SD = self.student.answer_states(batch, heard)
        total, terms = self._on_tokens(hidden_SD, batch, targets, weights)
        values = {
            "feature": (self._feature(heard, batch, targets), weights.feature_W),
            "hidden": (self._hidden(outputs | {HEAD_INPUT: hidden_SD}, batch, targets), weights.hidden_S),
        }
        for name, (value_X, weight_X) in values.items():
            if value_X is not None:
                part = (value_X * weight_X).sum()
                terms[name], total = part.detach(), total + part
        seen = Seen(self.student, batch, heard, hidden_SD, targets)
        for name, term in self.own.items():
            part = term.weight * (term(seen) * weights.own_S).sum()
            terms[name], total = part.detach(), total + part
        if targets is None:  # DDP waits for every trained tensor's gradient
            total = total + 0 * sum(p.sum() for p in self.projectors.parameters())
        return total, terms

    def _on_tokens(self, hidden_SD: Tensor, batch: Batch, targets: Targets | None, weights: Weights):
        """Cross-entropy, divergence and chunk likelihood."""
        head = self.student.llm.get_output_embeddings()
        options = {"divergence": self.divergence, "bias_V": getattr(head, "bias", None), "vocab_size": self.vocab_size,
                   **logit_transform(self.student.llm.config.get_text_config())}  # fmt: skip
        common = hidden_SD, head_weight(head), batch.labels_S
        if targets is not None and targets.cross is not None:
            loss = fused_cross_loss(*common, targets.cross, weights.ce_S, weights.kl_S, weights.chunk_C,
                                    self.loss.temperature, self.loss.chunk_temperature, **options)  # fmt: skip
            parts = (weights.ce_S * loss.ce_S, weights.kl_S * loss.kl_S, weights.chunk_C * loss.chunk_C)
            return loss.loss, {name: part.sum() for name, part in zip(("ce", "kl", "chunk"), parts)}
        if targets is None or "kl" not in self.active:
            empty = hidden_SD.new_zeros((len(hidden_SD), 0))
            sparse, kl_weight_S = Sparse(empty.long(), empty, empty.sum(-1)), torch.zeros_like(weights.kl_S)
        else:
            sparse, kl_weight_S = targets.distribution.at(self.loss.temperature), weights.kl_S
        loss = fused_ce_kl(*common, sparse, weights.ce_S, kl_weight_S, self.loss.temperature, **options)
        return loss.loss_S.sum(), {"ce": (weights.ce_S * loss.ce_S).sum(), "kl": (kl_weight_S * loss.kl_S).sum()}

    def _feature(self, heard: Heard, batch: Batch, targets: Targets | None) -> Tensor | None:
        """The distance of each shared window's queries, one value a window."""
        if targets is None or "feature" not in self.active:
            return None
        if targets.queries_BWQE is None:
            raise missing("feature", "Q-Former queries", "cache.features=int8")
        shared = shared_windows(batch, targets)
        own_WQE = torch.cat([heard.queries_BWQE[b, :w] for b, w in enumerate(shared)])
        theirs_WQE = torch.cat([targets.queries_BWQE[b, :w] for b, w in enumerate(shared)])
        row_W = window_rows(batch, targets)
        return feature_loss(self.loss.feature_kind, self._project("feature", own_WQE), theirs_WQE, row_W)

    def _hidden(self, outputs: dict[int, Tensor], batch: Batch, targets: Targets | None) -> Tensor | None:
        """The distance of each pair of layers, one value a supervised position, mean over the pairs."""
        if targets is None or "hidden" not in self.active:
            return None
        theirs = targets.hidden_by_layer | {HEAD_INPUT: targets.hidden}
        values = []
        for their_layer, own_layer in self.loss.layer_pairs.items():
            if theirs.get(their_layer) is None:
                raise missing("hidden", f"states of layer {their_layer}", f"cache.hidden_layers=[{their_layer}]")
            own_SD = outputs[own_layer]
            if own_layer != HEAD_INPUT:
                own_SD = own_SD.flatten(0, 1)[batch.predicting_S]
            own_SD = self._project(f"hidden{their_layer}", own_SD)
            values.append(feature_loss(self.loss.hidden_kind, own_SD, theirs[their_layer], batch.row_S))
        return torch.stack(values).mean(0)

    @property
    def own_layers(self) -> list[int]:
        """The student's blocks whose outputs are compared."""
        layers = self.loss.layer_pairs.values() if "hidden" in self.active else ()
        return sorted(set(layers) - {HEAD_INPUT})

    def _project(self, name: str, own: Tensor) -> Tensor:
        return self.projectors[name](own.float()) if name in self.projectors else own.float()


def check_codec(header: CacheHeader | None, loss: LossConfig) -> None:
    """Refuse a divergence that a cache's targets cannot tell.

    Raises:
        ValueError: the targets are draws, which hold for the forward KL at temperature 1 alone.
    """
    if header is not None and loss.kl:
        check_divergence(codec_of(header.identity), loss)


def build_projectors(
    student: Salmonn, loss: LossConfig, active: frozenset[str], widths: Mapping[str, int], seed: int
) -> nn.ModuleDict:
    """A learned map for every pair of features whose widths differ and whose distance needs equal ones."""
    pairs = {"feature": ("feature", loss.feature_kind, student.config.qformer_width)}
    for layer in loss.layer_pairs:
        pairs[f"hidden{layer}"] = ("hidden", loss.hidden_kind, student.project.out_features)
    projectors = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, (term, kind, width) in pairs.items():
            if term in active and not FEATURES[kind].is_relative and term in widths and widths[term] != width:
                projectors[name] = build_projector(width, widths[term]).to(student.device)
    return projectors


def build_projector(student_width: int, teacher_width: int) -> nn.Module:
    """What brings the student's features to the teacher's width: nothing when they agree, else a learned linear map.

    It starts as the first rows of an orthogonal matrix, so that lengths and angles survive where there is room.
    """
    if student_width == teacher_width:
        return nn.Identity()
    projector = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(projector.weight)
    return projector


def missing(term: str, what: str, remedy: str) -> ValueError:
    """The error of a term whose targets are not there."""
    return ValueError(
        f"loss.{term} is above 0, but the teacher's targets hold no {what}; cache again with {remedy}, or set "
        f"loss.{term}=0."
    )
