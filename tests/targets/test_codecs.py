"""Codecs: what goes in comes out, to the precision each one states, and what is damaged does not."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.targets.codecs.adaptive import Adaptive
from shards.targets.codecs.bitpack import Reader, pack_bits, pack_sets, unpack_bits, unpack_sets
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.dense import Dense
from shards.targets.codecs.hidden import Hidden
from shards.targets.codecs.sampled import Sampled
from shards.targets.codecs.table import CODECS, codec_of, decode, describe_codec, find_codec
from shards.targets.codecs.topk import TopK
from shards.targets.distributions import Distribution, log1mexp


def make_logits(num_positions: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Peaked logits: every other position is nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    logits_SV = 3 * torch.randn(num_positions, vocab_size, generator=generator)
    logits_SV[::2, 3 % vocab_size] += 18
    return logits_SV


def capture(codec: Codec, *said: Tensor, generator: torch.Generator | None = None) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in codec.capture(*said, generator=generator).items()}


def encode(codec: Codec, *said: Tensor, generator: torch.Generator | None = None) -> bytes:
    return codec.encode(capture(codec, *said, generator=generator))


def to_dense(distribution: Distribution, temperature: float = 1.0) -> Tensor:
    """Probabilities over V plus one bucket for the rest."""
    _, logprobs_SK, log_residual_S = distribution.at(temperature)
    dense_SV = torch.zeros(len(logprobs_SK), distribution.vocab_size + 1)
    dense_SV.scatter_add_(1, distribution.ids_SK, logprobs_SK.exp())
    dense_SV[:, -1] = log_residual_S.exp()
    return dense_SV


def bucket_dense(logits_SV: Tensor, kept: Distribution, temperature: float = 1.0) -> Tensor:
    """The exact probabilities of the kept ids, with what is outside them in the last column; the oracle."""
    probs_SV = torch.softmax(logits_SV.double() / temperature, -1)
    is_kept_SV = torch.zeros_like(probs_SV).scatter_add_(1, kept.ids_SK, kept.logprobs_SK.exp().double()) > 0
    return torch.cat([probs_SV * is_kept_SV, (probs_SV * ~is_kept_SV).sum(1, keepdim=True)], 1).float()


@pytest.mark.parametrize("width", [1, 3, 5, 7, 8, 9, 11, 16, 17, 18])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_packed_integers_come_back_in_the_bits_they_need(width, count):
    values = np.random.default_rng(width).integers(0, 2**width, count).astype(np.uint32)
    data = pack_bits(values, width)
    assert len(data) <= -(-count // 8) * width
    reader = Reader([data], [0])
    np.testing.assert_array_equal(unpack_bits(reader, [count], width), values)
    reader.finish()


@pytest.mark.parametrize("universe", [1, 2, 64, 1000, 128_256, 2**18])
def test_sets_of_any_size_come_back(universe):
    rng = np.random.default_rng(universe)
    sizes = [0, 1, 2, min(universe, 64), universe if universe <= 1000 else 5, 0]
    counts_S = np.array([min(size, universe) for size in sizes])
    ids = np.concatenate([np.sort(rng.choice(universe, count, replace=False)) for count in counts_S]).astype(np.int64)
    reader = Reader([pack_sets(ids, counts_S, universe)], [0])
    np.testing.assert_array_equal(unpack_sets(reader, [len(counts_S)], counts_S, universe), ids)
    reader.finish()


def test_a_set_of_64_ids_takes_38_bytes_less_than_17_bits_each():
    counts_S = np.full(100, 64)
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.sort(rng.choice(128_256, 64, replace=False)) for _ in counts_S])
    assert len(pack_sets(ids, counts_S, 128_256)) <= 100 * (64 * 17 / 8 - 32)


@pytest.mark.parametrize("log_x", [-1e-6, -0.1, -0.6931, -0.6932, -5.0, -50.0])
def test_log1mexp_is_exact_at_both_ends(log_x):
    expected = math.log1p(-math.exp(log_x)) if log_x < -1 else math.log(-math.expm1(log_x))
    assert log1mexp(torch.tensor(log_x)).item() == pytest.approx(expected, rel=1e-5)
    assert log1mexp(torch.zeros(1)).item() == -torch.inf


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 64, 1000, 2**17 + 5, 2**18])
@pytest.mark.parametrize("codec", [TopK(k=1), TopK(k=5, tail_bits=8), TopK(tail_bits=8), Adaptive(min_k=1)], ids=str)
def test_kept_probabilities_and_residual_come_back(codec, vocab_size):
    logits_SV = make_logits(6, vocab_size)
    distribution = decode(encode(codec, logits_SV))
    assert distribution.vocab_size == vocab_size
    for temperature in (1.0, 2.0):
        decoded = to_dense(distribution, temperature)
        torch.testing.assert_close(decoded, bucket_dense(logits_SV, distribution, temperature), rtol=0.03, atol=3e-4)
        torch.testing.assert_close(decoded.sum(1), torch.ones(6), rtol=0, atol=1e-5)


def test_the_head_is_in_order_and_to_float16():
    logits_SV = make_logits(50, 1000)
    distribution = decode(encode(TopK(k=32, head=8), logits_SV))
    logprobs_SH, ids_SH = torch.log_softmax(logits_SV, -1).topk(8)
    assert torch.equal(distribution.ids_SK[:, :8], ids_SH)
    # float16 holds a log-probability to 2**-11 of itself; the rest is the renormalization by the coarser tail
    torch.testing.assert_close(distribution.logprobs_SK[:, :8], logprobs_SH, rtol=2**-11, atol=0.02)


@pytest.mark.parametrize("codec", [TopK(tail_bits=5), Adaptive(threshold=1e-6, max_k=64, tail_bits=8)], ids=str)
def test_tail_errors_stay_within_the_largest_step(codec):
    logits_SV = make_logits(40, 5000)
    logprobs_SV = torch.log_softmax(logits_SV, -1)
    distribution = decode(encode(codec, logits_SV))
    is_used_SK = distribution.logprobs_SK > -torch.inf
    exact_SK = logprobs_SV.gather(1, distribution.ids_SK)
    errors_SK = (distribution.logprobs_SK - exact_SK).abs().masked_fill(~is_used_SK, 0)
    least_S = exact_SK.masked_fill(~is_used_SK, torch.inf).min(1).values
    span_S = exact_SK[:, codec.head - 1] - least_S
    # half of the curve's last step, on a span rounded up by at most 2**(1/16), and the renormalization
    bound_S = 0.5 * 1.5 * span_S * 2 ** (1 / 16) / (2**codec.tail_bits - 1) + 0.02
    assert (errors_SK.max(1).values <= bound_S).all()


def test_the_residual_of_a_certain_teacher_keeps_its_digits():
    logits_SV = torch.zeros(1, 1000)
    logits_SV[0, 7] = 40.0
    log_residual_S = decode(encode(TopK(k=4), logits_SV)).at(1.0).log_residual_S
    # a mass of 4e-15, far below what float32's one minus the rest can hold
    assert log_residual_S.item() == pytest.approx(math.log(996) - 40, rel=2**-11)


def test_nothing_is_outside_when_all_ids_are_kept():
    for codec in (TopK(k=64), Adaptive(threshold=0.0, max_k=64), Dense()):
        _, logprobs_SK, log_residual_S = decode(encode(codec, make_logits(5, 16))).at(1.0)
        assert logprobs_SK.shape == (5, 16)
        assert (log_residual_S == -torch.inf).all()


def test_impossible_ids_are_never_kept():
    logits_SV = make_logits(6, 100)
    logits_SV[:, 2:95] = -torch.inf
    logits_SV[5, 1:] = -torch.inf
    for codec in (TopK(k=16, tail_bits=8), Adaptive(min_k=9), Dense(), Sampled()):
        distribution = decode(encode(codec, logits_SV))
        decoded = to_dense(distribution)
        assert (decoded[:, 2:95] == 0).all() and (decoded[5, 1:] == 0).all()
        assert decoded[5, 0] == 1 and (decoded[:, -1] == 0).all()
        assert not decoded.isnan().any()


def test_ties_keep_k_distinct_ids():
    for codec in (TopK(k=16), Adaptive(min_k=16, max_k=16)):
        distribution = decode(encode(codec, torch.zeros(3, 300)))
        assert all(len(set(row)) == 16 for row in distribution.ids_SK.tolist())
        torch.testing.assert_close(to_dense(distribution)[:, -1], torch.full((3,), 284 / 300), rtol=1e-3, atol=0)


def test_no_position_at_all_is_a_payload_too():
    for codec in (TopK(), Adaptive(), Sampled(), Dense()):
        _, logprobs_SK, log_residual_S = decode(encode(codec, torch.zeros(0, 100))).at(1.0)
        assert len(logprobs_SK) == len(log_residual_S) == 0


def test_adaptive_keeps_what_is_likelier_than_the_threshold():
    logits_SV = make_logits(40, 3000)
    distribution = decode(encode(Adaptive(threshold=1e-3, min_k=5, max_k=100), logits_SV))
    expected_S = (torch.softmax(logits_SV, -1) >= 1e-3).sum(1).clamp(5, 100)
    assert torch.equal((distribution.logprobs_SK > -torch.inf).sum(1), expected_S)
    assert expected_S.min() == 5 and expected_S.max() > 50


def test_a_vocabulary_of_more_than_18_bits_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 262145, but .* 262144"):
        encode(TopK(k=2), torch.zeros(1, 2**18 + 1))


def test_kl_to_itself_is_zero_through_the_dense_codec():
    distribution = decode(encode(Dense(), make_logits(8, 500)))
    _, logprobs_SK, log_residual_S = distribution.at(1.0)
    assert distribution.is_complete and (log_residual_S == -torch.inf).all()
    assert (logprobs_SK.exp() * (logprobs_SK - distribution.logprobs_SK)).sum().item() == pytest.approx(0, abs=1e-6)


def test_dense_serves_every_temperature():
    logits_SV = make_logits(8, 500)
    logprobs_SK = decode(encode(Dense(), logits_SV)).at(0.7).logprobs_SK
    torch.testing.assert_close(logprobs_SK.exp(), torch.softmax(logits_SV / 0.7, -1), rtol=0, atol=3e-3)


@pytest.mark.parametrize("codec", [TopK(temperatures=(1.0, 2.0)), Adaptive(), Sampled()], ids=lambda codec: codec.name)
def test_a_temperature_that_is_not_stored_is_refused_by_name(codec):
    distribution = decode(encode(codec, make_logits(4, 500)))
    stored = r"\[1\.0\]" if codec.name == "sampled" else r"\[1\.0, 2\.0\]"
    with pytest.raises(ValueError, match=rf"temperature is 3\.0, but .* {stored}; .*cache\.temperatures"):
        distribution.at(3.0)


@pytest.mark.parametrize("temperature", [0.7, 1.3, 1 / 3, 4.0])
@pytest.mark.parametrize("kind", [TopK, Adaptive])
def test_a_stored_temperature_is_served_to_its_last_digit(kind, temperature):
    logits_SV = make_logits(3, 200)
    distribution = decode(encode(kind(temperatures=(1.0, temperature)), logits_SV))
    torch.testing.assert_close(to_dense(distribution, temperature).sum(1), torch.ones(3))
    exact_SV = bucket_dense(logits_SV, distribution, temperature)
    torch.testing.assert_close(to_dense(distribution, temperature)[:, -1], exact_SV[:, -1], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("exponent", [1.0, 0.7])
def test_sampled_probabilities_are_right_on_average(exponent):
    logits_V = torch.tensor([4.0, 3.0, 2.0, 0.0, 0.0, -1.0, -3.0])
    repeats = 20_000
    codec = Sampled(draws=8, exponent=exponent)
    generator = torch.Generator().manual_seed(0)
    distribution = decode(encode(codec, logits_V.expand(repeats, -1), generator=generator))
    weights_SV = to_dense(distribution)[:, :-1]
    error_of_mean_V = weights_SV.std(0) / repeats**0.5
    deviations_V = (weights_SV.mean(0) - torch.softmax(logits_V, -1)) / error_of_mean_V
    assert deviations_V.abs().max() < 4  # of seven, one in 2,000 seeds would fail this


def test_sampled_weights_are_the_counts_of_the_draws():
    captured = {
        "draws_SN": np.array([[9, 2, 9, 9], [1, 1, 1, 1]], np.int32),
        "log_ratio_SN": np.zeros((2, 4), np.float32),
    }
    dense = to_dense(decode(Sampled(draws=4).encode(captured | {"vocab_size": np.array(12)})))
    assert dense[0, [2, 9]].tolist() == [0.25, 0.75] and dense[1, 1] == 1 and dense.sum() == 2


def test_the_same_seed_draws_the_same_bytes():
    payloads = {encode(Sampled(), make_logits(5, 100), generator=torch.Generator().manual_seed(7)) for _ in range(2)}
    assert len(payloads) == 1


def test_hidden_states_are_off_by_half_a_step_at_most_and_rebuild_the_logits():
    generator = torch.Generator().manual_seed(0)
    hidden_SD, head_VD = torch.randn(20, 256, generator=generator), torch.randn(300, 256, generator=generator)
    hidden_SD[3] = 0
    hidden_SD[:, 200] *= 50  # coarsens the steps of its own half only
    decoded = decode(encode(Hidden(), hidden_SD @ head_VD.T, hidden_SD))
    bound_SD = (hidden_SD.abs().view(20, 2, 128).amax(-1) / 254).repeat_interleave(128, 1)
    assert ((decoded.hidden_SD - hidden_SD).abs() <= bound_SD * (1 + 1e-5)).all()
    logits_SV, decoded = hidden_SD @ head_VD.T, decoded.with_head(head_VD)
    assert ((decoded.logits() - logits_SV).abs() <= bound_SD @ head_VD.abs().T + 1e-3).all()
    _, logprobs_SV, log_residual_S = decoded.at(1.7)
    assert torch.equal(logprobs_SV, torch.log_softmax(decoded.logits() / 1.7, -1))
    assert (log_residual_S == -torch.inf).all() and decoded.ids_SK.shape == (20, 300)
    capped = decoded.with_head(head_VD, softcap=5.0, logit_scale=0.5).to("cpu").logits()
    torch.testing.assert_close(capped, 5 * torch.tanh(decoded.logits() / 10))
    with pytest.raises(ValueError, match="head has 299 rows, but the cached teacher's 300"):
        decoded.with_head(head_VD[:299])


@pytest.mark.parametrize("name", CODECS)
def test_every_cut_of_a_payload_is_refused(name):
    payload = encode(find_codec(name)(), make_logits(3, 200), torch.randn(3, 8))
    for size in range(len(payload)):
        with pytest.raises(ValueError):
            decode(payload[:size])
    with pytest.raises(ValueError, match="but its header describes"):
        decode(payload + b"\0")


def test_a_payload_of_an_unknown_codec_or_version_is_refused():
    payload = encode(TopK(k=2), make_logits(2, 50))
    with pytest.raises(ValueError, match=r"codec is 'topq', but this program knows topk, adaptive"):
        decode(payload.replace(b"topk", b"topq"))
    with pytest.raises(ValueError, match="payload version of topk is 9, but this program reads 2"):
        decode(payload[:2] + b"\x09" + payload[3:])
    with pytest.raises(ValueError, match="payload starts with"):
        decode(b"PK" + payload[2:])


def test_an_online_distribution_is_what_a_finer_codec_approaches():
    logits_SV = make_logits(30, 2000)
    online = Distribution.from_logits(logits_SV, 32, (1.0, 2.0))
    cached = decode(encode(TopK(k=32, head=32), logits_SV))
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(to_dense(cached, temperature), to_dense(online, temperature), rtol=4e-3, atol=1e-6)


def test_a_residual_that_was_not_measured_is_one_minus_the_rest():
    online = Distribution.from_logits(make_logits(30, 2000), 32, (1.0, 2.0))
    bare = Distribution(online.ids_SK, online.logprobs_SK, online.log_partition_S, 2000)
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(to_dense(bare, temperature), to_dense(online, temperature), rtol=1e-4, atol=4e-6)


@pytest.mark.parametrize(
    "codec",
    [TopK(k=33), TopK(tail_bits=8), Adaptive(), Adaptive(min_k=1, tail_bits=5), Sampled(), Sampled(exponent=0.7),
     Dense()],
    ids=str,
)  # fmt: skip
def test_payloads_read_together_are_the_payloads_read_apart(codec):
    sizes = [3, 0, 1, 17, 8]
    payloads = [encode(codec, make_logits(size, 5000, seed)) for seed, size in enumerate(sizes)]
    together = decode(*payloads)
    apart = Distribution.concatenate([decode(payload) for payload in payloads])
    for temperature in apart.log_partition_S or [1.0]:
        for own, expected in zip(together.at(temperature), apart.at(temperature)):
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)
    assert torch.equal(together.ids_SK, apart.ids_SK)


def test_hidden_states_read_together_are_those_read_apart():
    payloads = [encode(Hidden(), torch.zeros(size, 1000), make_logits(size, 256, size)) for size in (2, 5)]
    apart = torch.cat([decode(payload).hidden_SD for payload in payloads])
    assert torch.equal(decode(*payloads).hidden_SD, apart)


def test_payloads_of_two_layouts_are_read_together_too():
    payloads = [encode(codec, make_logits(4, 1000)) for codec in (TopK(k=8), TopK(k=20))]
    together = decode(*payloads)
    assert together.ids_SK.shape == (8, 20)
    assert torch.equal(together.logprobs_SK[4:], decode(payloads[1]).logprobs_SK)


def test_concatenated_samples_are_the_samples():
    parts = [decode(encode(Adaptive(min_k=1), make_logits(size, 800, seed=size))) for size in (3, 5)]
    joined = Distribution.concatenate(parts)
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(to_dense(joined, temperature), torch.cat([to_dense(p, temperature) for p in parts]))
    with pytest.raises(ValueError, match=r"vocab_size is 700 .* began with 800"):
        Distribution.concatenate([parts[0], decode(encode(Adaptive(), make_logits(2, 700)))])
    with pytest.raises(ValueError, match=r"complete: True.*complete: False"):
        Distribution.concatenate([parts[0], decode(encode(Dense(), make_logits(2, 800)))])


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("topk", {"tail_bits": 9}, "tail_bits"),
        ("topk", {"temperatures": (2.0,)}, r"temperatures is \(2.0,\), but .* 1.0 among them"),
        ("adaptive", {"max_k": 3}, "max_k at least min_k"),
        ("sampled", {"draws": 0}, "draws must be from 1"),
    ],
)
def test_bad_parameters_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        find_codec(name)(**parameters)


def test_a_codec_is_described_by_name_version_and_every_parameter():
    codec = TopK(k=32, temperatures=(1.0, 4.0))
    expected = {"name": "topk", "version": 2, "k": 32, "head": 4, "tail_bits": 5, "temperatures": (1.0, 4.0)}
    assert describe_codec(codec) == expected
    assert codec_of({"codec": json.loads(json.dumps(describe_codec(codec)))}) == codec


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_keeps_what_its_definition_says_and_is_off_by_no_more_than_its_error(name):
    codec, generator = find_codec(name)(), torch.Generator().manual_seed(0)
    hidden_SD, head_VD = torch.randn(16, 64, generator=generator), torch.randn(800, 64, generator=generator)
    logits_SV = hidden_SD @ head_VD.T / 4
    decoded = decode(encode(codec, logits_SV, hidden_SD, generator=generator))
    decoded = decoded.with_head(head_VD / 4) if codec.needs_head else decoded
    probs_SV = torch.softmax(logits_SV.double(), -1)
    plain_SV = torch.tensor(np.stack([codec.plain(probs_V.numpy()) for probs_V in probs_SV]))
    dense_SV = to_dense(decoded)
    is_kept_SV = dense_SV[:, :-1] > 0
    assert not (is_kept_SV & ~plain_SV).any()
    if not codec.is_random:
        assert torch.equal(is_kept_SV, plain_SV)
        exact_SV = torch.cat([probs_SV * plain_SV, (probs_SV * ~plain_SV).sum(1, keepdim=True)], 1)
        assert 0.5 * (dense_SV - exact_SV).abs().sum(1).max() <= codec.error
    for temperature in (1.0, 2.0, 3.0):
        if codec.serves(temperature):
            decoded.at(temperature)
        else:
            with pytest.raises(ValueError, match="temperature is"):
                decoded.at(temperature)
