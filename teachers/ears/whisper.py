"""Whisper's encoder as an ear: waveforms in, frames out. The layers are transformers', the log-mel features ours.

Knows nothing of Whisper's decoder and never loads it.

Shapes: B batch, N audio samples, M mel bins, X mel frames (10 ms), R encoder frames (20 ms), E encoder width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from shards.audio.augment import mask_mel_
from shards.sample import MelMask
from teachers.ears.convolution import convolve_in_float32_
from teachers.ears.frontend import FRAME_SAMPLES, HOP_SAMPLES, WhisperLogMel, check_lengths
from teachers.files.weights import find_safetensors, load_strictly_, read_model_config, read_safetensors

# Of a WhisperForConditionalGeneration, a WhisperModel, and Qwen2-Audio's tower, which is a Whisper encoder by weights
WEIGHT_PREFIXES = ("model.encoder.", "encoder.", "audio_tower.", "model.audio_tower.")
TOWER_TYPE = "qwen2_audio"


class WhisperEar(nn.Module):
    """A Whisper encoder that takes waveforms; always in eval mode, as layer drop would skip layers of a frozen ear."""

    title = "Whisper encoder"
    shares_spectrum = False  # it is whose spectrum is shared

    def __init__(self, encoder: WhisperEncoder):
        super().__init__()
        config = encoder.config
        self.encoder = encoder.eval()
        convolve_in_float32_(self)
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
            dtype: the data type of the weights in memory.

        Raises:
            ValueError: not a Whisper, another number of mel bins, a damaged file, missing or misshapen tensors.
        """
        config = _load_config(path, num_mels)
        with torch.device("meta"):
            encoder = WhisperEncoder(config)
        weights = {}
        for file in find_safetensors(path):
            weights |= read_safetensors(file, WEIGHT_PREFIXES, dtype)
        load_strictly_(encoder, weights, path)
        return cls(encoder)

    def features_on_meta(self, num_samples: int) -> tuple[Tensor]:
        """Empty log-mel features of one clip, of the full length whatever it lasts, as `encode` takes them."""
        return (torch.empty(1, self.log_mel.num_mels, self.log_mel.num_frames, device="meta"),)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the model around this ear does."""
        return super().train(False)

    def forward(
        self,
        waveforms_BN: Tensor,
        num_samples_B: Tensor,
        masks_B: Sequence[MelMask | None] | None = None,
        heard_B: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode waveforms, padded to the encoder's full length as Whisper was trained, or cut.

        Args:
            waveforms_BN: float, 16 kHz in [-1, 1], padded with zeros.
            num_samples_B: length of each row.
            masks_B: what SpecAugment hides of each row; None: nothing.
            heard_B: frames that each row is cut to; None: none is, and R = max_source_positions.

        Returns:
            frames_BRE, and num_frames_B: how many of them hold audio.

        Raises:
            ValueError: a row is empty or longer than the encoder hears.
        """
        self.check(num_samples_B)
        num_frames_B = (num_samples_B.to(waveforms_BN.device) + FRAME_SAMPLES - 1) // FRAME_SAMPLES
        return self.encode(self.mel(waveforms_BN, num_samples_B, masks_B), heard_B), num_frames_B

    def mel(self, waveforms_BN: Tensor, num_samples_B: Tensor, masks_B: Sequence[MelMask | None] | None) -> Tensor:
        """Log-mel features of the full length with parts hidden, mel_BMX."""
        mel_BMX = self.log_mel(waveforms_BN, num_samples_B)
        if masks_B is not None:
            mask_mel_(mel_BMX, (num_samples_B + HOP_SAMPLES - 1) // HOP_SAMPLES, masks_B)
        return mel_BMX

    def check(self, num_samples_B: Tensor) -> None:
        """Refuse rows that this ear cannot hear, with `ValueError`."""
        check_lengths(num_samples_B, 1, self.max_samples, "this Whisper")

    def encode(self, mel_BMX: Tensor, heard_B: Sequence[int] | None = None) -> Tensor:
        """Encode log-mel features of the full length, frames_BRE; of each row as many frames as `heard_B` says."""
        mel_BMX = mel_BMX.to(self.encoder.conv1.weight.dtype)
        if heard_B is None:
            return self.encoder(mel_BMX).last_hidden_state
        return self._encode_cut(mel_BMX, heard_B)

    def _encode_cut(self, mel_BMX: Tensor, heard_B: Sequence[int]) -> Tensor:
        """As the encoder, on each row's first frames alone: zero behind them, and none looks at what is there.

        A row is encoded as it is alone: the convolutions see zeros behind it, and attention does not see what is.
        """
        encoder, length = self.encoder, max(heard_B)
        places_R = torch.arange(length, device=mel_BMX.device)
        is_heard_BR = places_R < torch.tensor(heard_B, device=mel_BMX.device)[:, None]
        mel_BMX = mel_BMX[..., : 2 * length] * is_heard_BR.repeat_interleave(2, 1)[:, None]
        frames_BER = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel_BMX))))
        frames_BRE = frames_BER.transpose(1, 2) + encoder.embed_positions.weight[:length]
        mask = None
        if min(heard_B) < length:
            mask = torch.zeros(is_heard_BR.shape, dtype=frames_BRE.dtype, device=frames_BRE.device)
            mask = mask.masked_fill(~is_heard_BR, torch.finfo(mask.dtype).min)[:, None, None]
            mask = mask.expand(-1, 1, length, -1)
        for layer in encoder.layers:
            states = layer(frames_BRE, mask)
            frames_BRE = states[0] if isinstance(states, tuple) else states
        return encoder.layer_norm(frames_BRE) * is_heard_BR[..., None]


def _load_config(path: str | Path, num_mels: int | None) -> WhisperConfig:
    config = WhisperConfig.from_dict(whisper_fields(read_model_config(path, "whisper", TOWER_TYPE)))
    if num_mels not in (None, config.num_mel_bins):
        raise ValueError(
            f"{path} has num_mel_bins {config.num_mel_bins}, but num_mels is {num_mels}; "
            f"large-v2 and smaller have 80, large-v3 and turbo 128: name the other model or drop num_mels."
        )
    return config


def whisper_fields(config: dict) -> dict:
    """A `WhisperConfig`'s fields out of a Whisper's config or of a Qwen2-Audio's, whose tower is a Whisper encoder."""
    return {**config["audio_config"], "model_type": "whisper"} if config["model_type"] == TOWER_TYPE else config


def ear_from_tower(tower: nn.Module) -> WhisperEar:
    """Qwen2-Audio's tower as an ear that shares its modules: its frames before they are averaged, normed."""
    with torch.device("meta"):
        encoder = WhisperEncoder(WhisperConfig.from_dict({**tower.config.to_dict(), "model_type": "whisper"}))
    for name, _ in list(encoder.named_children()):
        setattr(encoder, name, getattr(tower, name))
    return WhisperEar(encoder)
