"""Products with weights that are constants of a graph: NF4 exactly, half floats, 8 bits.

Knows no architecture. Every constant copies its numbers: OpenVINO can share numpy's memory but does not keep it alive.

A matrix in 4 or 8 bits that has many inputs is multiplied in slices: OpenVINO unpacks all inputs of some outputs at
once, and where these do not fit the processor's cache a product takes up to 2.7 times as long.

Shapes: O outputs and I inputs of a matrix.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import numpy as np
import openvino as ov
import torch
from openvino import Node
from openvino import opset13 as op
from openvino._offline_transformations import compress_model_transformation
from torch import Tensor

from teachers.fourbit import bnb, check_unpacked

Kind = Literal["f32", "f16", "int8"]
BLOCK = 64  # weights that share a scale
SLICE = 2048  # inputs that are multiplied at once, a multiple of BLOCK


def float_constant(values: float | np.ndarray | Tensor) -> Node:
    """A constant in float32."""
    array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float32)
    return op.constant(array, ov.Type.f32, shared_memory=False)


def product(states: Node, weight: Tensor | np.ndarray, name: str, kind: Kind = "f16") -> Node:
    """States times a matrix [O, I], whose numbers lie in fewer bits: NF4 where it has it, else `kind`.

    Raises:
        ValueError: a 4-bit matrix whose inputs are no multiple of 64, or that has other blocks.
    """
    if isinstance(weight, bnb.nn.Params4bit):
        return sum_of_products(states, nf4_slices(weight, name))
    array = weight.detach().float().cpu().numpy() if isinstance(weight, Tensor) else weight
    if kind == "int8":
        return sum_of_products(states, [int8_constant(array[:, places]) for places in slices(array.shape[1])])
    if kind == "f32":
        return op.matmul(states, float_constant(array), False, True)
    return op.matmul(states, half_constant(array), False, True)


def half_constant(weight_OI: np.ndarray) -> Node:
    """A matrix in half floats, which stays so in memory where the processor multiplies with fewer bits than float32.

    Only OpenVINO's own compression marks it so; what is not marked is unfolded to float32 when a graph is compiled.
    """
    states = op.parameter([-1, weight_OI.shape[1]], ov.Type.f32)
    made = op.matmul(states, float_constant(weight_OI), False, True)
    compress_model_transformation(ov.Model([op.result(made)], [states], "halves"))
    return made.input_value(1).get_node()


def slices(inputs: int) -> list[slice]:
    """The places of a matrix's inputs that are multiplied at once."""
    return [slice(start, min(start + SLICE, inputs)) for start in range(0, inputs, SLICE)]


def sum_of_products(states: Node, weights: Sequence[Node]) -> Node:
    """States times a matrix that is given in slices of its inputs."""
    if len(weights) == 1:
        return op.matmul(states, weights[0], False, True)
    sizes = op.constant(np.array([weight.shape[1] for weight in weights]))
    parts = op.variadic_split(states, op.constant(np.int64(-1)), sizes).outputs()
    return reduce(op.add, [op.matmul(part, weight, False, True) for part, weight in zip(parts, weights)])


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


def nf4_slices(weight: Tensor, name: str) -> list[Node]:
    """bitsandbytes' codes and scales, bit by bit, in slices of the inputs.

    Raises:
        ValueError: see `product`.
    """
    check_unpacked(weight, name)
    state = weight.quant_state
    outputs, inputs = state.shape
    if inputs % BLOCK or state.blocksize != BLOCK or state.quant_type != "nf4":
        raise ValueError(
            f"{name} has {inputs} inputs in {state.quant_type} blocks of {state.blocksize}, but a device's graph takes "
            f"nf4 blocks of {BLOCK} and widths that are a multiple of it; train with another LLM, or export --merge."
        )
    packed = weight.data.flatten().cpu().view(torch.uint8).numpy().reshape(outputs, inputs // BLOCK, BLOCK // 2)
    scales = scales_of(state).cpu().numpy().reshape(outputs, inputs // BLOCK, 1)
    parts = [slice(places.start // BLOCK, places.stop // BLOCK) for places in slices(inputs)]
    return [nf4_constant(packed[:, part], scales[:, part]) for part in parts]


def nf4_constant(packed: np.ndarray, scales: np.ndarray) -> Node:
    """A matrix of bitsandbytes' bytes [O, I / 64, 32] and scales [O, I / 64, 1]."""
    outputs, blocks = scales.shape[:2]
    swapped = np.ascontiguousarray((packed >> 4) | (packed << 4))  # bitsandbytes' first value is the high half
    shape = ov.Shape([outputs, blocks, BLOCK])
    codes = op.constant(ov.Tensor(swapped, shape, ov.Type.nf4), shared_memory=False)
    whole = op.multiply(op.convert(codes, "f32"), float_constant(scales))
    return op.reshape(whole, op.constant(np.array([outputs, blocks * BLOCK])), special_zero=False)


def scales_of(state) -> Tensor:
    """A block's scales in float32, whether they are themselves quantized or not."""
    if not state.nested:
        return state.absmax.float()
    return (bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
