"""Whisper's encoder as an ear: waveforms in, frames out. The layers are transformers', the log-mel features ours.

Knows nothing of Whisper's decoder and never loads it.

Shapes: B batch, N audio samples, M mel bins, X mel frames (10 ms), R encoder frames (20 ms), E encoder width.
"""

import json
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import cached_file

from teachers.frontend import HOP_SAMPLES, WhisperLogMel, check_lengths

FRAME_SAMPLES = 2 * HOP_SAMPLES  # the second convolution halves the mel frames
WEIGHT_PREFIXES = ("model.encoder.", "encoder.")  # of a WhisperForConditionalGeneration and of a WhisperModel


class WhisperEar(nn.Module):
    """A Whisper encoder that takes waveforms; always in eval mode, as layer drop would skip layers of a frozen ear."""

    def __init__(self, encoder: WhisperEncoder):
        super().__init__()
        config = encoder.config
        self.encoder = encoder.eval()
        self.log_mel = WhisperLogMel(config.num_mel_bins, 2 * config.max_source_positions)
        self.width = config.d_model
        self.max_samples = config.max_source_positions * FRAME_SAMPLES

    @classmethod
    def from_config(cls, config: WhisperConfig | dict) -> Self:
        """Build with random weights; a dictionary holds the fields of a `WhisperConfig`."""
        return cls(WhisperEncoder(config if isinstance(config, WhisperConfig) else WhisperConfig(**config)))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, num_mels: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load the encoder's weights of a Hugging Face Whisper folder or hub id; no other tensor is read.

        Args:
            path: folder or hub id that holds `config.json` and safetensors weights.
            num_mels: mel bins that the caller expects (80 up to large-v2, 128 for large-v3 and turbo); None: any.
            dtype: of the weights in memory.

        Raises:
            ValueError: not a Whisper, another number of mel bins, a damaged file, missing or misshapen tensors.
        """
        config = _load_config(path, num_mels)
        with torch.device("meta"):
            encoder = WhisperEncoder(config)
        weights = {}
        for file in _find_weight_files(path):
            weights |= _read_encoder_weights(file, dtype)
        try:
            encoder.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{path} holds {len(weights)} encoder tensors, but its config.json describes another encoder; "
                f"use the weights and the config of one model."
            ) from error
        encoder.embed_positions.requires_grad_(False)
        return cls(encoder)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the model around this ear does."""
        return super().train(False)

    def forward(self, waveforms_BN: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Encode waveforms, padded to the encoder's full length as Whisper was trained.

        Args:
            waveforms_BN: float, 16 kHz in [-1, 1], padded with zeros.
            num_samples_B: length of each row.

        Returns:
            frames_BRE with R = max_source_positions, and num_frames_B: how many of them hold audio.

        Raises:
            ValueError: a row is empty or longer than the encoder hears.
        """
        check_lengths(num_samples_B, 1, self.max_samples, "this Whisper")
        num_frames_B = (num_samples_B.to(waveforms_BN.device) + FRAME_SAMPLES - 1) // FRAME_SAMPLES
        return self.encode(self.log_mel(waveforms_BN)), num_frames_B

    def encode(self, mel_BMX: Tensor) -> Tensor:
        """Encode log-mel features of the full length, frames_BRE."""
        return self.encoder(mel_BMX.to(self.encoder.conv1.weight.dtype)).last_hidden_state


def _load_config(path: str | Path, num_mels: int | None) -> WhisperConfig:
    file = cached_file(path, "config.json")
    fields = json.loads(Path(file).read_text())
    if fields["model_type"] != "whisper":
        raise ValueError(
            f"{file} has model_type {fields['model_type']!r}, but a Whisper is needed; name a Whisper folder."
        )
    config = WhisperConfig.from_dict(fields)
    if num_mels not in (None, config.num_mel_bins):
        raise ValueError(
            f"{file} has num_mel_bins {config.num_mel_bins}, but num_mels is {num_mels}; "
            f"large-v2 and smaller have 80, large-v3 and turbo 128: name the other model or drop num_mels."
        )
    return config


def _find_weight_files(path: str | Path) -> list[str]:
    """The safetensors files that hold encoder tensors: the only one, or those that the index names."""
    single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [single]
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise ValueError(
            f"{path} has no model.safetensors, but weights are read from safetensors only; "
            f"convert it with transformers' save_pretrained."
        )
    shard_of_key = json.loads(Path(index).read_text())["weight_map"]
    shards = {shard for key, shard in shard_of_key.items() if key.startswith(WEIGHT_PREFIXES)}
    return [cached_file(path, shard) for shard in sorted(shards)]


def _read_encoder_weights(file: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the encoder by their name inside it."""
    weights = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                prefix = next((prefix for prefix in WEIGHT_PREFIXES if key.startswith(prefix)), None)
                if prefix is not None:
                    weights[key.removeprefix(prefix)] = tensors.get_tensor(key).to(dtype)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged ({error}), but whole safetensors are needed; download it again."
        ) from error
    return weights
