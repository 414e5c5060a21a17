"""`distill plan`: what it foretells is what the job then writes, and what it advises fits."""

import pytest
import tiny
import torch

from distill.cache import cache
from distill.caching.fidelity import Fidelity, kl_from_dense, kl_gradient
from distill.caching.plan import Measured, format_plan, plan
from distill.cli import main
from distill.config import load_config
from distill.objective import losses
from shards.targets.codecs.dense import Dense
from shards.targets.codecs.table import decode
from shards.targets.codecs.topk import TopK
from shards.targets.distributions import Distribution
from shards.targets.store import read_done
from shards.tars.index import load_index


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    return tiny.make_toys(folder)


@pytest.fixture(scope="module")
def measured(toys) -> Measured:
    return plan(load_config(toys), num_clips=12)


def find(measured: Measured, **settings):
    return next(c for c in measured.candidates if c.settings == settings)


@pytest.mark.parametrize(
    "settings", [{"codec": "topk", "k": 16}, {"codec": "adaptive", "k": 64, "threshold": 3e-4}, {"codec": "hidden"}],
    ids=lambda settings: settings["codec"],
)  # fmt: skip
def test_the_bytes_foretold_are_the_bytes_that_the_job_writes(toys, tmp_path, measured, settings):
    words = [f"cache.{key}={value}" for key, value in settings.items()]
    config = load_config(toys, [f"cache.folder={tmp_path}", *words])
    cache(config)
    tars = sorted(tmp_path.glob("*.targets.tar"))
    figures = [read_done(tmp_path, tar.name.removesuffix(".targets.tar"))["figures"] for tar in tars]
    candidate = find(measured, **settings)
    assert candidate.payload_bytes == sum(f["payload_bytes"] for f in figures)
    assert candidate.fidelity.positions == sum(f["tokens"] for f in figures)
    assert candidate.fidelity.mass == pytest.approx(sum(f["captured_mass"] for f in figures), rel=1e-3)
    members = [row for tar in tars for row in load_index(tar).members["targets"]]
    size = sum(512 + -(-int(size) // 512) * 512 for _, size, _ in members)
    assert measured.gigabytes(candidate) * 1e9 == pytest.approx(size)


def test_more_ids_keep_more_and_dense_keeps_all(measured):
    topk = [find(measured, codec="topk", k=k).fidelity for k in (8, 16, 32, 64, 128)]
    errors, masses = [f.gradient_error for f in topk], [f.captured_mass for f in topk]
    assert errors == sorted(errors, reverse=True) and masses == sorted(masses)
    dense = find(measured, codec="dense").fidelity
    assert dense.gradient_cosine > 0.99999 and dense.kl < 1e-5 and dense.captured_mass == pytest.approx(1, abs=1e-4)


def test_the_advice_fits_the_budget_and_trains_like_the_dense_teacher_where_one_does(measured):
    assert measured.advise(None) is find(measured, codec="hidden")  # alone above the cosine on these flat toys
    hidden = find(measured, codec="hidden")
    tight = measured.advise(measured.gigabytes(hidden) * 0.99)
    assert measured.gigabytes(tight) < measured.gigabytes(hidden) and tight.settings["codec"] not in (
        "sampled",
        "dense",
    )
    assert measured.advise(1e-9) is None
    assert "no codec fits in 1e-09 GB; the smallest needs" in format_plan(measured, 1e-9)


def test_the_command_prints_each_codec_and_takes_its_words_in_any_order(toys, capsys):
    assert main(["plan", str(toys), "--max-gb", "1e-9", "cache.batch_size=12"]) == 1
    assert main(["plan", "--clips", "4", str(toys), "cache.features=none"]) == 0
    printed = capsys.readouterr().out
    for text in ("cache.codec=topk cache.k=64 ", "cache.codec=sampled cache.draws=12 ", "take cache.codec=hidden:"):
        assert text in printed


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_that_of_the_loss(temperature):
    generator = torch.Generator().manual_seed(0)
    teacher_SV, student_SV = (3 * torch.randn(6, 50, generator=generator) for _ in range(2))
    target = Distribution.from_logits(teacher_SV, 8, (1.0, temperature))
    student_SV.requires_grad_()
    loss = losses.sparse_divergence(student_SV, target.at(temperature), temperature)
    expected_SV = torch.autograd.grad(loss.sum(), student_SV)[0]
    ours_SV = kl_gradient(target, torch.softmax(student_SV.detach() / temperature, -1), temperature)
    torch.testing.assert_close(temperature * ours_SV.float(), expected_SV, rtol=1e-4, atol=1e-6)


def test_nothing_is_lost_in_exact_targets_and_kl_grows_with_rounding():
    logits_SV = 3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    exact = Fidelity()
    exact.add(Distribution.from_logits(logits_SV), torch.log_softmax(logits_SV, -1))
    assert exact.kl == pytest.approx(0, abs=1e-6) and exact.gradient_error < 1e-5
    coarse, fine = (
        decode(codec.encode({n: x.numpy() for n, x in codec.capture(logits_SV).items()}))
        for codec in (TopK(k=32, tail_bits=2), Dense())
    )
    assert 0 <= kl_from_dense(fine, logits_SV).sum() < kl_from_dense(coarse, logits_SV).sum()
