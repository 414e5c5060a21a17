"""EAT, an encoder that can stand in BEATs' place: waveforms in, 50 frames a second out, equal to its authors' code.

Loads fairseq `.pt` files (the student's weights, never the teacher's in `_ema`) and Hugging Face folders. It has no
dropout: a frozen ear never trains. One thing differs from the original: a clip keeps its own length, rounded up to one
patch, instead of being padded to 10 s, and a batch's row equals the row alone.

Source: Chen et al. 2024, "EAT: Self-Supervised Pre-Training with Efficient Audio Transformer"; cwx-worst-one/EAT.

Shapes: B batch, N audio samples, X mel frames (10 ms), M mel bins, R encoder frames (8 frequency bands each 160 ms),
E encoder width.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.audio.augment import mask_mel_
from shards.sample import MelMask
from teachers.ears.beats import AUDIO_CLASSES
from teachers.ears.convolution import convolve_in_float32_
from teachers.ears.frontend import (
    HOP_SAMPLES,
    MAX_SAMPLES,
    WINDOW_SAMPLES,
    KaldiFbank,
    check_lengths,
)
from teachers.files.weights import (
    find_safetensors,
    load_strictly_,
    read_model_config,
    read_safetensors,
    read_torch_file,
)

EAT_FBANK = KaldiFbank(window="hanning", scale=1.0, mean=-4.268, std=2 * 4.569, removes_mean=True)
PATCH = 16  # mel frames and mel bins a patch
BANDS = EAT_FBANK.num_mels // PATCH  # encoder frames that share their 160 ms
MAX_FRAMES = -(-MAX_SAMPLES // HOP_SAMPLES // PATCH) * BANDS
NORM_EPS = 1e-6

# What every published EAT has in common and this implementation relies on, under its Hugging Face and fairseq names.
FIXED_FIELDS = {"patch_size": PATCH, "stride": PATCH, "in_chans": 1, "mel_bins": 128, "layer_norm_first": False}

RENAMED = {  # the beginnings of official names, and ours; None: not needed to hear
    "modality_encoders.IMAGE.decoder.": None,
    "modality_encoders.IMAGE.local_encoder.proj.": "patch_embedding.",
    "modality_encoders.IMAGE.context_encoder.norm.": "pre_norm.",
    "modality_encoders.IMAGE.": "",
    "local_encoder.proj.": "patch_embedding.",
    "_ema": None,
}


@dataclass(frozen=True)
class EatConfig:
    """Sizes; the defaults are those of EAT-base."""

    embed_dim: int = 768
    depth: int = 12  # layers
    num_heads: int = 12
    ffn_dim: int = 3072
    num_classes: int | None = None  # sound classes of a fine-tuned model
    head_norm_eps: float = NORM_EPS  # 1e-6 in fairseq, 1e-5 in the Hugging Face port


class EatEar(nn.Module):
    """An EAT encoder that takes waveforms; `width` is the size of its frames."""

    title = "EAT"
    shares_spectrum = False
    min_samples = WINDOW_SAMPLES
    fbank = EAT_FBANK
    features_on_meta = EAT_FBANK.features_on_meta
    num_tokens_first = 1  # the utterance's
    hears_started_patch = True

    def __init__(self, config: EatConfig):
        super().__init__()
        self.config = config
        self.width = config.embed_dim
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, PATCH, PATCH)
        self.register_buffer("positions", build_positions(MAX_FRAMES, config.embed_dim))
        self.extra_tokens = nn.Parameter(torch.randn(1, 1, config.embed_dim))
        self.pre_norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.blocks = nn.ModuleList(EatBlock(config) for _ in range(config.depth))
        if config.num_classes is not None:
            self.fc_norm = nn.LayerNorm(config.embed_dim, eps=config.head_norm_eps)
            self.head = nn.Linear(config.embed_dim, config.num_classes)
        convolve_in_float32_(self)
        self.eval()

    @classmethod
    def from_config(cls, config: EatConfig | Mapping) -> Self:
        """Build with random weights; a mapping holds fields of `EatConfig`."""
        return cls(config if isinstance(config, EatConfig) else EatConfig(**config))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load a fairseq `.pt` file or a Hugging Face folder or hub id, pre-trained or fine-tuned.

        Raises:
            ValueError: the file is cut short, holds code, or is of another architecture.
        """
        if Path(path).is_file():
            fields, weights = _read_fairseq(path)
        else:
            fields, weights = _read_hugging_face(path)
        for name, value in FIXED_FIELDS.items():
            if name in fields and fields[name] != value:
                raise ValueError(
                    f"{path} has {name} {fields[name]!r}, but every EAT has {value!r}; name an EAT checkpoint."
                )
        weights = {ours: tensor.to(dtype) for ours, tensor in convert_weights(weights)}
        config = _infer_config(fields, weights, path)
        stored_RE = weights["positions"][0, :MAX_FRAMES]
        weights["positions"] = build_positions(MAX_FRAMES, config.embed_dim).to(dtype)
        weights["positions"][: len(stored_RE)] = stored_RE
        with torch.device("meta"):
            ear = cls(config)
        load_strictly_(ear, weights, path)
        return ear

    @classmethod
    def sizes_of(cls, path: str) -> dict:
        """Those of EAT-base, as every published EAT has them."""
        return asdict(EatConfig(num_classes=AUDIO_CLASSES if "finetune" in path else None))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the model around this ear does."""
        return super().train(False)

    def forward(
        self, waveforms_BN: Tensor, num_samples_B: Tensor, masks_B: Sequence[MelMask | None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode waveforms.

        Args:
            waveforms_BN: float, 16 kHz in [-1, 1], padded with zeros.
            num_samples_B: length of each row; on CPU it costs no wait for the device.
            masks_B: what SpecAugment hides of each row; None: nothing.

        Returns:
            frames_BRE without the utterance's token, zero where a row has ended, and num_frames_B.

        Raises:
            ValueError: a row is shorter than one 25 ms frame or longer than 30 s.
        """
        self.check(num_samples_B)
        mel_BXM, num_mel_frames_B = EAT_FBANK(waveforms_BN, num_samples_B)
        if masks_B is not None:
            mask_mel_(mel_BXM.transpose(1, 2), num_mel_frames_B, masks_B)
        tokens_BRE, num_frames_B = self.encode(mel_BXM, num_mel_frames_B)
        return tokens_BRE[:, 1:], num_frames_B

    def check(self, num_samples_B: Tensor) -> None:
        """Refuse rows that this ear cannot hear, with `ValueError`."""
        check_lengths(num_samples_B, self.min_samples, MAX_SAMPLES, "EAT")

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of so many audio samples, without the utterance's token."""
        return -(-max(0, (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1) // PATCH) * BANDS

    def encode(self, mel_BXM: Tensor, num_mel_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalized features: tokens_BRE, the utterance's token first, and num_frames_B without it."""
        silence = -EAT_FBANK.mean / EAT_FBANK.std
        mel_BXM = F.pad(mel_BXM, (0, 0, 0, -mel_BXM.shape[1] % PATCH), value=silence)
        patches = self.patch_embedding(mel_BXM[:, None].to(self.patch_embedding.weight.dtype))
        frames_BRE = patches.flatten(2).transpose(1, 2)
        num_frames_B = (num_mel_frames_B + PATCH - 1) // PATCH * BANDS
        is_heard_BR = torch.arange(frames_BRE.shape[1] + 1, device=mel_BXM.device) <= num_frames_B[:, None]
        frames_BRE = frames_BRE + self.positions[: frames_BRE.shape[1]]
        tokens_BRE = torch.cat([self.extra_tokens.expand(frames_BRE.shape[0], -1, -1), frames_BRE], 1)
        tokens_BRE = self.pre_norm(tokens_BRE)
        for block in self.blocks:
            tokens_BRE = block(tokens_BRE, is_heard_BR)
        return tokens_BRE * is_heard_BR[..., None], num_frames_B

    def classify(self, tokens_BRE: Tensor) -> Tensor:
        """Probability of each of a fine-tuned model's sound classes, from the utterance's token."""
        return self.head(self.fc_norm(tokens_BRE[:, 0])).sigmoid()


class EatBlock(nn.Module):
    """Post-norm transformer block."""

    def __init__(self, config: EatConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)

    def forward(self, tokens_BRE: Tensor, is_heard_BR: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens_BRE).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heard = F.scaled_dot_product_attention(query, key, value, attn_mask=is_heard_BR[:, None, None])
        tokens_BRE = self.norm1(tokens_BRE + self.proj(heard.transpose(1, 2).flatten(2)))
        return self.norm2(tokens_BRE + self.fc2(F.gelu(self.fc1(tokens_BRE))))


def build_positions(num_frames: int, width: int) -> Tensor:
    """Sines and cosines of a frame's band (first half of the width) and of its time (second half), positions_RE."""
    rates = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    frame = torch.arange(num_frames, dtype=torch.float64)[:, None]
    band, time = (frame % BANDS) * rates, (frame // BANDS) * rates
    return torch.cat([band.sin(), band.cos(), time.sin(), time.cos()], 1).float()


def convert_weights(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Official names, fairseq's or the port's, with or without `model.` before them, to ours."""
    for name, tensor in weights.items():
        name = name.removeprefix("model.")
        old = next((old for old in RENAMED if name.startswith(old)), "")
        new = RENAMED[old] if old else ""
        if new is not None:
            name = new + name.removeprefix(old)
            name = name.replace("fixed_positional_encoder.", "").replace(".attn.", ".").replace(".mlp.", ".")
            yield name, tensor


def _read_fairseq(path: str | Path) -> tuple[dict, dict]:
    """The model's settings and weights."""
    content = read_torch_file(path)
    fields = _find_settings(content["cfg"]) if "cfg" in content else None
    if fields is None or "model" not in content:
        raise ValueError(
            f"{path} has no cfg with num_heads or no model, but a fairseq file of EAT has both; name an EAT one."
        )
    return {**fields, "head_norm_eps": 1e-6}, content["model"]


def _find_settings(cfg: object) -> dict | None:
    """The settings that hold `num_heads`; a fine-tuned file keeps those of its pre-training deep inside its own."""
    cfg = vars(cfg) if isinstance(cfg, argparse.Namespace) else cfg
    if not isinstance(cfg, dict):
        return None
    if "num_heads" in cfg:
        return cfg
    found = (_find_settings(value) for value in cfg.values())
    return next((fields for fields in found if fields is not None), None)


def _read_hugging_face(path: str | Path) -> tuple[dict, dict]:
    fields = read_model_config(path, "eat")
    weights = {}
    for file in find_safetensors(path):
        weights |= read_safetensors(file, ("",), torch.float32)
    return {**fields, "head_norm_eps": 1e-5}, weights


def _infer_config(fields: Mapping, weights: Mapping[str, Tensor], path: str | Path) -> EatConfig:
    """Sizes out of the tensors, as a fine-tuned file repeats few of them in its settings."""
    needed = ["positions", "pre_norm.weight", "blocks.0.fc1.weight"]
    missing = [name for name in needed if name not in weights] + [name for name in ["num_heads"] if name not in fields]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}, but every EAT has; name an EAT checkpoint.")
    return EatConfig(
        embed_dim=len(weights["pre_norm.weight"]),
        depth=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        num_heads=fields["num_heads"],
        ffn_dim=len(weights["blocks.0.fc1.weight"]),
        num_classes=len(weights["head.bias"]) if "head.bias" in weights else None,
        head_norm_eps=fields["head_norm_eps"],
    )
