"""A codec is one file and one line: the one here, under a name in CODECS, is planned, cached, proved and learned."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch

from distill.cache import cache
from distill.caching.plan import describe_plan, plan
from distill.caching.verify import verify
from distill.config import load_config
from distill.run import run
from distill.training.monitoring.runlog import METRICS, read_metrics
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.payload import pack_header
from shards.targets.codecs.table import CODECS
from shards.targets.distributions import Distribution


@dataclass(frozen=True)
class Best(Codec):
    """The most probable id alone, exactly."""

    name: ClassVar[str] = "best"
    error: ClassVar[float] = 1e-5

    def serves(self, temperature):
        return temperature == 1

    def plain(self, probs_V):
        return np.arange(len(probs_V)) == probs_V.argmax()

    def capture(self, logits_SV, hidden_SD=None, generator=None):
        logprobs_S, ids_S = torch.log_softmax(logits_SV.float(), -1).max(-1)
        return {"ids_S": ids_S, "logprobs_S": logprobs_S, "vocab_size": torch.tensor(logits_SV.shape[-1])}

    def encode(self, captured):
        ids_S, logprobs_S = captured["ids_S"].astype("<i4"), captured["logprobs_S"].astype("<f4")
        header = pack_header(self, len(ids_S), int(captured["vocab_size"]))
        return header + ids_S.tobytes() + logprobs_S.tobytes()

    @staticmethod
    def read(reader, sizes, vocab_size, parameters):
        ids_S1 = torch.from_numpy(reader.take("<i4", sizes).astype(np.int64))[:, None]
        logprobs_S1 = torch.from_numpy(reader.take("<f4", sizes).copy())[:, None]
        return Distribution(ids_S1, logprobs_S1, {1.0: torch.zeros(len(ids_S1))}, vocab_size)


@pytest.mark.parametrize("step", ["plain", "capture", "encode", "read"])
def test_a_codec_that_lacks_a_step_cannot_be_made(step):
    parts = {name: vars(Best)[name] for name in ("plain", "capture", "encode", "read") if name != step}
    with pytest.raises(TypeError, match=rf"abstract method '?{step}"):
        type("Less", (Codec,), parts)()


def test_a_toy_codec_is_one_line_and_is_planned_cached_proved_and_learned(tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, "best", f"{__name__}:Best")
    tiny.make_toys(tmp_path)
    config = load_config(tmp_path / "toy.yaml", ["cache.codec=best", "loss.temperature=1", "train.stop_after=1"])
    assert "cache.codec=best" in [row["words"] for row in describe_plan(plan(config, 4), None)["candidates"]]
    cache(config)
    assert verify(config, 1.0) == 0
    run(config)
    steps, _ = read_metrics(config.run_folder / METRICS)
    assert [step["kl"] > 0 for step in steps] == [True]
