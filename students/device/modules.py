"""Ears and connector of a student as modules of plain tensors, for programs that compute graphs. Knows none of them.

Shapes: B batch, M mel bins, X mel frames, R encoder frames, E encoder width, W windows, Q queries a window, D LLM
width.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.ears.lora import merge_ear_lora
from teachers.salmonn import Salmonn


class Piece(NamedTuple):
    """One module with all that a graph of it needs to know."""

    name: str  # "whisper", "second" or "connector"
    module: nn.Module
    inputs: dict[str, Tensor]  # examples, by the inputs' names
    shapes: list[tuple[int, ...]]  # of each input; -1: any
    output: str  # its name


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

    def __init__(self, ear: nn.Module):
        super().__init__()
        self.ear = ear

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        return self.ear.encode(mel, lengths)[0][:, self.ear.num_tokens_first :].float()


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


def list_pieces(model: Salmonn) -> Iterator[Piece]:
    """The encoders, LoRA merged, and the connector of a model, in the order in which they hear."""
    whisper, widths = merge_ear_lora(model.whisper), [model.whisper.width]
    mel = torch.zeros(2, whisper.log_mel.num_mels, whisper.log_mel.num_frames)
    yield Piece("whisper", WhisperGraph(whisper), {"mel": mel}, [(-1, mel.shape[1], -1)], "frames")
    if model.second is not None:
        check_second(model.second)
        inputs = {"mel": torch.zeros(2, 160, 128), "lengths": torch.tensor([160, 130])}
        yield Piece("second", SecondGraph(model.second), inputs, [(-1, -1, 128), (-1,)], "frames")
        widths.append(model.second.width)
    size = model.qformer.window_frames or 50
    windows = {name: torch.ones(2, size, width) for name, width in zip(("speech", "audio"), widths)}
    yield Piece("connector", ConnectorGraph(model), windows, [(-1, -1, width) for width in widths], "tokens")


def check_second(ear: nn.Module) -> None:
    """Refuse an encoder that does not say how a graph of it is fed, see `teachers.ears.encoders`.

    Raises:
        ValueError: naming it.
    """
    if not hasattr(ear, "fbank"):
        raise ValueError(
            f"second encoder of this student is {ear.title}, but a graph is fed with a filter bank of Kaldi's and it "
            f"names none; give its class `fbank`, `num_tokens_first` and `hears_started_patch`."
        )


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
