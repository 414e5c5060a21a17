"""`distill cache-verify`: a sound cache passes with every codec; each kind of damage or drift is found and named."""

import dataclasses
import os
from pathlib import Path

import pytest
import tiny
import torch

from distill import cache as cache_module
from distill.cache import cache
from distill.caching.verify import verify
from distill.config import load_config
from shards.targets.store import tar_path


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, cache__max_new_tokens=4)
    return folder


def make_cache(toys: Path, folder: Path, **changes):
    words = [f"cache.{n}={list(value) if isinstance(value, tuple) else value}" for n, value in changes.items()]
    config = load_config(toys / "toy.yaml", [f"cache.folder={folder}", *words])
    assert cache(config) == 0
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "topk", "features": "float16", "answers": "both"},
        {"codec": "adaptive", "hidden_layers": (-1, 1)},
        {"codec": "sampled", "frames": "int8"},
        {"codec": "hidden", "features": "none"},
        {"codec": "dense", "answers": "teacher"},
    ],
    ids=lambda changes: changes["codec"],
)
def test_a_sound_cache_passes_whatever_its_codec(toys, tmp_path, capsys, changes):
    config = make_cache(toys, tmp_path, **changes)
    assert verify(config, share=1.0) == 0
    printed = capsys.readouterr().out
    assert "12 records in 3 shards read again, 0 problems" in printed
    assert f"{24 if 'both' in changes.values() else 12} answers computed again" in printed


def test_another_batch_size_says_the_same_within_the_codecs_error(toys, tmp_path):
    config = make_cache(toys, tmp_path, codec="topk")
    other = dataclasses.replace(config, cache=dataclasses.replace(config.cache, batch_size=3))
    assert verify(other, share=1.0) == 0


def test_a_flipped_bit_is_found_with_its_shard_and_key(toys, tmp_path, capsys):
    config = make_cache(toys, tmp_path, codec="topk")
    path = tar_path(tmp_path, "train-000001")
    status, data = path.stat(), bytearray(path.read_bytes())
    data[data.index(b"payload", 5000) + 1500] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verify(config, share=0.0) == 1
    printed = capsys.readouterr().out
    assert "12 records in 3 shards read again, 1 problems" in printed
    assert "train-000001.targets.tar: 0000000" in printed and "has crc32" in printed


def test_a_record_of_another_sample_is_found(toys, tmp_path, capsys, monkeypatch):
    shift = lambda samples, texts=("one", "two"): [  # noqa: E731
        dataclasses.replace(s, text=next(t for t in texts if t != s.text)) for s in samples
    ]
    capture = cache_module.Capturer.__call__
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.Capturer, "__call__", lambda self, samples: capture(self, shift(samples)))
        config = make_cache(toys, tmp_path, codec="topk")
    assert verify(config, share=0.0) == 1
    printed = capsys.readouterr().out
    assert (
        "12 problems" in printed and "another answer; cache this sample again" in printed and "… and 2 more" in printed
    )


@pytest.mark.parametrize("codec", ["topk", "adaptive", "sampled", "hidden", "dense"])
def test_targets_that_the_teacher_would_not_say_are_found(toys, tmp_path, capsys, monkeypatch, codec):
    class Drifted(cache_module.Capturer):
        """Positions one off: what a shifted cache holds."""

        def _encode(self, logits_SV, hidden_SD, parts, identities):
            return super()._encode(torch.roll(logits_SV, 1, 0), torch.roll(hidden_SD, 1, 0), parts, identities)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "Capturer", Drifted)
        config = make_cache(toys, tmp_path, codec=codec)
    assert verify(config, share=1.0) == 1
    assert "distribution differs by" in capsys.readouterr().out


def test_a_stale_cache_and_a_share_above_one_are_refused(toys, tmp_path):
    config = make_cache(toys, tmp_path, codec="topk")
    with pytest.raises(ValueError, match=r"--share is 1\.5, but it is a share from 0 to 1"):
        verify(config, share=1.5)
    other = dataclasses.replace(config, cache=dataclasses.replace(config.cache, k=8))
    with pytest.raises(ValueError, match=r"(?s)was cached as .* codec\.k: cached 16, this run 8"):
        verify(other, share=0.5)
