"""The window Q-Former and what feeds it: the reference's numbers, a plain rewriting of it, batches as rows."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_encoders import TINY
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from teachers.ears.encoders import build_encoder
from teachers.files.checkpoint import our_name, their_name
from teachers.salmonn import Salmonn, SalmonnConfig

NO_TOKENIZER = SimpleNamespace(bos_token_id=0, eos_token_id=0, pad_token_id=0)


class Ear(nn.Module):
    """An encoder of a width, of whose frames the test takes care."""

    def __init__(self, width: int, seconds: float = 30.0):
        super().__init__()
        self.width, self.max_samples, self.min_samples = width, int(16_000 * seconds), 320
        self.log_mel = None

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 320


def build(speech_width=12, audio_width=8, llm_width=10, **settings) -> Salmonn:
    """A connector with random weights between ears and LLM that do nothing."""
    torch.manual_seed(0)
    second = {"second": "x", "second_kind": "eat"} if audio_width else {}
    sizes = {"qformer_width": 24, "qformer_layers": 2, "qformer_heads": 4, "qformer_ffn": 40, **settings}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=llm_width, intermediate_size=8, num_hidden_layers=1,
                                       num_attention_heads=1))  # fmt: skip
    ears = Ear(speech_width), Ear(audio_width) if audio_width else None
    model = Salmonn(SalmonnConfig("", "", **second, **sizes), llm, NO_TOKENIZER, *ears).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)
    return model.requires_grad_(False)


def connect(model: Salmonn, frames) -> torch.Tensor:
    """Audio tokens [B, L, D] of encoders' frames."""
    return model.project(model.qformer(model.fuse(frames))).flatten(1, 2)


def own_state(model: Salmonn) -> dict[str, torch.Tensor]:
    """The connector under SALMONN's names."""
    return {their_name(n): p for n, p in model.named_parameters() if their_name(n) is not None}


def connect_plainly(state, frames, *, heads, kernel, stride) -> torch.Tensor:
    """SALMONN's arithmetic from its own tensors, one window after the other."""

    def norm(x, name, eps=1e-12):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def attend(x, seen, name):
        q, k, v = (linear(y, f"{name}.self.{part}").unflatten(-1, (heads, -1)).transpose(0, 1)
                   for part, y in (("query", x), ("key", seen), ("value", seen)))  # fmt: skip
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        out = linear((weights @ v).transpose(0, 1).flatten(1), f"{name}.output.dense")
        return norm(out + x, f"{name}.output.LayerNorm")

    def read(window):
        root = "speech_Qformer.bert"
        x = norm(state["speech_query_tokens"][0], f"{root}.embeddings.LayerNorm")
        for number in range(2):
            layer = f"{root}.encoder.layer.{number}"
            x = attend(attend(x, x, f"{layer}.attention"), window, f"{layer}.crossattention")
            inner = linear(F.gelu(linear(x, f"{layer}.intermediate_query.dense")), f"{layer}.output_query.dense")
            x = norm(inner + x, f"{layer}.output_query.LayerNorm")
        return linear(x, "speech_llama_proj")

    normed = [norm(x, name, 1e-5) for x, name in zip(frames, ("ln_speech", "ln_audio"))]
    length = max(x.shape[1] for x in normed)
    fused = torch.cat([F.pad(x, (0, 0, 0, length - x.shape[1])) for x in normed], -1)
    kernel, stride = (kernel, stride) if kernel else (length, length)
    starts = range(0, length - kernel + 1, stride)
    return torch.stack([torch.cat([read(row[start : start + kernel]) for start in starts]) for row in fused])


@pytest.mark.parametrize("lengths", [(200, 0), (200, 150), (200, 208)], ids=["speech alone", "both", "audio longer"])
@pytest.mark.parametrize(
    ("seconds", "stride"), [(0.333333, 0.333333), (0.5, 0.2), (0.25, 0.25), (0, 0)],
    ids=["SALMONN's", "overlapping", "12.5 frames", "no windows"],
)  # fmt: skip
@pytest.mark.parametrize("num_queries", [1, 3])
def test_audio_tokens_are_those_of_a_plain_rewriting(lengths, seconds, stride, num_queries):
    model = build(audio_width=8 if lengths[1] else 0, window_seconds=seconds, stride_seconds=stride,
                  num_queries=num_queries)  # fmt: skip
    frames = [torch.randn(2, n, w) for n, w in zip(lengths, (12, 8)) if n]
    kernel, step = round(50 * seconds), round(50 * stride)
    expected = connect_plainly(own_state(model), frames, heads=4, kernel=kernel, stride=step)
    found = connect(model, frames)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_half_a_frame_rounds_as_in_python():
    assert build(window_seconds=0.25, stride_seconds=0.25).qformer.window_frames == 12


def test_the_standard_windows_are_88():
    model = build()
    assert (model.num_windows(480_000), model.num_audio_tokens(16_000)) == (88, 88)
    assert build(num_queries=3).num_audio_tokens(16_000) == 264
    assert build(window_seconds=0, stride_seconds=0, num_queries=3).num_audio_tokens(16_000) == 3


@pytest.mark.parametrize("seconds", [0.333333, 0])
def test_a_clip_whose_second_encoder_outlasts_whisper_changes_no_other_row(seconds):
    model = build(window_seconds=seconds, stride_seconds=seconds)
    speech, audio = torch.randn(2, 1500, 12), torch.randn(2, 1504, 8)
    audio[1, 400:] = 0  # this clip has ended
    together = model.qformer(model.fuse([speech, audio]), None, [1504, 1500])[1]
    alone = model.qformer(model.fuse([speech[1:], audio[1:, :400]]), None, [1500])[0]
    assert (together[: len(alone)] - alone).norm() < 1e-5 * alone.norm()


@pytest.mark.parametrize("second", ["", "beats", "eat"])
@pytest.mark.parametrize("seconds", [0.333333, 0])
def test_each_pair_of_ears_hears_a_batch_as_its_rows(second, seconds):
    torch.manual_seed(0)
    sizes = {"qformer_width": 16, "qformer_layers": 1, "qformer_heads": 2, "qformer_ffn": 16}
    names = {"second": "x", "second_kind": second} if second else {}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                       num_attention_heads=1))  # fmt: skip
    ears = [build_encoder(name, TINY[name]) for name in ("whisper", second) if name]
    config = SalmonnConfig("", "", window_seconds=seconds, stride_seconds=seconds, **names, **sizes)
    model = Salmonn(config, llm, NO_TOKENIZER, *ears).eval().requires_grad_(False)
    lengths = [63_997, 8_123, 30_000]  # odd ones, and one that fills tiny Whisper's 4 s
    waveforms_BN = torch.zeros(3, max(lengths))
    for row, length in enumerate(lengths):
        waveforms_BN[row, :length] = 0.3 * torch.randn(length)
    num_samples_B = torch.tensor(lengths)
    together = model.qformer(model.fuse(model.frames(waveforms_BN, num_samples_B)))
    for row, length in enumerate(lengths):
        frames = model.frames(waveforms_BN[row : row + 1, :length], num_samples_B[row : row + 1])
        alone = model.qformer(model.fuse(frames))[0]
        assert (together[row] - alone).norm() < 2e-5 * alone.norm()


def test_bfloat16_stays_within_two_hundredths():
    model = build()
    frames = [torch.randn(2, 100, 12), torch.randn(2, 90, 8)]
    expected = connect(model, frames)
    with torch.autocast("cpu", torch.bfloat16):
        found = connect(model, frames)
    assert (found.float() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.shared
@pytest.mark.parametrize(("case", "file", "audio"), [("std", "std", 496), ("std_beats30s", "std", 1496),
                                                     ("no_audio", "no_audio", 0)])  # fmt: skip
def test_the_references_audio_tokens(shared, monkeypatch, case, file, audio):
    monkeypatch.syspath_prepend(str(shared / "parity"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    from detweights import det_input

    content = torch.load(shared / f"parity/qformer/tiny_{file}.pt", weights_only=True)
    sizes = content["hparams"]
    model = build(sizes["d_speech"], sizes["d_audio"], sizes["llm"], qformer_width=sizes["hidden"],
                  qformer_heads=sizes["heads"], qformer_ffn=sizes["inter"], num_queries=sizes["nq"])  # fmt: skip
    state = {our_name(key): tensor for key, tensor in content["model"].items() if our_name(key) is not None}
    own = {name: parameter for name, parameter in model.named_parameters() if their_name(name) is not None}
    assert {n: t.shape for n, t in state.items()} == {n: p.shape for n, p in own.items()}
    for name, parameter in own.items():
        parameter.copy_(state[name])
    frames = [det_input("q.sp", (2, 1500, 48))] + ([det_input(f"q.au{audio}", (2, audio, 32))] if audio else [])
    tensors = load_file(shared / "parity/qformer/tiny_io.safetensors")
    found = connect(model, frames)
    expected = tensors[f"{case}.out"]
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.shared
def test_the_keys_and_shapes_of_the_official_size_load(shared):
    shapes = json.loads((shared / "parity/qformer/base_keys.json").read_text())["shapes"]
    with torch.device("meta"):
        config = SalmonnConfig("", "", second="x", second_kind="eat")
        llm = nn.Module()
        width = shapes["speech_llama_proj.weight"][0]
        llm.get_input_embeddings = lambda: nn.Embedding(2, width)
        model = Salmonn(config, llm, NO_TOKENIZER, Ear(1280), Ear(768))
    own = {n: list(p.shape) for n, p in model.named_parameters()}
    assert own == {our_name(key): shape for key, shape in shapes.items() if our_name(key) is not None}
