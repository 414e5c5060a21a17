"""4-bit weights: a LLM's linear layers become NF4 with double quantisation, in place, through bitsandbytes.

Source: Dettmers et al., QLoRA, 2023 (arXiv 2305.14314).
"""

import bitsandbytes as bnb
import torch
from torch import nn


def quantize_4bit_(llm: nn.Module, *, compute_dtype: torch.dtype = torch.float32) -> None:
    """Replace every linear layer of `llm` but its head by a 4-bit one, in place; the layers stay where they are.

    The head stays whole: it is tied to the embeddings in small LLMs, and the objective reads it row by row.

    Args:
        llm: a causal LM of transformers.
        compute_dtype: of the products; float32 on a CPU, bfloat16 on a GPU.
    """
    head = llm.get_output_embeddings()
    for name, module in list(llm.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent = llm.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], to_4bit(module, compute_dtype))
    llm.is_loaded_in_4bit = True  # peft looks here before it puts LoRA on a 4-bit layer


def to_4bit(linear: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    """One linear layer as NF4 with double quantisation, on the same device."""
    small = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    small.weight = bnb.nn.Params4bit(
        linear.weight.detach().cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=small
    )
    small.bias = linear.bias
    # bitsandbytes packs the weights when they are moved to a device
    return small.to(linear.weight.device)


def dequantize(weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight in float32, read back from its 4 bits where it has those."""
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.detach().float()


def nf4_bytes(num_weights: int) -> float:
    """Bytes of so many weights in NF4 with double quantisation: 4 bits, and 0.127 bits for the scales.

    Blocks of 64 weights share an 8-bit scale; 256 of those share a float32 and all share an offset.
    """
    return num_weights * (4 + 8 / 64 + 32 / (64 * 256)) / 8
