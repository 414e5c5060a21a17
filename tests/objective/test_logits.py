"""Logits from hidden states are those of the LLM's own forward, whatever its config does to them."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from teachers.logits import head_logits, logit_transform

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
LLMS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "gemma, soft cap": (Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "granite, divided": (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=8.0)),
    "cohere, multiplied": (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25)),
}


@pytest.mark.parametrize("name", LLMS)
def test_logits_are_those_of_the_llms_own_forward(name):
    kind, config = LLMS[name]
    torch.manual_seed(0)
    llm, ids = kind(config).eval(), torch.tensor([[3, 7, 5]])
    with torch.no_grad():
        torch.testing.assert_close(head_logits(llm, llm.model(ids).last_hidden_state), llm(ids).logits)


def test_the_transform_of_a_config_is_what_its_model_does_to_the_logits():
    assert logit_transform(LlamaConfig()) == {"softcap": None, "logit_scale": 1.0}
    assert logit_transform(Gemma2Config(final_logit_softcapping=30.0)) == {"softcap": 30.0, "logit_scale": 1.0}
    assert logit_transform(GraniteConfig(logits_scaling=8.0)) == {"softcap": None, "logit_scale": 0.125}
