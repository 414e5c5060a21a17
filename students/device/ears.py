"""Ears and connector of a student as OpenVINO graphs, converted from torch; their weights in half floats or 8 bits.

Knows no LLM.
"""

from collections.abc import Sequence

import numpy as np
import openvino as ov
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from students.device.constants import product
from students.device.modules import hushed, list_pieces
from teachers.salmonn import Salmonn

TYPES = {torch.float32: ov.Type.f32, torch.int64: ov.Type.i64}
LEAST_WEIGHTS = 4096  # a smaller matrix stays whole: 8 bits would save nothing


def convert_ears(model: Salmonn) -> dict[str, ov.Model]:
    """The graphs of a model's encoders and connector, by their names in `folder.GRAPHS`."""
    return {piece.name: convert(*piece[1:]) for piece in list_pieces(model)}


@torch.no_grad()
def convert(module: nn.Module, inputs: dict[str, Tensor], shapes: Sequence[tuple[int, ...]], output: str) -> ov.Model:
    """A module as a graph with named inputs of these shapes (-1: any) and one named output.

    OpenVINO's front end is called itself: `openvino.convert_model` reports each call to its makers.
    """
    with hushed():
        traced = torch.jit.trace(module.eval(), tuple(inputs.values()), check_trace=False)
    front_end = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=tuple(inputs.values()))  # nothing else keeps it alive
    loaded = front_end.load(decoder)
    for place, shape, example in zip(loaded.get_inputs()[-len(inputs) :], shapes, inputs.values()):
        loaded.set_partial_shape(place, ov.PartialShape(list(shape)))
        loaded.set_element_type(place, TYPES[example.dtype])
    graph = front_end.convert(loaded)
    for name, found in zip(inputs, graph.inputs):
        found.set_names({name})
    graph.outputs[0].set_names({output})
    return graph


def to_8_bits_(graph: ov.Model) -> None:
    """Store the matrices of a graph in 8 bits, a scale for each output, in place; products stay as they were."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul" or not node.get_attributes()["transpose_b"]:
            continue
        source = node.input_value(1).get_node()
        if source.get_type_name() != "Constant" or len(source.shape) != 2 or np.prod(source.shape) < LEAST_WEIGHTS:
            continue
        made = product(node.input_value(0), source.data.astype(np.float32), source.friendly_name, "int8")
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(made.output(0))
