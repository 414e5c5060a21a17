"""Liger's kernels: they compute what the layers do, they are gone after a run, and are refused where none runs."""

import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from distill.config import load_config
from distill.distiller import Distiller
from distill.run import run
from students import kernels
from students.kernels import check_kernels, drop_kernels_, find_layers, use_kernels_
from students.quantize import quantize_4bit_
from teachers.lora import Lora, add_lora_

GPU = torch.device("cuda")
SIZES = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLMS = {"llama": (LlamaConfig(**SIZES), 7), "qwen2": (Qwen2Config(**SIZES), 7),
        "qwen3": (Qwen3Config(**SIZES, head_dim=16), 11)}  # fmt: skip


@pytest.fixture
def package(monkeypatch):
    """The package, with kernels that need no GPU; counts their calls."""
    calls = SimpleNamespace(norm=0, mlp=0)

    def liger_rms_norm(states, weight, eps, *, in_place):
        calls.norm += 1
        assert not in_place
        return weight * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps))

    def liger_swiglu(gate, up):
        calls.mlp += 1
        return silu(gate) * up

    functional = SimpleNamespace(liger_rms_norm=liger_rms_norm, liger_swiglu=liger_swiglu)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(kernels, "version", lambda name: "0.8.5")
    return calls


def make_llm(name: str, device: str = "cpu"):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(LLMS[name][0]).to(device)
    quantize_4bit_(llm)
    add_lora_(llm, Lora(rank=4, targets=("all-linear",)))
    return llm


def states_and_gradient(llm) -> list[torch.Tensor]:
    device = next(llm.parameters()).device
    embeds_BTD, weights_BTD = torch.randn(2, 2, 5, 64, generator=torch.Generator().manual_seed(0)).to(device)
    states_BTD = llm.base_model(inputs_embeds=embeds_BTD.requires_grad_()).last_hidden_state
    return [states_BTD, *torch.autograd.grad((weights_BTD * states_BTD).sum(), embeds_BTD)]


@pytest.mark.parametrize("name", LLMS)
def test_every_layer_that_has_a_kernel_computes_with_it_until_it_is_dropped(package, name):
    llm, number = make_llm(name), LLMS[name][1]
    plain = states_and_gradient(llm)
    use_kernels_(llm)
    torch.testing.assert_close(states_and_gradient(llm), plain)
    assert package.norm + package.mlp == len(find_layers(llm)) == number and package.mlp == 2
    drop_kernels_(llm)
    assert all(map(torch.equal, states_and_gradient(llm), plain)) and package.mlp == 2


def test_a_run_computes_with_them_and_its_student_has_none(package, tmp_path, monkeypatch):
    tiny.make_toys(tmp_path, teacher__online=True, train__steps=2, precision="float32")
    words = {name: [f"name={name}", f"train.kernels={name}"] for name in ("none", "liger")}
    monkeypatch.setattr("distill.distiller.check_kernels", lambda llm, device: None)
    students, finish = [], Distiller._finish
    monkeypatch.setattr(Distiller, "_finish", lambda self, step: (finish(self, step), students.append(self.student)))
    assert [run(load_config(tmp_path / "toy.yaml", words[name])) for name in words] == [0, 0]
    assert package.mlp == 2 and not any("forward" in vars(layer) for layer in students[1].llm.modules())
    for theirs, own in zip(*(one.state_dict().values() for one in students), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_they_are_refused_where_none_runs(package, monkeypatch):
    llm = make_llm("llama")
    with pytest.raises(ValueError, match=r"train\.kernels is liger, but this run is on cpu and its kernels need a GPU"):
        check_kernels(llm, torch.device("cpu"))
    check_kernels(llm, GPU)
    other = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=100, n_embd=64, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match=r"no layer of a GPT2LMHeadModel has one, those of Llama, .* do; set"):
        check_kernels(other, GPU)
    relu = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, hidden_act="relu"))
    assert {type(layer).__name__ for layer in find_layers(relu)} == {"LlamaRMSNorm"}
    monkeypatch.setattr(kernels, "version", lambda name: "0.7.1")
    with pytest.raises(ValueError, match=r"liger-kernel is 0\.7\.1 and 0\.8 is needed; pip install 'liger-kernel=="):
        check_kernels(llm, GPU)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"liger-kernel-that-is-not-there is not installed and 0\.8 is needed"):
        monkeypatch.setattr(kernels, "PACKAGE", "liger-kernel-that-is-not-there")
        check_kernels(llm, GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LLMS)
def test_the_real_ones_compute_what_the_layers_do(name):
    pytest.importorskip("liger_kernel")
    llm = make_llm(name, "cuda")
    check_kernels(llm, GPU)
    plain = states_and_gradient(llm)
    use_kernels_(llm)
    torch.testing.assert_close(states_and_gradient(llm), plain, rtol=1e-3, atol=1e-4)
