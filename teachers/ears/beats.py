"""BEATs, the audio encoder of SALMONN: waveforms in, 50 frames a second out, equal to its authors' code.

Loads the official `{"cfg", "model"}` files. It has no dropout and no layer drop: a frozen ear never trains. One thing
differs from the original: its padding mask is exact, so that a batch's row equals the row alone.

Source: Chen et al. 2022, "BEATs: Audio Pre-Training with Acoustic Tokenizers"; microsoft/unilm, folder beats.

Shapes: B batch, N audio samples, X mel frames (10 ms), M mel bins, R encoder frames (8 frequency bands each 160 ms),
E encoder width, H attention heads.
"""

import argparse
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.audio.augment import mask_mel_
from shards.sample import MelMask
from teachers.ears.convolution import convolve_in_float32_
from teachers.ears.frontend import (
    HOP_SAMPLES,
    MAX_SAMPLES,
    WINDOW_SAMPLES,
    KaldiFbank,
    check_lengths,
)
from teachers.files.weights import load_strictly_, read_torch_file

AUDIO_CLASSES = 527  # AudioSet's, of every fine-tuned BEATs and EAT
BEATS_FBANK = KaldiFbank(window="povey", scale=2.0**15, mean=15.41663, std=2 * 6.55582, removes_mean=False)
PATCH = 16  # mel frames and mel bins a patch
BANDS = BEATS_FBANK.num_mels // PATCH  # encoder frames that share their 160 ms
MIN_SAMPLES = WINDOW_SAMPLES + (PATCH - 1) * HOP_SAMPLES  # one patch

# What all 15 official files have in common and this implementation relies on.
FIXED_CFG = {
    "input_patch_size": PATCH,
    "conv_bias": False,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}


@dataclass(frozen=True)
class BeatsConfig:
    """Sizes, under their official names; the defaults are those of every official file."""

    embed_dim: int = 512  # width of a patch
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_layers: int = 12
    encoder_attention_heads: int = 12
    conv_pos: int = 128  # frames that the positional convolution sees
    conv_pos_groups: int = 16
    num_buckets: int = 320  # of relative positions
    max_distance: int = 800  # frames; farther ones share a bucket
    predictor_class: int | None = None  # sound classes of a fine-tuned model


class BeatsEar(nn.Module):
    """A BEATs encoder that takes waveforms; `width` is the size of its frames."""

    title = "BEATs"
    shares_spectrum = True  # its filter bank can be laid over Whisper's power spectrum, see `one_frontend`
    min_samples = MIN_SAMPLES
    fbank = BEATS_FBANK
    features_on_meta = BEATS_FBANK.features_on_meta
    num_tokens_first = 0
    hears_started_patch = False

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width = config.encoder_embed_dim
        self.config = config
        self.width = width
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, PATCH, PATCH, bias=False)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        is_projected = config.embed_dim != width
        self.post_extract_proj = nn.Linear(config.embed_dim, width) if is_projected else nn.Identity()
        self.encoder = BeatsEncoder(config)
        self.predictor = None if config.predictor_class is None else nn.Linear(width, config.predictor_class)
        convolve_in_float32_(self)
        self.eval()

    @classmethod
    def from_config(cls, config: BeatsConfig | Mapping) -> Self:
        """Build with random weights; a mapping holds fields of `BeatsConfig`."""
        return cls(config if isinstance(config, BeatsConfig) else BeatsConfig(**config))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load an official file, pre-trained or fine-tuned.

        Raises:
            ValueError: the file is cut short, holds code, or is of another architecture.
        """
        content = read_torch_file(path)
        if not {"cfg", "model"} <= content.keys():
            raise ValueError(
                f"{path} holds {', '.join(map(str, sorted(content)[:5])) or 'nothing'}, but a BEATs file holds cfg and "
                f"model; name an official BEATs checkpoint."
            )
        with torch.device("meta"):
            ear = cls(read_cfg(content["cfg"], path))
        weights = {name: tensor.to(dtype) for name, tensor in convert_weights(content["model"], path).items()}
        load_strictly_(ear, weights, path)
        return ear

    @classmethod
    def sizes_of(cls, path: str) -> dict:
        """The file's own sizes where it is here, else those of the official file of its name."""
        if Path(path).is_file():
            return asdict(read_cfg(read_torch_file(path, device="meta")["cfg"], path))
        return asdict(BeatsConfig(predictor_class=AUDIO_CLASSES if "finetune" in path else None))

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
            frames_BRE, zero where a row has ended, and num_frames_B.

        Raises:
            ValueError: a row is shorter than one patch or longer than 30 s.
        """
        self.check(num_samples_B)
        mel_BXM, num_mel_frames_B = BEATS_FBANK(waveforms_BN, num_samples_B)
        if masks_B is not None:
            mask_mel_(mel_BXM.transpose(1, 2), num_mel_frames_B, masks_B)
        return self.encode(mel_BXM, num_mel_frames_B)

    def check(self, num_samples_B: Tensor) -> None:
        """Refuse rows that this ear cannot hear, with `ValueError`."""
        check_lengths(num_samples_B, self.min_samples, MAX_SAMPLES, "BEATs")

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of so many audio samples."""
        return max(0, (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1) // PATCH * BANDS

    def encode(self, mel_BXM: Tensor, num_mel_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalized filter bank features, frames_BRE and num_frames_B."""
        frames_BRE = self.embed(mel_BXM)
        num_frames_B = num_mel_frames_B // PATCH * BANDS
        is_padding_BR = torch.arange(frames_BRE.shape[1], device=frames_BRE.device) >= num_frames_B[:, None]
        return self.encoder(self.post_extract_proj(frames_BRE), is_padding_BR), num_frames_B

    def embed(self, mel_BXM: Tensor) -> Tensor:
        """Normalized patches in time order, the bands of one time side by side; a started patch is dropped."""
        patches = self.patch_embedding(mel_BXM[:, None].to(self.patch_embedding.weight.dtype))
        return self.layer_norm(patches.flatten(2).transpose(1, 2))

    def classify(self, frames_BRE: Tensor, num_frames_B: Tensor) -> Tensor:
        """Probability of each of a fine-tuned model's sound classes, from the mean over a row's frames."""
        is_heard_BR = torch.arange(frames_BRE.shape[1], device=frames_BRE.device) < num_frames_B[:, None]
        logits = self.predictor(frames_BRE) * is_heard_BR[..., None]
        return (logits.sum(1) / num_frames_B[:, None]).sigmoid()


class BeatsEncoder(nn.Module):
    """Positional convolution and transformer layers that share one table of relative positions."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width = config.encoder_embed_dim
        self.config = config
        self.pos_conv = nn.Conv1d(
            width, width, config.conv_pos, padding=config.conv_pos // 2, groups=config.conv_pos_groups
        )
        self.layer_norm = nn.LayerNorm(width)
        self.relative_attention_bias = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        self.layers = nn.ModuleList(BeatsLayer(config) for _ in range(config.encoder_layers))

    def forward(self, frames_BRE: Tensor, is_padding_BR: Tensor) -> Tensor:
        frames_BRE = frames_BRE.masked_fill(is_padding_BR[..., None], 0.0)
        # An even kernel gives one step too many; the original drops the last.
        positions_BRE = self.pos_conv(frames_BRE.transpose(1, 2))[..., : frames_BRE.shape[1]].transpose(1, 2)
        frames_BRE = self.layer_norm(frames_BRE + F.gelu(positions_BRE))
        bias_HRR = self.position_bias(frames_BRE.shape[1])
        for layer in self.layers:
            frames_BRE = layer(frames_BRE, bias_HRR, is_padding_BR)
        return frames_BRE.masked_fill(is_padding_BR[..., None], 0.0)

    def position_bias(self, num_frames: int) -> Tensor:
        """Bias of each head for each query (rows) and key (columns), before gating."""
        table = self.relative_attention_bias.weight
        offsets = torch.arange(1 - num_frames, num_frames, device=table.device)
        bias_HO = table[bucket_positions(offsets, self.config.num_buckets, self.config.max_distance)].T
        places_R = torch.arange(num_frames, device=table.device)
        places_RR = places_R - places_R[:, None] + num_frames - 1  # `unfold` would do, but has no ONNX of every length
        return bias_HO.index_select(1, places_RR.flatten()).unflatten(1, places_RR.shape)


class BeatsLayer(nn.Module):
    """Post-norm transformer layer with DeepNorm's scaled residuals (Wang et al. 2022)."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width = config.encoder_embed_dim
        self.residual_scale = (2 * config.encoder_layers) ** 0.25
        self.self_attn = GatedAttention(width, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, frames_BRE: Tensor, bias_HRR: Tensor, is_padding_BR: Tensor) -> Tensor:
        heard_BRE = self.self_attn(frames_BRE, bias_HRR, is_padding_BR)
        frames_BRE = self.self_attn_layer_norm(frames_BRE * self.residual_scale + heard_BRE)
        return self.final_layer_norm(frames_BRE * self.residual_scale + self.fc2(F.gelu(self.fc1(frames_BRE))))


class GatedAttention(nn.Module):
    """Self-attention whose position bias each query scales by a gate read from the query itself."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.grep_linear = nn.Linear(width // num_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def forward(self, frames_BRE: Tensor, bias_HRR: Tensor, is_padding_BR: Tensor) -> Tensor:
        query, key, value = (
            project(frames_BRE).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias_BHRR = self.gate(query) * bias_HRR
        bias_BHRR.masked_fill_(is_padding_BR[:, None, None], -math.inf)
        heard = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_BHRR)
        return self.out_proj(heard.transpose(1, 2).flatten(2))

    def gate(self, query: Tensor) -> Tensor:
        """Scale of the position bias for each head and query, the gated recurrent form of WavLM."""
        reset, update = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1).sigmoid().split(1, -1)
        return reset * (update * self.grep_a - 1.0) + 2.0


def bucket_positions(offsets: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """T5's bidirectional buckets of key minus query: a quarter of them exact on each side, then logarithmic."""
    one_sided = num_buckets // 2
    num_exact = one_sided // 2
    distances = offsets.abs()
    scale = (one_sided - num_exact) / math.log(max_distance / num_exact)
    far = num_exact + ((distances.float() / num_exact).log() * scale).clamp(min=0).long()
    near_or_far = torch.where(distances < num_exact, distances, far.clamp(max=one_sided - 1))
    return near_or_far + one_sided * (offsets > 0)


def read_cfg(cfg: Mapping, path: str | Path) -> BeatsConfig:
    """Sizes out of a file's cfg.

    Raises:
        ValueError: a size is missing, or the cfg asks for what no official BEATs has.
    """
    cfg = vars(cfg) if isinstance(cfg, (argparse.Namespace, types.SimpleNamespace)) else cfg
    sizes = [field.name for field in fields(BeatsConfig) if field.name != "predictor_class"]
    for name in [*FIXED_CFG, *sizes]:
        if name not in cfg:
            raise ValueError(f"{path} has a cfg without {name}, but every BEATs file has it; name a BEATs checkpoint.")
        if name in FIXED_CFG and cfg[name] != FIXED_CFG[name]:
            raise ValueError(
                f"{path} has {name} {cfg[name]!r}, but every official BEATs has {FIXED_CFG[name]!r}; "
                f"name a BEATs checkpoint."
            )
    # vars() of the original's config names 527 classes for any model; finetuned_model says whether it has them
    if "predictor_class" in cfg and ("finetuned_model" not in cfg or cfg["finetuned_model"]):
        sizes.append("predictor_class")
    return BeatsConfig(**{name: cfg[name] for name in sizes})


def convert_weights(weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Official names to ours: the weight norm of the convolution folded, the shared table of positions once."""
    weights = dict(weights)
    gain, direction = (weights.pop(f"encoder.pos_conv.0.weight_{part}", None) for part in "gv")
    if gain is None or direction is None or "encoder.pos_conv.0.bias" not in weights:
        raise ValueError(f"{path} has no weight-normed encoder.pos_conv.0, but BEATs has; name a BEATs checkpoint.")
    weights["encoder.pos_conv.weight"] = gain * direction / direction.norm(dim=(0, 1), keepdim=True)
    weights["encoder.pos_conv.bias"] = weights.pop("encoder.pos_conv.0.bias")
    tables = [name for name in weights if name.endswith("self_attn.relative_attention_bias.weight")]
    for name in tables:
        table = weights.pop(name)
        shared = weights.setdefault("encoder.relative_attention_bias.weight", table)
        if not torch.equal(shared, table):
            raise ValueError(f"{path} has its own {name}, but all layers of BEATs share one; name a BEATs checkpoint.")
    return weights
