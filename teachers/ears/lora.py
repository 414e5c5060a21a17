"""LoRA on Whisper's linear layers: small matrices that are trained beside weights that stay, whole or in fewer bits.

Ultravox adapts its ears so, at rank 8. Not peft's, which takes no layer in int8. Knows no LLM and no training.
Source: Hu et al., 2021 (arXiv 2106.09685).

Shapes: S positions, I columns (inputs), O rows (outputs).
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.int8 import RowLinear

SCALE = 2.0  # of the update B A: alpha is twice the rank, as in a student's LLM


class LoraLinear(nn.Module):
    """A linear layer and its update, which is nothing at the start."""

    def __init__(self, base_layer: nn.Linear | RowLinear, rank: int):
        super().__init__()
        self.base_layer, device = base_layer, base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, input_SI: Tensor) -> Tensor:
        down = F.linear(input_SI, self.lora_A.to(input_SI.dtype))
        return self.base_layer(input_SI) + SCALE * F.linear(down, self.lora_B.to(down.dtype))

    def merged(self) -> nn.Linear:
        """One layer that computes the same, in float32."""
        weight_OI, scale_O = self.base_layer.weight.float(), getattr(self.base_layer, "scale", None)
        if scale_O is not None:
            weight_OI = weight_OI * scale_O[:, None]
        linear = nn.Linear(self.base_layer.in_features, self.base_layer.out_features, device="meta")
        linear.weight = nn.Parameter(weight_OI + SCALE * self.lora_B.float() @ self.lora_A.float(), requires_grad=False)
        linear.bias = self.base_layer.bias
        return linear


def add_ear_lora_(ear: nn.Module, rank: int) -> None:
    """Put LoRA on every linear layer of an ear, in place; one that has it already stays as it is."""
    if has_lora(ear):
        return
    for name, layer in list(ear.named_modules()):
        if isinstance(layer, nn.Linear | RowLinear):
            ear.set_submodule(name, LoraLinear(layer, rank))


def has_lora(ear: nn.Module) -> bool:
    """Whether an ear's linear layers have LoRA."""
    return any(isinstance(module, LoraLinear) for module in ear.modules())


@torch.no_grad()
def merge_ear_lora(ear: nn.Module) -> nn.Module:
    """An ear that hears the same with plain layers: a copy that shares all other weights, or itself without LoRA."""
    if not has_lora(ear):
        return ear
    plain = copy_layers(ear)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, LoraLinear):
            plain.set_submodule(name, layer.merged())
    return plain


def copy_layers(ear: nn.Module) -> nn.Module:
    """A copy whose layers can be replaced: all weights inside them but LoRA's are the ear's own."""
    return copy.deepcopy(ear, {id(weight): weight for name, weight in ear.named_parameters() if "lora_" not in name})
