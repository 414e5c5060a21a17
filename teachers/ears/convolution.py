"""The ears' convolutions in float32 on a CPU, whatever the ears are in.

With AMX, oneDNN's bfloat16 convolution is wrong, not merely coarse, for some shapes (torch 2.11 to 2.14: at few even
channels a group the relative error is about 1). A convolution is 2 to 6 % of an ear's time. Elsewhere nothing changes.
"""

import torch
from torch import Tensor, nn


class _InFloat32:
    """What `nn.Conv1d` and `nn.Conv2d` compute, in float32 on a CPU and given back in the type of the input."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu":
            return super()._conv_forward(input, weight, bias)
        wide = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.to(wide)
            return super()._conv_forward(input.to(wide), weight.to(wide), bias).to(input.dtype)


class Float32Conv1d(_InFloat32, nn.Conv1d):
    """See the module."""


class Float32Conv2d(_InFloat32, nn.Conv2d):
    """See the module."""


FLOAT32 = {nn.Conv1d: Float32Conv1d, nn.Conv2d: Float32Conv2d}


def convolve_in_float32_(ear: nn.Module) -> None:
    """Let every convolution of an ear be one in float32 on a CPU, in place; its weights and their names stay."""
    for module in ear.modules():
        module.__class__ = FLOAT32.get(type(module), type(module))
