"""Cross-entropy and a sparse divergence from hidden states, in one pass over the vocabulary, without keeping logits.

The head is read in tiles of rows. Each tile's logits live until the next; what is kept of them is an online
log-sum-exp, the logits of the label and of the teacher's kept ids, and the mean of the weight rows under the student,
from which the gradient of the hidden states follows when the pass is over: two matrix products, as many as the plain
forward and backward need. A head that trains costs two more, in the backward, where its gradient is formed tile by
tile; a frozen one has no gradient buffer. The values are those of `losses.py`, which the tests hold them to.

Shapes: S supervised positions, D width, V vocabulary, K kept teacher tokens, C columns of one tile of logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distill.objective.divergences import Divergence, forward_kl_terms
from distill.objective.head import Head, TiledHead, columns_in_tile
from distill.objective.losses import bucket_divergence, check_temperature, move_into_bucket
from distill.objective.numerics import widen
from shards.targets.distributions import Sparse


class FusedLoss(NamedTuple):
    """Values a position, nats. `loss_S` carries the gradient, the others are for the log and carry none."""

    loss_S: Tensor
    ce_S: Tensor
    kl_S: Tensor
    agrees_S: Tensor  # 1 where the teacher's most probable kept id is the student's, 0 elsewhere and without a weight


class _Request(NamedTuple):
    """Everything of a call that is not differentiated."""

    head: TiledHead
    labels_S: Tensor
    teacher: Sparse
    ce_weight_S: Tensor
    kl_weight_S: Tensor
    temperature: float
    divergence: Divergence
    needs_gradient: bool

    @property
    def is_kept_SK(self) -> Tensor:
        return (self.teacher.logprobs_SK > -torch.inf) & (self.kl_weight_S != 0)[:, None]


class _Mean:
    """Online log-sum-exp of logits over a temperature, and the mean of the weight rows under its softmax."""

    def __init__(self, hidden_SD: Tensor, temperature: float, needs_mean: bool):
        self.temperature = temperature
        self.max_S = hidden_SD.new_full(hidden_SD.shape[:1], -torch.inf)
        self.sum_S = torch.zeros_like(self.max_S)
        self.mean_SD = torch.zeros_like(hidden_SD) if needs_mean else None

    def add(self, head: TiledHead, logits_SC: Tensor, slope_SC: Tensor | None, tile_CD: Tensor) -> None:
        """Take in one tile; `logits_SC` is used up."""
        if self.temperature != 1:
            logits_SC /= self.temperature
        max_S = torch.maximum(self.max_S, logits_SC.amax(1))
        shift_S = max_S.masked_fill(max_S == -torch.inf, 0)
        fade_S = (self.max_S - shift_S).exp_()
        weights_SC = logits_SC.sub_(shift_S[:, None]).exp_()
        self.max_S = max_S
        self.sum_S.mul_(fade_S).add_(weights_SC.sum(1))
        if self.mean_SD is not None:
            if slope_SC is not None:
                weights_SC *= slope_SC
            head.add_product_(self.mean_SD.mul_(fade_S[:, None]), weights_SC, tile_CD)

    def finish(self, constant_slope: float) -> tuple[Tensor, Tensor | None]:
        """Log-sum-exp (-inf where every logit was masked) and the mean times the slope."""
        if self.mean_SD is not None:
            self.mean_SD *= (constant_slope / self.sum_S.clamp(min=torch.finfo(self.sum_S.dtype).tiny))[:, None]
        return self.max_S + self.sum_S.log(), self.mean_SD


class _Columns:
    """Where the label and the kept ids of each position lie in a tile."""

    def __init__(self, request: _Request, start: int, stop: int):
        self.label_S1, self.is_label_S1 = columns_in_tile(request.labels_S[:, None], start, stop)
        self.kept_SK, is_inside_SK = columns_in_tile(request.teacher.ids_SK, start, stop)
        self.is_kept_SK = is_inside_SK & request.is_kept_SK

    def pick(self, tile_SC: Tensor, label_S: Tensor, kept_SK: Tensor) -> None:
        """Copy the label's and the kept ids' logits out of the tile, then take the kept ids out of it."""
        label_S.copy_(tile_SC.gather(1, self.label_S1).where(self.is_label_S1, label_S[:, None])[:, 0])
        kept_SK.copy_(tile_SC.gather(1, self.kept_SK).where(self.is_kept_SK, kept_SK))
        # Adding 0 or -inf, unlike assigning, gives one result when ids of other tiles are clamped to the same column.
        tile_SC.scatter_add_(1, self.kept_SK, torch.zeros_like(kept_SK).masked_fill_(self.is_kept_SK, -torch.inf))

    def put(self, tile_SC: Tensor, label_S: Tensor, kept_SK: Tensor) -> None:
        """Add the label's and the kept ids' coefficients to the tile."""
        tile_SC.scatter_add_(1, self.label_S1, label_S[:, None] * self.is_label_S1)
        tile_SC.scatter_add_(1, self.kept_SK, kept_SK * self.is_kept_SK)


class _Coefficients(NamedTuple):
    """The gradient of `loss_S` in the bare products.

    `others_S` is what the softmax over the ids that are not kept is multiplied with, at each temperature.
    """

    label_S: Tensor
    kept_SK: Tensor
    others_S: dict[float, Tensor]
    log_sums_S: dict[float, Tensor]


def _divergence(request: _Request, student_SC: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of positions with a weight (0 elsewhere) and its gradient in the student's log-probabilities."""
    has_target_S = request.kl_weight_S != 0
    # A position without a target may hold anything: it is replaced, so that no NaN of it meets a zero.
    student_SC = student_SC.where(has_target_S[:, None], 0).requires_grad_()
    ids_SK, logprobs_SK, residual_S = request.teacher
    teacher = Sparse(ids_SK, logprobs_SK.where(has_target_S[:, None], 0), residual_S.where(has_target_S, 0))
    with torch.enable_grad():
        kl_S = bucket_divergence(student_SC, teacher, request.temperature, request.divergence)
        kl_S = kl_S.where(has_target_S, 0)
        slope_SC = torch.autograd.grad(kl_S.sum(), student_SC)[0]
    return kl_S.detach(), slope_SC


def _agree(request: _Request, kept_SK: Tensor, max_S: Tensor) -> Tensor:
    """Whether both find the same id the most probable, from the kept ids' logits and the largest of all others."""
    if not kept_SK.shape[1]:
        return torch.zeros_like(max_S)
    top_S1 = request.teacher.logprobs_SK.where(request.is_kept_SK, -torch.inf).argmax(1, keepdim=True)
    is_top_S = kept_SK.gather(1, top_S1)[:, 0] >= torch.maximum(kept_SK.amax(1), max_S)
    return (is_top_S & (request.kl_weight_S != 0)).to(max_S.dtype)


def _combine(request: _Request, label_S, kept_SK, log_sums_S, max_S) -> tuple[FusedLoss, _Coefficients]:
    """Values and gradient coefficients from log-sum-exps, picked logits and the largest of the others, max_S."""
    head, temperature = request.head, request.temperature
    log_total_S = torch.logaddexp(log_sums_S[1.0], kept_SK.logsumexp(1))
    ce_S = (log_total_S - label_S).where(request.ce_weight_S != 0, 0)
    soft_SC = torch.cat([kept_SK / temperature, log_sums_S[temperature][:, None]], 1)
    student_SC = soft_SC - soft_SC.logsumexp(1, keepdim=True)
    kl_S, slope_SC = _divergence(request, student_SC)
    loss_S = request.ce_weight_S * ce_S + request.kl_weight_S * kl_S

    slope_SC = slope_SC * (request.kl_weight_S / temperature)[:, None]
    soft_SC = slope_SC - student_SC.exp() * slope_SC.sum(1, keepdim=True)
    kept_ce_SK = (kept_SK - log_total_S[:, None]).exp() * request.ce_weight_S[:, None]
    others_ce_S = (log_sums_S[1.0] - log_total_S).exp() * request.ce_weight_S
    others_S = {1.0: others_ce_S}
    others_S[temperature] = soft_SC[:, -1] + (others_ce_S if temperature == 1 else 0)
    is_kept_SK = request.is_kept_SK
    kept_slope_SK = head.slope(kept_SK.where(is_kept_SK, 0))
    label_slope_S = head.slope(label_S.where(request.ce_weight_S != 0, 0))
    coefficients = _Coefficients(
        -request.ce_weight_S * label_slope_S,
        ((soft_SC[:, :-1] + kept_ce_SK) * kept_slope_SK).where(is_kept_SK, 0),
        others_S,
        log_sums_S,
    )
    return FusedLoss(loss_S, ce_S, kl_S, _agree(request, kept_SK, max_S)), coefficients


def _pass(request: _Request, hidden_SD: Tensor) -> tuple[FusedLoss, _Coefficients, Tensor | None]:
    """One pass over the tiles: the values, the coefficients, and the gradient of the hidden states."""
    head = request.head
    temperatures = dict.fromkeys((1.0, float(request.temperature)))
    means = [_Mean(hidden_SD, temperature, request.needs_gradient) for temperature in temperatures]
    label_S = hidden_SD.new_full(request.labels_S.shape, -torch.inf)
    kept_SK = hidden_SD.new_full(request.teacher.ids_SK.shape, -torch.inf)
    for start, stop in head.tiles(len(hidden_SD), hidden_SD.device.type):
        tile_CD = head.tile(start, stop)
        logits_SC, slope_SC = head.logits(hidden_SD, tile_CD, start)
        _Columns(request, start, stop).pick(logits_SC, label_S, kept_SK)
        for mean in means[:-1]:
            mean.add(head, logits_SC.clone(), slope_SC, tile_CD)
        means[-1].add(head, logits_SC, slope_SC, tile_CD)
    constant_slope = head.scale if head.softcap is None else 1.0
    finished = {mean.temperature: mean.finish(constant_slope) for mean in means}
    log_sums_S = {temperature: log_sum_S for temperature, (log_sum_S, _) in finished.items()}
    values, coefficients = _combine(request, label_S, kept_SK, log_sums_S, means[0].max_S)
    if not request.needs_gradient:
        return values, coefficients, None
    gradient_SD = torch.zeros_like(hidden_SD)
    for temperature, (_, mean_SD) in finished.items():
        gradient_SD.addcmul_(mean_SD, coefficients.others_S[temperature][:, None])
    ids_SK = torch.cat([request.teacher.ids_SK, request.labels_S[:, None]], 1).clamp(0, head.num_tokens - 1)
    head.add_rows_(gradient_SD, ids_SK, torch.cat([coefficients.kept_SK, coefficients.label_S[:, None]], 1))
    return values, coefficients, gradient_SD


def _head_gradient(request, coefficients: _Coefficients, hidden_SD, grad_S, weight_VD, bias_V):
    """Gradient of the weight and the bias, from logits computed again, one tile after the other."""
    head = request.head
    grad_VD, grad_V = torch.zeros_like(weight_VD), None if bias_V is None else torch.zeros_like(bias_V)
    for start, stop in head.tiles(len(hidden_SD), hidden_SD.device.type):
        logits_SC, slope_SC = head.logits(hidden_SD, head.tile(start, stop), start)
        columns = _Columns(request, start, stop)
        columns.pick(logits_SC, torch.zeros_like(grad_S), torch.zeros_like(coefficients.kept_SK))
        tile_SC = torch.zeros_like(logits_SC)
        for temperature, log_sum_S in coefficients.log_sums_S.items():
            shift_S1 = log_sum_S.masked_fill(log_sum_S == -torch.inf, 0)[:, None]
            softmax_SC = (logits_SC / temperature).sub_(shift_S1).exp_()
            tile_SC.addcmul_(softmax_SC, coefficients.others_S[temperature][:, None])
        tile_SC *= head.scale if slope_SC is None else slope_SC
        columns.put(tile_SC, coefficients.label_S, coefficients.kept_SK)
        tile_SC *= grad_S[:, None]
        grad_VD[start:stop] = head.matmul(tile_SC.T, hidden_SD)
        if grad_V is not None:
            grad_V[start:stop] = tile_SC.sum(0)
    return grad_VD, grad_V


class _Fused(torch.autograd.Function):
    """Autograd's view: hidden states, weight and bias in, four values a position out."""

    @staticmethod
    def forward(ctx, request: _Request, hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None):
        with torch.autocast(hidden_SD.device.type, enabled=False):
            values, coefficients, gradient_SD = _pass(request, widen(hidden_SD))
        trains_head = request.needs_gradient and (ctx.needs_input_grad[2] or ctx.needs_input_grad[3])
        ctx.save_for_backward(gradient_SD, *((hidden_SD, weight_VD, bias_V) if trains_head else ()))
        ctx.again = (request, coefficients) if trains_head else None
        ctx.dtype = hidden_SD.dtype
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx, grad_S: Tensor, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph is True, but the gradient of the fused objective was formed in its forward and cannot be "
                "differentiated again; use the plain functions of losses.py."
            )
        gradient_SD, *saved = ctx.saved_tensors
        hidden_grad = (gradient_SD * grad_S[:, None]).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        if ctx.again is None:
            return None, hidden_grad, None, None
        hidden_SD, weight_VD, bias_V = saved
        with torch.autocast(hidden_SD.device.type, enabled=False):
            weight_grad, bias_grad = _head_gradient(*ctx.again, widen(hidden_SD), grad_S, weight_VD, bias_V)
        return None, hidden_grad, weight_grad, bias_grad


def fused_ce_kl(
    hidden_SD: Tensor,
    head: Head,
    labels_S: Tensor,
    teacher: Sparse,
    ce_weight_S: Tensor,
    kl_weight_S: Tensor,
    temperature: float,
    *,
    divergence: Divergence = forward_kl_terms,
) -> FusedLoss:
    """`ce_weight * ce + kl_weight * kl` of each supervised position, without its logits.

    Args:
        hidden_SD: the states that enter the head, bfloat16 or wider; accumulated in float32 (float64 stays).
        head: the head, `Head.of(llm)`; what the teacher gave to ids beyond its `vocab_size` counts as outside the kept
            ones.
        labels_S: next-token ids; anything where `ce_weight_S` is 0. An id outside the tokens makes it infinite.
        teacher: at `temperature`; anything where `kl_weight_S` is 0. K may be 0.
        ce_weight_S: what a position's cross-entropy counts: 0 for none, and `ce_S` is 0 there.
        kl_weight_S: what its divergence counts: 0 where the teacher said nothing, and `kl_S` is 0 there.
        temperature: the temperature of the divergence, whose value and gradient it multiplies by its square.
        divergence: terms of the divergence, from `divergences.build_divergence`.

    Returns:
        `FusedLoss`; the kl of `loss_S` and of `kl_S` holds temperature². A second derivative is refused.

    Raises:
        ValueError: the temperature is not positive, or `vocab_size` is larger than the head.
    """
    check_temperature(temperature)
    tiled = TiledHead(head, hidden_SD)
    if head.vocab_size is not None:
        teacher = move_into_bucket(teacher, teacher.ids_SK < head.vocab_size)
    dtype = tiled.dtype
    request = _Request(
        head=tiled,
        labels_S=labels_S,
        teacher=Sparse(teacher.ids_SK, *(x.detach().to(dtype) for x in teacher[1:])),
        ce_weight_S=ce_weight_S.detach().to(dtype),
        kl_weight_S=kl_weight_S.detach().to(dtype),
        temperature=float(temperature),
        divergence=divergence,
        needs_gradient=torch.is_grad_enabled() and (hidden_SD.requires_grad or bool(head.trained)),
    )
    return FusedLoss(*_Fused.apply(request, hidden_SD, head.weight_VD, head.bias_V))
