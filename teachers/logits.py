"""From the states that enter a LLM's head to its logits, with what its config does to them after the product."""

import torch
from torch import Tensor, nn


def logit_transform(config) -> dict[str, float | None]:
    """Soft cap and scale that a model's config asks for.

    Args:
        config: a transformers config: Gemma has `final_logit_softcapping`, Cohere `logit_scale`, Granite
            `logits_scaling` (which divides), MiniCPM `dim_model_base` (its scale is in the hidden state already).
    """
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return {"softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": scale / divisor}


def head_logits(llm: nn.Module, hidden_SD: Tensor) -> Tensor:
    """The logits that the LLM's own forward gives, float32.

    Args:
        llm: a causal LM of transformers.
        hidden_SD: the states after its last norm, any leading dimensions.
    """
    transform = logit_transform(llm.config.get_text_config())
    logits_SV = llm.get_output_embeddings()(hidden_SD).float() * transform["logit_scale"]
    softcap = transform["softcap"]
    return logits_SV if softcap is None else softcap * torch.tanh(logits_SV / softcap)
