"""Weights as constants of an OpenVINO graph: NF4 exactly as bitsandbytes holds it, half floats, or 8 bits a row.

Knows no architecture. Every constant copies its numbers: OpenVINO can share numpy's memory but does not keep it alive.

Shapes: O outputs and I inputs of a matrix.
"""

from typing import Literal

import numpy as np
import openvino as ov
import torch
from openvino import Node
from openvino import opset13 as op
from torch import Tensor

from teachers.fourbit import bnb, check_unpacked

Kind = Literal["f32", "f16", "int8"]
BLOCK = 64  # weights that share a scale


def float_constant(values: float | np.ndarray | Tensor) -> Node:
    """A constant in float32."""
    array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float32)
    return op.constant(array, ov.Type.f32, shared_memory=False)


def weight_constant(weight: Tensor, name: str, kind: Kind = "f16") -> Node:
    """A matrix as a float32 value of the graph that lies in fewer bits: NF4 where it has it, else `kind`.

    Raises:
        ValueError: a 4-bit matrix whose inputs are no multiple of 64, or that has other blocks.
    """
    if isinstance(weight, bnb.nn.Params4bit):
        return nf4_constant(weight, name)
    array = weight.detach().float().cpu().numpy()
    if kind == "f32":
        return float_constant(array)
    if kind == "int8":
        return int8_constant(array)
    return op.convert(op.constant(array.astype(np.float16), ov.Type.f16, shared_memory=False), "f32")


def int8_constant(weight_OI: np.ndarray) -> Node:
    """A matrix in 8 bits, each row with its scale."""
    codes, scales = to_int8(weight_OI)
    whole = op.convert(op.constant(codes, ov.Type.i8, shared_memory=False), "f32")
    return op.multiply(whole, float_constant(scales))


def to_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and a scale for each place of the first dimension."""
    rest = tuple(range(1, weight.ndim))
    scales = np.abs(weight).max(axis=rest, keepdims=True) / 127
    scales = np.where(scales == 0, 1.0, scales).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def nf4_constant(weight: Tensor, name: str) -> Node:
    """bitsandbytes' codes and scales, bit by bit.

    Raises:
        ValueError: see `weight_constant`.
    """
    check_unpacked(weight, name)
    state = weight.quant_state
    outputs, inputs = state.shape
    if inputs % BLOCK or state.blocksize != BLOCK or state.quant_type != "nf4":
        raise ValueError(
            f"{name} has {inputs} inputs in {state.quant_type} blocks of {state.blocksize}, but a device's graph takes "
            f"nf4 blocks of {BLOCK} and widths that are a multiple of it; train with another LLM, or export --merge."
        )
    shape = [outputs, inputs // BLOCK, BLOCK]
    packed = weight.data.flatten().cpu().view(torch.uint8).numpy()
    swapped = (packed >> 4) | (packed << 4)  # bitsandbytes' first value is the high half
    codes = op.constant(ov.Tensor(swapped, ov.Shape(shape), ov.Type.nf4), shared_memory=False)
    scales = scales_of(state).cpu().numpy().reshape(*shape[:2], 1)
    whole = op.multiply(op.convert(codes, "f32"), float_constant(scales))
    return op.reshape(whole, op.constant(np.array([outputs, inputs])), special_zero=False)


def scales_of(state) -> Tensor:
    """A block's scales in float32, whether they are themselves quantized or not."""
    if not state.nested:
        return state.absmax.float()
    return (bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
