"""The divergences against closed forms and torch's own functions, in float64, at their edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from distill.objective.divergences import DIVERGENCES, build_divergence
from distill.objective.features import FEATURES, cosine, feature_loss, mse, relation, smooth_l1
from distill.objective.losses import ce, dense_divergence, forward_kl, sampled_divergence, sparse_divergence
from distill.objective.module import build_projector
from distill.objective.vocabulary import shared_vocab_size
from shards.targets.distributions import Distribution, Sparse

KINDS = [
    ("forward_kl", None),
    ("reverse_kl", None),
    ("jsd", 0.3),
    ("skewed_kl", 0.1),
    ("skewed_reverse_kl", 0.1),
    ("total_variation", None),
]
TEMPERATURES = [1.0, 2.0, 4.0]


def logits(*shape: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)


def top_targets(teacher_SV: torch.Tensor, k: int, temperature: float) -> Sparse:
    logprobs_SK, ids_SK = (teacher_SV / temperature).log_softmax(-1).topk(k, -1)
    outside_SV = (teacher_SV / temperature).log_softmax(-1).scatter(1, ids_SK, -torch.inf)
    return Sparse(ids_SK, logprobs_SK, outside_SV.logsumexp(-1))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(q.log(), p.log(), log_target=True, reduction="none").sum(-1)


def closed_form(kind: str, parameter, student_SV, teacher_SV, temperature: float) -> torch.Tensor:
    """Each divergence as its paper writes it, in probabilities and torch's own KL."""
    q, p = (student_SV / temperature).softmax(-1), (teacher_SV / temperature).softmax(-1)
    if kind == "forward_kl":
        value = kl(p, q)
    elif kind == "reverse_kl":
        value = kl(q, p)
    elif kind == "jsd":
        mixture = parameter * p + (1 - parameter) * q
        value = parameter * kl(p, mixture) + (1 - parameter) * kl(q, mixture)
    elif kind == "skewed_kl":
        value = kl(p, parameter * p + (1 - parameter) * q)
    elif kind == "skewed_reverse_kl":
        value = kl(q, parameter * q + (1 - parameter) * p)
    else:
        value = (p - q).abs().sum(-1) / 2
    return temperature**2 * value


def merge_outside(logits_SV: torch.Tensor, ids_SK: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits of K + 1 outcomes whose softmax is the kept ids' probabilities and one for all others."""
    p = (logits_SV / temperature).softmax(-1)
    kept = p.gather(1, ids_SK)
    return temperature * torch.cat([kept, p.scatter(1, ids_SK, 0).sum(-1, keepdim=True)], 1).log()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind, parameter", KINDS)
def test_a_divergence_equals_its_closed_form_on_every_target_kind(kind, parameter, temperature):
    student_SV, hidden_SD, weight_VD = logits(5, 11), logits(5, 3, seed=1), logits(11, 3, seed=2, spread=0.5)
    teacher_SV = hidden_SD @ weight_VD.T
    divergence = build_divergence(kind, parameter)
    whole_S = closed_form(kind, parameter, student_SV, teacher_SV, temperature)
    torch.testing.assert_close(dense_divergence(student_SV, teacher_SV, temperature, divergence), whole_S)

    top = top_targets(teacher_SV, 4, temperature)
    merged = [merge_outside(x, top.ids_SK, temperature) for x in (student_SV, teacher_SV)]
    top_S = sparse_divergence(student_SV, top, temperature, divergence)
    torch.testing.assert_close(top_S, closed_form(kind, parameter, *merged, temperature))

    every_SV = torch.arange(11).expand(5, 11)
    logprobs_SV = (teacher_SV / temperature).log_softmax(-1)
    drawn_S = sampled_divergence(student_SV, every_SV, logprobs_SV.exp(), logprobs_SV, temperature, divergence)
    torch.testing.assert_close(drawn_S, whole_S, msg="all ids drawn as often as they are probable")


@pytest.mark.parametrize("kind, parameter", KINDS)
def test_a_divergence_is_its_plain_twin_in_value_and_gradient(kind, parameter):
    assert {name for name, _ in KINDS} == set(DIVERGENCES)
    student_SV, teacher_SV = logits(5, 11).requires_grad_(), logits(5, 11, seed=1)
    plain = build_divergence(kind, parameter, plain=True)
    values = [
        dense_divergence(student_SV, teacher_SV, 1.0, build_divergence(kind, parameter)),
        plain(student_SV.softmax(-1), teacher_SV.softmax(-1)),
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value_S.sum(), student_SV)[0] for value_S in values))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind, parameter", KINDS)
def test_gradients_pass_finite_differences_on_every_target_kind(kind, parameter, temperature):
    student_SV, hidden_SD, weight_VD = logits(2, 6).requires_grad_(), logits(2, 3, seed=3), logits(6, 3, seed=4)
    teacher_SV, divergence = hidden_SD @ weight_VD.T, build_divergence(kind, parameter)
    top = top_targets(teacher_SV, 2, temperature)
    weights_SK = torch.tensor([[0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    losses = [
        lambda x: dense_divergence(x, teacher_SV, temperature, divergence),
        lambda x: sparse_divergence(x, top, temperature, divergence),
        lambda x: sampled_divergence(x, top.ids_SK, weights_SK, top.logprobs_SK, temperature, divergence),
    ]
    for loss in losses:
        assert gradcheck(loss, student_SV)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_k_of_one_and_k_of_the_whole_vocabulary_are_no_special_cases(temperature):
    student_SV, teacher_SV = logits(4, 9).requires_grad_(), logits(4, 9, seed=1)
    top = top_targets(teacher_SV, 1, temperature)
    kept_S, rest_S = top.logprobs_SK[:, 0].exp(), top.log_residual_S.exp()
    student_S = (student_SV / temperature).softmax(-1).gather(1, top.ids_SK)[:, 0]
    expected_S = kept_S * (kept_S / student_S).log() + rest_S * (rest_S / (1 - student_S)).log()
    top_1_S = forward_kl(student_SV, top, temperature)
    torch.testing.assert_close(top_1_S, temperature**2 * expected_S)

    every = top_targets(teacher_SV, 9, temperature)
    whole_S = dense_divergence(student_SV, teacher_SV, temperature)
    for residual in (-torch.inf, -17.0):  # 1 minus a float32 sum is seldom exactly 0
        all_kept_S = forward_kl(student_SV, every._replace(log_residual_S=torch.full((4,), residual)), temperature)
        torch.testing.assert_close(all_kept_S, whole_S)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), student_SV, retain_graph=True) for x in (all_kept_S, whole_S))
    )


@pytest.mark.parametrize("kind, parameter", KINDS)
def test_an_unused_slot_of_the_targets_changes_nothing(kind, parameter):
    student_SV, teacher_SV, divergence = (
        logits(3, 8).requires_grad_(),
        logits(3, 8, seed=1),
        build_divergence(kind, parameter),
    )
    top = top_targets(teacher_SV, 3, 1.0)
    padded = F.pad(top.ids_SK, (0, 2)), F.pad(top.logprobs_SK, (0, 2), value=-torch.inf)  # id 0 may be kept, or not
    plain_S = sparse_divergence(student_SV, top, 2.0, divergence)
    padded_S = sparse_divergence(student_SV, Sparse(*padded, top.log_residual_S), 2.0, divergence)
    torch.testing.assert_close(padded_S, plain_S, rtol=1e-14, atol=1e-15)
    gradients = [torch.autograd.grad(x.sum(), student_SV)[0] for x in (plain_S, padded_S)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind, parameter", KINDS)
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_a_divergence_and_its_gradient_are_zero_when_the_student_is_the_teacher(kind, parameter, dtype, atol):
    student_SV, divergence = logits(6, 50, spread=6).to(dtype).requires_grad_(), build_divergence(kind, parameter)
    for temperature in (1.0, 2.0):
        targets = top_targets(student_SV.detach(), 5, temperature)
        sparse_S = sparse_divergence(student_SV, targets, temperature, divergence)
        dense_S = dense_divergence(student_SV, student_SV.detach(), temperature, divergence)
        for value_S in (sparse_S, dense_S):
            (gradient,) = torch.autograd.grad(value_S.sum(), student_SV)
            assert value_S.abs().max() <= atol
            # of total variation the slope is a sign, which rounding decides where nothing differs
            assert gradient.abs().max() <= atol or kind == "total_variation"


def test_what_a_codec_decodes_is_zero_away_from_the_student_that_made_it():
    student_SV = logits(6, 50, spread=6).float()
    targets = Distribution.from_logits(student_SV, 5, (1.0, 2.0))
    for temperature in (1.0, 2.0):
        assert forward_kl(student_SV, targets.at(temperature), temperature).abs().max() < 2e-6


def test_a_renormalized_tail_is_not_zero_at_equality():
    student_SV = logits(6, 50)
    ids_SK, logprobs_SK, _ = top_targets(student_SV, 5, 1.0)
    renormalized = Sparse(ids_SK, logprobs_SK.log_softmax(-1), torch.full((6,), -torch.inf))
    assert forward_kl(student_SV, renormalized, 1.0).min() > 0.01


@pytest.mark.parametrize("kind, parameter", KINDS)
def test_temperature_multiplies_value_and_gradient_by_exactly_its_square(kind, parameter):
    divergence, teacher_SV = build_divergence(kind, parameter), logits(4, 9, seed=1)
    cold, warm = logits(4, 9).requires_grad_(), (2 * logits(4, 9)).requires_grad_()
    one_S, four_S = (
        dense_divergence(cold, teacher_SV, 1.0, divergence),
        dense_divergence(warm, 2 * teacher_SV, 2.0, divergence),
    )
    assert torch.equal(four_S, 4 * one_S), "doubled logits at temperature 2 are the same distributions"
    one, two = torch.autograd.grad(one_S.sum(), cold)[0], torch.autograd.grad(four_S.sum(), warm)[0]
    assert torch.equal(two, 2 * one), "T² of the value, less one T of the division of the logits"


@pytest.mark.parametrize("kind, parameter", KINDS)
def test_impossible_and_almost_impossible_tokens_leave_value_and_gradient_finite(kind, parameter):
    divergence = build_divergence(kind, parameter)
    teacher_SV, student_SV = logits(3, 7, seed=1), logits(3, 7)
    teacher_SV[:, 2] = -torch.inf
    student_SV[:, 2] = -torch.inf  # impossible on both sides: 0 log 0/0 is 0
    teacher_SV[0, 1], student_SV[1, 1] = -300.0, -300.0  # 1e-131 on one side
    student_SV.requires_grad_()
    dense_S = dense_divergence(student_SV, teacher_SV, 1.0, divergence)
    sparse_S = sparse_divergence(student_SV, top_targets(teacher_SV, 3, 1.0), 1.0, divergence)
    (gradient,) = torch.autograd.grad((dense_S + sparse_S).sum(), student_SV)
    assert dense_S.isfinite().all() and sparse_S.isfinite().all() and gradient.isfinite().all()
    possible = [0, 1, 3, 4, 5, 6]
    expected_S = dense_divergence(student_SV[:, possible], teacher_SV[:, possible], 1.0, divergence)
    torch.testing.assert_close(dense_S, expected_S)


def test_teacher_mass_on_a_token_the_student_cannot_say_is_infinite_and_not_nan():
    student_SV = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    teacher_SV = torch.zeros(1, 2, dtype=torch.float64)
    assert dense_divergence(student_SV, teacher_SV, 1.0).item() == math.inf
    skewed_S = dense_divergence(student_SV, teacher_SV, 1.0, build_divergence("jsd", 0.5))
    torch.testing.assert_close(skewed_S.item(), 0.75 * math.log(4 / 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_positions", [0, 1])
def test_no_position_and_one_position_give_as_many_values_and_a_gradient(num_positions):
    student_SV, teacher_SV = logits(num_positions, 6).requires_grad_(), logits(num_positions, 6, seed=1)
    labels_S = torch.zeros(num_positions, dtype=torch.long)
    kl_S, ce_S = forward_kl(student_SV, top_targets(teacher_SV, 2, 1.0), 1.0), ce(student_SV, labels_S)
    (gradient,) = torch.autograd.grad((kl_S + ce_S).sum(), student_SV)
    assert kl_S.shape == ce_S.shape == (num_positions,) and gradient.isfinite().all()


def test_bfloat16_logits_are_computed_in_float32():
    student_SV, teacher_SV = logits(4, 30).bfloat16(), logits(4, 30, seed=1)
    ids_SK, logprobs_SK, residual_S = top_targets(teacher_SV, 5, 2.0)
    targets = Sparse(ids_SK, logprobs_SK.float(), residual_S.float())
    loss_S = forward_kl(student_SV, targets, 2.0)
    assert loss_S.dtype == torch.float32
    torch.testing.assert_close(loss_S.double(), forward_kl(student_SV.double(), targets, 2.0), rtol=1e-5, atol=1e-6)


def test_the_mean_of_draws_is_the_divergence():
    student_SV, teacher_SV = logits(1, 12), logits(1, 12, seed=1, spread=1)
    logprobs_SV = teacher_SV.log_softmax(-1)
    ids_SK = torch.multinomial(logprobs_SV.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    weights_SK = torch.full(ids_SK.shape, 1 / 200_000, dtype=torch.float64)
    for kind, parameter in KINDS:
        divergence = build_divergence(kind, parameter)
        estimate_S = sampled_divergence(student_SV, ids_SK, weights_SK, logprobs_SV.gather(1, ids_SK), 1.0, divergence)
        torch.testing.assert_close(
            estimate_S, dense_divergence(student_SV, teacher_SV, 1.0, divergence), rtol=0.02, atol=0
        )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_divides_to_nan_is_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature is .*, but it must be positive"):
        dense_divergence(logits(1, 3), logits(1, 3), temperature)


@pytest.mark.parametrize("kind, parameter", [("kl", None), ("jsd", None), ("jsd", 1.0), ("forward_kl", 0.5)])
def test_a_divergence_that_does_not_exist_is_refused(kind, parameter):
    with pytest.raises(ValueError, match=kind):
        build_divergence(kind, parameter)


def vocabulary(*tokens: str) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def test_equal_vocabularies_share_all_ids():
    assert shared_vocab_size(vocabulary("a", "b", "</s>"), vocabulary("a", "b", "</s>")) == 3


def test_vocabularies_that_differ_by_padding_share_the_real_tokens():
    assert shared_vocab_size(vocabulary("a", "b", "</s>", "[PAD]"), vocabulary("a", "b", "</s>")) == 3


@pytest.mark.parametrize(
    "student", [vocabulary("b", "a", "</s>"), vocabulary("a", "c", "</s>", "d"), {"a": 0, "</s>": 2}]
)
def test_vocabularies_of_other_ids_are_refused_with_both_counts_and_the_remedy(student):
    with pytest.raises(ValueError, match=rf"\({len(student)} tokens\).*\(3 tokens\).*set loss\.cross_tokenizer=chunk"):
        shared_vocab_size(vocabulary("a", "b", "</s>"), student)


def test_feature_losses_equal_torchs_own_functions():
    student_WQE, teacher_WQE = logits(4, 2, 5), logits(4, 2, 5, seed=1)
    torch.testing.assert_close(mse(student_WQE, teacher_WQE).mean(), F.mse_loss(student_WQE, teacher_WQE))
    torch.testing.assert_close(smooth_l1(student_WQE, teacher_WQE).mean(), F.smooth_l1_loss(student_WQE, teacher_WQE))
    flat = student_WQE.view(8, 5), teacher_WQE.view(8, 5), torch.ones(8)
    torch.testing.assert_close(cosine(student_WQE, teacher_WQE).mean(), F.cosine_embedding_loss(*flat))
    torch.testing.assert_close(cosine(flat[0], flat[1]), 1 - F.cosine_similarity(flat[0], flat[1]))


def test_the_relation_loss_compares_the_windows_of_one_sample_only_and_any_widths():
    student_WQE, teacher_WQE, sample_W = logits(5, 1, 4), logits(5, 1, 7, seed=1), torch.tensor([0, 0, 0, 1, 1])
    whole_W = relation(student_WQE, teacher_WQE, sample_W)
    parts = [relation(student_WQE[p], teacher_WQE[p], sample_W[p]) for p in (slice(0, 3), slice(3, 5))]
    torch.testing.assert_close(whole_W, torch.cat(parts))
    student, teacher = student_WQE[3:, 0], teacher_WQE[3:, 0]
    gap = F.cosine_similarity(student[0], student[1], dim=0) - F.cosine_similarity(teacher[0], teacher[1], dim=0)
    torch.testing.assert_close(whole_W[3], gap**2 / 2)
    assert relation(3 * student_WQE, student_WQE, sample_W).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(4, 2, 5), (4, 5), (0, 2, 5), (0, 5)])
@pytest.mark.parametrize("kind", FEATURES)
def test_a_feature_loss_is_its_plain_twin_in_value_and_gradient(kind, shape):
    student_WQE, teacher_WQE = logits(*shape).requires_grad_(), logits(*shape, seed=1)
    values = [feature_loss(kind, student_WQE, teacher_WQE, torch.zeros(shape[0]))]
    values.append(FEATURES[kind].plain(student_WQE, teacher_WQE) if shape[0] else values[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), student_WQE, retain_graph=True)[0] for x in values))


@pytest.mark.parametrize("kind", FEATURES)
def test_feature_losses_have_exact_gradients_and_none_for_the_teacher(kind):
    student_WQE, teacher_WQE = logits(3, 2, 4).requires_grad_(), logits(3, 2, 4, seed=1).requires_grad_()
    sample_W = torch.tensor([0, 0, 1])
    assert gradcheck(lambda x: feature_loss(kind, x, teacher_WQE.detach(), sample_W), student_WQE)
    feature_loss(kind, student_WQE, teacher_WQE, sample_W).sum().backward()
    assert teacher_WQE.grad is None
    assert feature_loss(kind, student_WQE.bfloat16(), teacher_WQE, sample_W).isfinite().all()


def test_features_of_other_widths_are_refused_until_they_are_projected():
    student_WQE, teacher_WQE = logits(3, 2, 4), logits(3, 2, 6, seed=1)
    with pytest.raises(ValueError, match=r"\(3, 2, 4\), but the teacher's are \(3, 2, 6\)"):
        mse(student_WQE, teacher_WQE)
    projector = build_projector(4, 6).double()
    assert mse(projector(student_WQE), teacher_WQE).shape == (3,)
    lengths = projector(student_WQE).norm(dim=-1), student_WQE.norm(dim=-1)
    torch.testing.assert_close(*lengths, rtol=1e-5, atol=1e-6)
