"""An upcycled LLM says what the dense one does, is a folder that everybody reads, and says how large it is."""

import json

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from distill.cli import main
from students.upcycle import describe, part_experts_, upcycle_moe

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.2}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
DENSE = {
    "llama 3.2": LlamaConfig(**SIZES, head_dim=16, rope_parameters=LLAMA3_ROPE, max_position_embeddings=512,
                             tie_word_embeddings=True, rms_norm_eps=1e-5),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}  # fmt: skip
IDS_BT = torch.arange(3, 35).view(2, 16)


def make_llm(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_mixture_says_what_the_dense_llm_does_whatever_its_router_says(name, top_k):
    dense = make_llm(DENSE[name])
    answer = dense.generate(IDS_BT, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for seed in (0, 1):
        mixture = upcycle_moe(dense, experts=4, top_k=top_k, seed=seed)
        routed = mixture.model.layers[0].mlp.gate(torch.randn(20, 32))[2]
        assert routed.shape == (20, top_k) and len(routed.unique()) > 1
        torch.testing.assert_close(mixture(IDS_BT).logits, dense(IDS_BT).logits, atol=1e-5, rtol=1e-5)
        answered = mixture.generate(IDS_BT, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(answered, answer)


def test_experts_that_are_parted_have_weights_of_their_own():
    mixture = upcycle_moe(make_llm(DENSE["llama 3.2"]), experts=3, top_k=2)
    part_experts_(mixture, torch.float32)
    weight = mixture.model.layers[1].mlp.experts.down_proj
    weight.data[1] += 1
    assert torch.equal(weight[0], weight[2]) and not torch.equal(weight[0], weight[1])


def test_a_token_passes_what_a_dense_llm_with_so_many_feed_forwards_has():
    dense = make_llm(DENSE["mistral"])
    upcycled = describe(dense, upcycle_moe(dense, experts=4, top_k=2), torch.bfloat16)
    routers, feed_forward = 2 * 4 * 32, 2 * 3 * 32 * 24
    assert upcycled.parameters == upcycled.dense_parameters + routers + 3 * feed_forward
    assert upcycled.active_parameters == upcycled.dense_parameters + routers + feed_forward
    assert upcycled.bytes == 2 * upcycled.parameters and upcycled.same_greedy == upcycled.num_probed == 64
    assert upcycled.difference < 1e-5 * upcycled.largest_logit


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upcycle")
    tiny.make_parts(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    sizes = SIZES | {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    for name, config in {
        "dense": LlamaConfig(**sizes, tie_word_embeddings=True),
        "biased": LlamaConfig(**sizes, attention_bias=True),
        "qwen2": Qwen2Config(**sizes),
        "gpt2": GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4),
    }.items():
        make_llm(config).to(torch.bfloat16 if name == "dense" else torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_the_command_writes_a_mixtral_in_the_dense_llms_type_and_refuses_a_folder_that_holds_files(toys, tmp_path,
                                                                                                   capsys):  # fmt: skip
    words = ["upcycle", str(toys / "dense"), str(tmp_path / "mixture"), "--experts", "4", "--top-k", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    said = json.loads((tmp_path / "mixture" / "upcycle.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(toys / "dense", dtype=torch.float32)
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", dtype=torch.float32)
    assert isinstance(mixture, MixtralForCausalLM)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").dtype == torch.bfloat16
    torch.testing.assert_close(mixture(IDS_BT).logits, dense(IDS_BT).logits, atol=1e-5, rtol=1e-5)
    assert said["parameters"] == sum(p.numel() for p in mixture.parameters())
    assert f"{said['difference']:.1e} in logits" in printed and "64 of 64 greedy ids are the same" in printed
    assert AutoTokenizer.from_pretrained(tmp_path / "mixture").get_vocab()
    assert main(words) == 1
    assert "holds files already; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("gpt2", [], "LLM is of family gpt2, but a mixture is made of llama, mistral, qwen3 alone"),
        ("qwen2", [], "LLM is of family qwen2, but a mixture is made of llama, mistral, qwen3 alone"),
        ("biased", [], "LLM is a LlamaForCausalLM with model.layers.0.self_attn.k_proj.bias, but a MixtralForCausalLM"),
        ("dense", ["--experts", "1"], "--experts is 1, but a mixture has 2 or more"),
        ("dense", ["--experts", "4", "--top-k", "5"], "--top-k is 5, but a token goes to 1 to 4 of 4 experts"),
    ],
)
def test_what_cannot_be_a_mixture_is_refused_by_name(toys, tmp_path, capsys, name, words, message):
    assert main(["upcycle", str(toys / name), str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
