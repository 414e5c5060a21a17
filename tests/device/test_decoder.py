"""The LLM's graph is the trained LLM: 4-bit codes, LoRA, prefix, norms, biases and rotations, step by step."""

import numpy as np
import openvino as ov
import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from students.device.decoder import build_decoder
from students.device.student import EXACT
from students.quantize import quantize_4bit_
from teachers.lora import Lora, add_lora_
from teachers.words.prefix import add_prefix_, is_of_prefix

SIZES = {"vocab_size": 90, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 1e4}  # fmt: skip
LLMS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with scaled rotations": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=SCALED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
}


def make_llm(name: str, prefix: int = 0) -> torch.nn.Module:
    """A small LLM in 4 bits with LoRA and, where `prefix` is not 0, a prefix, all of whose tensors are random."""
    torch.manual_seed(0)
    llm = LLMS[name]()
    for parameter_name, parameter in llm.named_parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in parameter_name else torch.nn.init.normal_(
            parameter, std=0.1
        )
    quantize_4bit_(llm)
    add_lora_(llm, Lora(rank=4, alpha=8))
    if prefix:
        add_prefix_(llm, prefix)
    for parameter_name, parameter in llm.named_parameters():
        if "lora_B" in parameter_name or is_of_prefix(parameter_name):
            torch.nn.init.normal_(parameter, std=0.1 if "lora_B" in parameter_name else 1.0)
    return llm.eval()


class Graph:
    """A compiled graph with its state."""

    def __init__(self, model: ov.Model):
        self.request = ov.Core().compile_model(model, "CPU", EXACT).create_infer_request()

    def __call__(self, embeds, mask, positions, beams=None) -> np.ndarray:
        beams = np.arange(len(embeds), dtype=np.int32) if beams is None else beams
        inputs = {"embeds": embeds.numpy(), "mask": mask.numpy(), "positions": positions.numpy(), "beams": beams}
        self.request.infer(inputs)
        return self.request.get_tensor("logits").data.copy()


@pytest.fixture(scope="module")
def rows():
    """Embeddings of two rows, the second padded on the left by 5."""
    torch.manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    return torch.randn(2, 12, 64), mask, (mask.cumsum(1) - 1).clamp(min=0)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("name", "prefix"), [*((name, 0) for name in LLMS), ("llama", 3), ("qwen3", 3)])
def test_logits_of_prefill_and_steps_are_the_trained_llms(name, prefix, rows):
    llm, (embeds, mask, positions) = make_llm(name, prefix), rows
    with torch.no_grad():
        expected = llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits.numpy()
    graph = Graph(build_decoder(llm, "f32"))
    found = [graph(embeds[:, :8], mask[:, :8], positions[:, :8])]
    found += [graph(embeds[:, t : t + 1], mask[:, : t + 1], positions[:, t : t + 1]) for t in range(8, 12)]
    assert error(np.stack(found, 1), expected[:, 7:]) < 1e-5
    for head, most in (("f16", 1e-3), ("int8", 2e-2)):
        assert error(Graph(build_decoder(llm, head))(embeds, mask, positions), expected[:, -1]) < most


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_padded_row_is_the_row_alone_and_beams_go_on_from_the_rows_they_name(prefix, rows):
    embeds, mask, positions = rows
    graph = Graph(build_decoder(make_llm("llama", prefix), "f32"))
    together = graph(embeds, mask, positions)
    swapped = graph(embeds[:, :1], torch.cat([mask, mask[:, :1] * 0 + 1], 1)[[1, 0]], torch.tensor([[7], [12]]),
                    np.array([1, 0], np.int32))  # fmt: skip
    graph.request.reset_state()
    alone = graph(embeds[1:, 5:], mask[1:, 5:], positions[1:, 5:])
    assert error(together[1:], alone) < 1e-5
    one_more = graph(embeds[:1, :1], torch.ones(1, 8, dtype=torch.long), torch.tensor([[7]]))
    assert error(swapped[:1], one_more) < 1e-5


def test_what_the_graph_has_not_is_refused_by_name():
    with pytest.raises(ValueError, match=r"whose whole is a GemmaForCausalLM, but .* Llama, Qwen2, Qwen3"):
        build_decoder(GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)))
    sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match=r"sliding_attention, but .* full attention"):
        build_decoder(Qwen2ForCausalLM(sliding))
    narrow = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 96, "num_attention_heads": 6}))
    quantize_4bit_(narrow)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj has 96 inputs .* blocks of 64"):
        build_decoder(narrow)
