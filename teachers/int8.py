"""Weights in fewer bits: linear layers and embeddings in int8 with a scale a row, or in bfloat16; products are as wide
as what enters. Of ears, of a teacher's LLM, and of the head and embeddings of a LLM that only answers; `quantize.py`
knows 4 bits.

Nothing here trains these weights, but gradients pass through a layer to what is before it.

Shapes: O rows (outputs, or tokens), I columns (inputs, or the LLM's width), S positions.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = ("bf16", "int8")
FEW_ROWS = 8  # up to so many positions a CPU reads int8 as it multiplies; for more it is widened first


def to_rows(weight_OI: Tensor, bits: str) -> tuple[Tensor, Tensor | None]:
    """A matrix in `bits`, and the scale of each of its rows, float32; None for bfloat16, which needs none."""
    weight_OI = weight_OI.detach()
    if bits == "bf16":
        return weight_OI.to(torch.bfloat16), None
    scale_O = weight_OI.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight_OI.float() / scale_O[:, None]).round().to(torch.int8), scale_O


def int8_bytes(num_rows: int, num_columns: int) -> int:
    """Of a matrix, with its rows' scales."""
    return num_rows * (num_columns + 4)


class Rows(nn.Module):
    """A frozen matrix in fewer bits, under the names that a layer's weight and bias have."""

    def __init__(self, weight_OI: Tensor, bits: str):
        super().__init__()
        weight_OI, scale_O = to_rows(weight_OI, bits)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.register_parameter("scale", None if scale_O is None else nn.Parameter(scale_O, requires_grad=False))

    def _apply(self, fn, recurse=True):
        """Move with the model; scales stay in float32 where the rest is rounded, as each moves a whole row."""
        kept = None if self.scale is None else self.scale.data
        super()._apply(fn, recurse)
        if kept is not None and not self.scale.is_meta:
            self.scale.data = kept.to(self.weight.device)
        return self


class RowLinear(Rows):
    """A linear layer: each output is a row's product times its scale.

    Args:
        linear: the layer.
        bits: one of `BITS`.
        fast: on a CPU a few rows are rounded to bfloat16 for their product, many are not. Without, all are alike.
    """

    def __init__(self, linear: nn.Linear, bits: str, *, fast: bool = True):
        super().__init__(linear.weight, bits)
        self.fast = fast
        self.bias, (self.out_features, self.in_features) = linear.bias, linear.weight.shape

    def forward(self, input_SI: Tensor) -> Tensor:
        output_SO = self._multiply(input_SI)
        if self.scale is not None:
            output_SO = output_SO * self.scale.to(output_SO.dtype)
        return output_SO if self.bias is None else output_SO + self.bias.to(output_SO.dtype)

    def _multiply(self, input_SI: Tensor) -> Tensor:
        is_short = self.fast and input_SI.numel() <= FEW_ROWS * self.in_features and not input_SI.requires_grad
        if input_SI.device.type == "cpu" and is_short:  # one pass over the weights, as they lie
            if self.scale is None:
                return F.linear(input_SI.to(torch.bfloat16), self.weight).to(input_SI.dtype)
            flat_SI = input_SI.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
            ones_O = torch.ones(self.out_features, dtype=torch.bfloat16)  # the scales are to stay in float32
            output_SO = torch._weight_int8pack_mm(flat_SI, self.weight, ones_O)
            return output_SO.to(input_SI.dtype).view(*input_SI.shape[:-1], -1)
        return F.linear(input_SI, self.weight.to(input_SI.dtype))


class RowEmbedding(Rows):
    """An embedding whose rows come out in the type that it had before."""

    def __init__(self, embedding: nn.Embedding, bits: str):
        super().__init__(embedding.weight, bits)
        (self.num_embeddings, self.embedding_dim), self.dtype = embedding.weight.shape, embedding.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight).to(self.dtype)
        return rows if self.scale is None else rows * F.embedding(ids, self.scale[:, None]).to(self.dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and no more: one that holds few bits or routes tokens has another forward."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def narrow_linears_(module: nn.Module, bits: str, *, but: Collection[nn.Module] = (), fast: bool = True) -> None:
    """Replace the linear layers inside a module, in place; convolutions and norms stay whole.

    Args:
        module: such as an ear.
        bits: one of `BITS`.
        but: layers that stay whole too.
        fast: see `RowLinear`.
    """
    for name, layer in list(module.named_modules()):
        if is_linear(layer) and layer not in but:
            module.set_submodule(name, RowLinear(layer, bits, fast=fast))


def narrow_llm_(llm: nn.Module, bits: str) -> None:
    """Replace every linear layer of a LLM that gives targets, in place, but its head and LoRA.

    What it says of an answer is the same token by token and at once. Experts that are one tensor stay whole.

    Args:
        llm: a causal LM of transformers.
        bits: one of `BITS`.
    """
    lora = [layer for name, layer in llm.named_modules() if "lora_" in name]
    narrow_linears_(llm, bits, but={llm.get_output_embeddings(), *lora}, fast=False)


def narrow_head_(llm: nn.Module, bits: str) -> None:
    """Put a LLM's head and embeddings in fewer bits, in place; tied ones stay one matrix. For answers alone.

    Args:
        llm: a causal LM of transformers.
        bits: one of `BITS`.

    Raises:
        ValueError: its embeddings or its head compute more than a row or a product.
    """
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    is_plain = type(embedding).forward is nn.Embedding.forward and is_linear(head)
    if not is_plain:
        raise ValueError(
            f"head is {bits}, but {type(llm).__name__} has a {type(embedding).__name__} and a {type(head).__name__}, "
            f"and only plain ones have fewer bits here; set head='whole'."
        )
    is_tied = head.weight is embedding.weight
    small, small_head = RowEmbedding(embedding, bits), RowLinear(head, bits)
    if is_tied:
        small_head.weight, small_head.scale = small.weight, small.scale
    llm.set_input_embeddings(small)
    llm.set_output_embeddings(small_head)
