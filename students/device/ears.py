"""Ears and connector of a student as OpenVINO graphs, converted from torch; their weights in half floats or 8 bits.

Knows no LLM. Shapes: B batch, M mel bins, X mel frames, R encoder frames, E encoder width, W windows, Q queries a
window, D LLM width.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import openvino as ov
import torch
import torch.nn.functional as F
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from students.device.constants import product
from teachers.salmonn import Salmonn

TYPES = {torch.float32: ov.Type.f32, torch.int64: ov.Type.i64}
LEAST_WEIGHTS = 4096  # a smaller matrix stays whole: 8 bits would save nothing


class WhisperGraph(nn.Module):
    """mel [B, M, X] to frames [B, R, E], of the full length or of any shorter one, as `WhisperEar` hears a cut clip."""

    def __init__(self, ear: nn.Module):
        super().__init__()
        self.encoder = ear.encoder

    def forward(self, mel: Tensor) -> Tensor:
        encoder = self.encoder
        frames_BRE = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
        frames_BRE = frames_BRE + encoder.embed_positions.weight[: frames_BRE.shape[1]]
        for layer in encoder.layers:
            states = layer(frames_BRE, None)
            frames_BRE = states[0] if isinstance(states, tuple) else states
        return encoder.layer_norm(frames_BRE).float()


class SecondGraph(nn.Module):
    """mel [B, X, M] and lengths [B] to frames [B, R, E], zero where a row has ended."""

    def __init__(self, ear: nn.Module, first: int):
        super().__init__()
        self.ear, self.first = ear, first

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        return self.ear.encode(mel, lengths)[0][:, self.first :].float()


class ConnectorGraph(nn.Module):
    """Windows of frames [W, R, E] of each encoder to tokens [W, Q, D]; a frame of zeros is one that is not there."""

    def __init__(self, model: Salmonn):
        super().__init__()
        self.norms = nn.ModuleList(norm for norm in (model.ln_speech, model.ln_audio) if norm is not None)
        self.query, self.qformer, self.project = model.qformer.query, model.qformer.qformer, model.project

    def forward(self, *windows: Tensor) -> Tensor:
        heard = [norm(x) * (x != 0).any(-1, keepdim=True) for norm, x in zip(self.norms, windows)]
        query = self.query.expand(heard[0].shape[0], -1, -1)
        states = self.qformer(
            query_embeds=query, encoder_hidden_states=torch.cat(heard, -1), return_dict=True
        ).last_hidden_state
        return self.project(states.to(self.project.weight.dtype)).float()


def convert_ears(model: Salmonn) -> dict[str, ov.Model]:
    """The graphs of a model's encoders and connector, by their names in `folder.GRAPHS`."""
    whisper, widths = model.whisper, [model.whisper.width]
    mel = torch.zeros(2, whisper.log_mel.num_mels, whisper.log_mel.num_frames)
    graphs = {"whisper": convert(WhisperGraph(whisper), {"mel": mel}, [(-1, mel.shape[1], -1)], "frames")}
    if model.second is not None:
        first = 1 if model.config.second_kind == "eat" else 0  # EAT's token of the utterance
        inputs = {"mel": torch.zeros(2, 160, 128), "lengths": torch.tensor([160, 130])}
        graphs["second"] = convert(SecondGraph(model.second, first), inputs, [(-1, -1, 128), (-1,)], "frames")
        widths.append(model.second.width)
    size = model.qformer.window_frames or 50
    windows = {name: torch.ones(2, size, width) for name, width in zip(("speech", "audio"), widths)}
    graphs["connector"] = convert(ConnectorGraph(model), windows, [(-1, -1, width) for width in widths], "tokens")
    return graphs


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


@contextmanager
def hushed() -> Iterator[None]:
    """Without what tracing says: that sizes are checked in Python, and that a Q-Former has no loss."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


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
