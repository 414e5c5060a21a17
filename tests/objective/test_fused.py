"""The fused objective against the plain functions, in float64, for every head, target and upstream gradient."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import distill.objective.head
from distill.objective.divergences import build_divergence, forward_kl_terms
from distill.objective.fused import FusedLoss, fused_ce_kl
from distill.objective.head import Head, head_weight
from distill.objective.losses import ce, dense_divergence, sampled_divergence, sparse_divergence
from shards.targets.distributions import Sparse

S, D, V, K = 7, 16, 2500, 5  # three tiles of 1,024 rows, the last one short
EXACT = {"rtol": 1e-11, "atol": 1e-13}


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    monkeypatch.setitem(distill.objective.head.TILE_ELEMENTS, "cpu", 1024 * S)


class Case:
    """Inputs of one call; position 2 has no teacher and position 3 no label, and both hold what would break a loss."""

    def __init__(
        self, k: int = K, temperature: float = 1.0, num_positions: int = S, dtype=torch.float64, seed: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.temperature = temperature
        self.hidden_SD, self.weight_VD, self.bias_V = normal(num_positions, D), 0.3 * normal(V, D), 0.1 * normal(V)
        teacher_SV = (3 * normal(num_positions, V).double() / temperature).log_softmax(-1)
        self.logprobs_SK, self.ids_SK = teacher_SV.topk(k, -1)
        self.log_residual_S = teacher_SV.scatter(1, self.ids_SK, -torch.inf).logsumexp(-1)
        self.labels_S = torch.randint(0, V, (num_positions,), generator=generator)
        self.ce_weight_S, self.kl_weight_S = torch.rand(2, num_positions, generator=generator, dtype=torch.float64)
        self.upstream_S = normal(num_positions).double()
        if num_positions > 4:
            self._break_what_has_no_weight()

    def _break_what_has_no_weight(self):
        self.kl_weight_S[2], self.ce_weight_S[3], self.labels_S[3] = 0, 0, -100
        self.ids_SK[2], self.logprobs_SK[2], self.log_residual_S[2] = -7, torch.nan, torch.nan
        self.ids_SK[4, -1], self.logprobs_SK[4, -1] = 0, -torch.inf  # an unused slot

    @property
    def sparse(self) -> Sparse:
        return Sparse(self.ids_SK, self.logprobs_SK, self.log_residual_S)

    def fused(self, divergence=forward_kl_terms, **head) -> FusedLoss:
        head, weights = Head(self.weight_VD, **head), (self.ce_weight_S, self.kl_weight_S)
        return fused_ce_kl(
            self.hidden_SD, head, self.labels_S, self.sparse, *weights, self.temperature, divergence=divergence
        )

    def plain(self, divergence=None, softcap=None, logit_scale=1.0, bias_V=None, vocab_size=None) -> FusedLoss:
        logits_SV = self.hidden_SD.double() @ self.weight_VD.double().T
        logits_SV = logit_scale * (logits_SV + (0 if bias_V is None else bias_V.double()))
        logits_SV = (logits_SV if softcap is None else softcap * (logits_SV / softcap).tanh())[:, :vocab_size]
        ce_S = ce(logits_SV, self.labels_S.clamp(min=0)).where(self.ce_weight_S != 0, 0)
        has_teacher = self.kl_weight_S != 0
        targets = self.logprobs_SK.where(has_teacher[:, None], -torch.inf), self.log_residual_S.where(has_teacher, 0)
        arguments = logits_SV, Sparse(self.ids_SK.clamp(min=0), *targets), self.temperature
        kl_S = sparse_divergence(*arguments, *([divergence] if divergence else [])).where(has_teacher, 0)
        loss_S = self.ce_weight_S * ce_S + self.kl_weight_S * kl_S
        return FusedLoss(loss_S, ce_S, kl_S, self.agrees(logits_SV).where(has_teacher, 0))

    def agrees(self, logits_SV) -> torch.Tensor:
        top_S1 = self.logprobs_SK.nan_to_num(-torch.inf).argmax(1, keepdim=True)
        return (logits_SV.argmax(1) == self.ids_SK.gather(1, top_S1)[:, 0]).double()


def gradients(loss_S, upstream_S, inputs):
    return torch.autograd.grad((loss_S * upstream_S).sum(), inputs)


def fused_and_plain(case: Case, **options) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The three values of each way, and the gradients of all that has one."""
    inputs = [x.requires_grad_() for x in (case.hidden_SD, case.weight_VD, options.get("bias_V")) if x is not None]
    values = case.fused(**options), case.plain(**options)
    return tuple([*v, *gradients(v.loss_S, case.upstream_S, inputs)] for v in values)


@pytest.mark.parametrize("softcap, logit_scale, has_bias", itertools.product([None, 5.0], [1.0, 0.5], [False, True]))
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_values_and_all_gradients_equal_the_plain_functions(temperature, softcap, logit_scale, has_bias):
    case = Case(temperature=temperature)
    bias_V = case.bias_V if has_bias else None
    torch.testing.assert_close(*fused_and_plain(case, softcap=softcap, logit_scale=logit_scale, bias_V=bias_V), **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "kind, parameter",
    [("reverse_kl", None), ("jsd", 0.3), ("skewed_kl", 0.1), ("skewed_reverse_kl", 0.1), ("total_variation", None)],
)
def test_every_divergence_equals_its_plain_function(kind, parameter, temperature):
    torch.testing.assert_close(
        *fused_and_plain(Case(temperature=temperature), divergence=build_divergence(kind, parameter)), **EXACT
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 200, V])
def test_one_kept_id_and_all_of_them_are_no_special_cases(k, temperature):
    torch.testing.assert_close(*fused_and_plain(Case(k=k, temperature=temperature)), **EXACT)


def test_all_ids_kept_are_a_dense_target():
    case = Case(k=V, temperature=2.0, num_positions=3)
    dense_SV = torch.empty(3, V, dtype=torch.float64).scatter_(1, case.ids_SK, case.logprobs_SK)
    expected_S = dense_divergence(case.hidden_SD @ case.weight_VD.T, 2 * dense_SV, 2.0)
    torch.testing.assert_close(case.fused().kl_S, expected_S)


def test_draws_as_kept_ids_without_a_bucket_have_the_gradient_of_the_sampled_divergence():
    case, generator = Case(k=1, temperature=1.0), torch.Generator().manual_seed(1)
    case.ce_weight_S, case.kl_weight_S = 0 * case.ce_weight_S, torch.ones_like(case.kl_weight_S)
    teacher_SV = torch.randn(S, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    case.ids_SK = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(S)])
    weights_SK = torch.rand(S, K, generator=generator, dtype=torch.float64)  # importance weights need not sum to 1
    case.logprobs_SK, case.log_residual_S = weights_SK.log(), torch.full((S,), -torch.inf)
    case.hidden_SD.requires_grad_()
    logits_SV = case.hidden_SD @ case.weight_VD.T
    drawn_S = sampled_divergence(logits_SV, case.ids_SK, weights_SK, teacher_SV.gather(1, case.ids_SK), 1.0)
    pair = [gradients(loss_S, case.upstream_S, [case.hidden_SD])[0] for loss_S in (case.fused().loss_S, drawn_S)]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("num_positions", [0, 1])
def test_no_position_and_one_position(num_positions):
    torch.testing.assert_close(*fused_and_plain(Case(num_positions=num_positions)), **EXACT)


def test_cross_entropy_alone_needs_no_kept_ids():
    case = Case(k=1)
    case.ids_SK, case.logprobs_SK, case.kl_weight_S = case.ids_SK[:, :0], case.logprobs_SK[:, :0], 0 * case.kl_weight_S
    fused = case.fused()
    torch.testing.assert_close(fused.loss_S, case.ce_weight_S * fused.ce_S)
    torch.testing.assert_close(
        fused.ce_S, ce(case.hidden_SD @ case.weight_VD.T, case.labels_S.clamp(min=0)) * (case.ce_weight_S != 0)
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_finite_differences_agree(temperature):
    generator = torch.Generator().manual_seed(0)
    hidden_SD, weight_VD, bias_V = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 4), (9, 4), (9,))
    )
    teacher_SV = torch.randn(3, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    logprobs_SK, ids_SK = teacher_SV.topk(2, -1)
    rest_S = teacher_SV.scatter(1, ids_SK, -torch.inf).logsumexp(-1)
    weights = torch.tensor([[0.5, 1.0, 0.0], [1.0, 0.0, 2.0]], dtype=torch.float64)

    def loss(hidden_SD, weight_VD, bias_V):
        head, labels_S = Head(weight_VD, bias_V, logit_scale=0.7, softcap=3.0), torch.tensor([8, 0, 1])
        sparse = Sparse(ids_SK, logprobs_SK, rest_S)
        return fused_ce_kl(hidden_SD, head, labels_S, sparse, *weights, temperature).loss_S

    assert gradcheck(loss, [x.requires_grad_() for x in (hidden_SD, weight_VD, bias_V)])


def test_the_kl_and_its_gradient_are_zero_when_the_student_is_the_teacher():
    case = Case(temperature=2.0)
    logprobs_SV = (case.hidden_SD @ case.weight_VD.T / 2).log_softmax(-1)
    case.logprobs_SK, case.ids_SK = logprobs_SV.topk(K, -1)
    case.log_residual_S = logprobs_SV.scatter(1, case.ids_SK, -torch.inf).logsumexp(-1)
    case.ce_weight_S, case.hidden_SD = 0 * case.ce_weight_S, case.hidden_SD.requires_grad_()
    fused = case.fused()
    (gradient,) = gradients(fused.loss_S, case.upstream_S, [case.hidden_SD])
    assert fused.kl_S.abs().max() < 1e-13 and gradient.abs().max() < 1e-13


def test_rows_beyond_the_real_tokens_take_no_part():
    case = Case(temperature=2.0)
    case.labels_S.clamp_(max=2199)
    case.ids_SK[:] = torch.arange(K)
    torch.testing.assert_close(*fused_and_plain(case, vocab_size=2200), **EXACT)
    (gradient,) = gradients(case.fused(vocab_size=2200).loss_S, case.upstream_S, [case.weight_VD])
    assert not gradient[2200:].any() and gradient[:2200].any()
    with pytest.raises(ValueError, match="vocab_size is 2501, but the head has 2500 rows"):
        case.fused(vocab_size=2501)


def test_what_a_teacher_gave_to_a_padded_id_counts_as_outside_the_kept_ones():
    case = Case()
    case.labels_S.clamp_(max=2199)
    case.ids_SK[:] = torch.tensor([0, 1, 2, 2300, 2400])
    found = case.fused(vocab_size=2200).kl_S
    moved = torch.cat([case.log_residual_S[:, None], case.logprobs_SK[:, 3:]], 1).logsumexp(1)
    case.ids_SK, case.logprobs_SK, case.log_residual_S = case.ids_SK[:, :3], case.logprobs_SK[:, :3], moved
    torch.testing.assert_close(found, case.plain(vocab_size=2200).kl_S)
    assert found.isfinite().all()


def test_a_frozen_head_gets_no_gradient_and_its_states_the_same_one():
    case = Case()
    case.hidden_SD.requires_grad_()
    (frozen,) = gradients(case.fused().loss_S, case.upstream_S, [case.hidden_SD])
    case.weight_VD.requires_grad_()
    trained, _ = gradients(case.fused().loss_S, case.upstream_S, [case.hidden_SD, case.weight_VD])
    torch.testing.assert_close(frozen, trained, rtol=0, atol=0)


def test_the_gradient_of_a_batch_does_not_depend_on_how_it_is_split():
    case = Case()
    case.hidden_SD.requires_grad_()
    whole = gradients(case.fused().loss_S, 1.0, [case.hidden_SD])[0]
    rows = case.labels_S, case.sparse, case.ce_weight_S, case.kl_weight_S
    for borders in ([0, 3, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 6, 7]):
        parts = []
        for start, stop in itertools.pairwise(borders):
            hidden_SD = case.hidden_SD.detach()[start:stop].requires_grad_()
            part = [Sparse(*(y[start:stop] for y in x)) if isinstance(x, Sparse) else x[start:stop] for x in rows]
            loss_S = fused_ce_kl(hidden_SD, Head(case.weight_VD), *part, case.temperature).loss_S
            parts.append(gradients(loss_S, 1.0, [hidden_SD])[0])
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)


def test_bfloat16_inputs_are_accumulated_in_float32():
    case = Case(dtype=torch.bfloat16, temperature=2.0)
    case.hidden_SD.requires_grad_()
    fused, plain = case.fused(), case.plain()
    assert fused.loss_S.dtype == torch.float32
    for fused_S, plain_S in zip(fused, plain):
        torch.testing.assert_close(fused_S.double(), plain_S, rtol=2e-5, atol=1e-5)
    (gradient,) = gradients(fused.loss_S, case.upstream_S.float(), [case.hidden_SD])
    assert gradient.dtype == torch.bfloat16
    (exact,) = gradients(plain.loss_S, case.upstream_S, [case.hidden_SD])
    torch.testing.assert_close(gradient.double(), exact.double(), rtol=2**-7, atol=1e-6)


def test_autocast_does_not_round_the_objective():
    case = Case(dtype=torch.float32)
    outside = case.fused()
    with torch.autocast("cpu", torch.bfloat16):
        inside = case.fused()
    torch.testing.assert_close(inside.loss_S, outside.loss_S, rtol=0, atol=0)


def test_values_for_the_log_carry_no_gradient_and_evaluation_forms_none():
    case = Case()
    case.hidden_SD.requires_grad_()
    fused = case.fused()
    assert fused.loss_S.requires_grad and not fused.ce_S.requires_grad and not fused.kl_S.requires_grad
    with torch.no_grad():
        evaluated = case.fused()
    assert not evaluated.loss_S.requires_grad
    torch.testing.assert_close(evaluated.loss_S, fused.loss_S, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    case = Case()
    case.hidden_SD.requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph is True"):
        torch.autograd.grad(case.fused().loss_S.sum(), case.hidden_SD, create_graph=True)


def test_a_label_outside_the_tokens_is_seen_in_the_loss():
    case = Case()
    case.labels_S[0] = V
    assert case.fused().loss_S[0] == torch.inf


def test_a_temperature_of_zero_is_refused():
    case = Case()
    case.temperature = 0.0
    with pytest.raises(ValueError, match=r"temperature is 0\.0, but it must be positive"):
        case.fused()


@pytest.mark.parametrize("compress_statistics", [False, True])
def test_a_4_bit_head_is_the_head_it_dequantizes_to(compress_statistics):
    bnb = pytest.importorskip("bitsandbytes")
    case = Case(dtype=torch.float32, temperature=2.0)
    generator = torch.Generator().manual_seed(1)
    case.hidden_SD = torch.randn(S, 64, generator=generator)
    linear = bnb.nn.Linear4bit(64, V, bias=False, compute_dtype=torch.float32, quant_type="nf4",
                               compress_statistics=compress_statistics)  # fmt: skip
    linear.weight = bnb.nn.Params4bit(0.2 * torch.randn(V, 64, generator=generator), requires_grad=False,
                                      quant_type="nf4", compress_statistics=compress_statistics)  # fmt: skip
    linear = linear.to("cpu")
    whole_VD = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert whole_VD.shape == (V, 64)
    results = []
    for weight in (head_weight(linear), whole_VD):
        case.weight_VD, case.hidden_SD = weight, case.hidden_SD.detach().requires_grad_()
        fused = case.fused()
        results.append((*fused, *gradients(fused.loss_S, case.upstream_S.float(), [case.hidden_SD])))
    for packed, dequantized in zip(*results):
        torch.testing.assert_close(packed, dequantized, rtol=0, atol=0)


def test_a_4_bit_head_whose_rows_cannot_be_read_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    case = Case(dtype=torch.float32)
    narrow = bnb.nn.Params4bit(torch.randn(64, D), requires_grad=False, quant_type="nf4").to("cpu")
    case.weight_VD = narrow
    with pytest.raises(ValueError, match="width of the 4-bit head is 16, but"):
        case.fused()
    case.weight_VD = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    case.weight_VD.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="AVX512-BF16"):
        case.fused()


def test_the_weight_of_a_plain_or_wholly_trained_head_is_found():
    from peft import LoraConfig, get_peft_model

    head = nn.Linear(4, 9, bias=False)
    assert head_weight(head) is head.weight
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "lm_head": head})
    peft = get_peft_model(model, LoraConfig(target_modules=["body"], modules_to_save=["lm_head"]))
    weight = head_weight(peft.base_model.model["lm_head"])
    assert weight.requires_grad and weight.shape == (9, 4)


def test_a_head_without_one_weight_is_refused_by_name():
    from peft import LoraConfig, get_peft_model

    model = nn.ModuleDict({"lm_head": nn.Linear(4, 9)})
    lora = get_peft_model(model, LoraConfig(target_modules=["lm_head"])).base_model.model["lm_head"]
    with pytest.raises(ValueError, match=r"lm_head is Linear, .* an adapter .* out of the LoRA targets"):
        head_weight(lora)
    with pytest.raises(ValueError, match="classifier is Sequential"):
        head_weight(nn.Sequential(nn.Linear(4, 9)), "classifier")
