"""The window-level Q-Former of SALMONN: each window of encoder frames becomes a few query vectors.

Knows nothing of audio or of the LLM. Shapes: B batch, R frames, E width, W windows, Q queries a window.
Source: SALMONN (Tang et al., 2024, arXiv 2310.13289), window-level Q-Former; `Blip2QFormerModel` is the same network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class WindowQFormer(nn.Module):
    """Cuts frames into windows and lets `num_queries` learned queries read each of them.

    Args:
        encoder_width: width of the frames that are read.
        width, num_layers, num_heads, ffn_width: sizes of the transformer.
        num_queries: vectors a window gives.
        window_frames, stride_frames: length and step of a window, in frames; 0 and 0 make one window of all frames.
        dropout: the dropout rate of the transformer, in training.
    """

    def __init__(
        self,
        encoder_width: int,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        ffn_width: int,
        num_queries: int,
        window_frames: int,
        stride_frames: int,
        dropout: float,
    ):
        super().__init__()
        self.window_frames, self.stride_frames, self.num_queries, self.width = (
            window_frames,
            stride_frames,
            num_queries,
            width,
        )
        self.query = nn.Parameter(torch.empty(1, num_queries, width).normal_(std=0.02))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                intermediate_size=ffn_width,
                cross_attention_frequency=1,
                encoder_hidden_size=encoder_width,
                initializer_range=width**-0.5,  # BERT's 0.02 starves a narrow Q-Former of signal
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )

    def num_windows(self, num_frames: int) -> int:
        """Windows that fit into `num_frames` frames; a tail shorter than a window is dropped, as SALMONN does."""
        if not self.window_frames:
            return 1
        return (num_frames - self.window_frames) // self.stride_frames + 1

    def windows_with_audio(self, num_audio_frames: int, num_frames: int) -> int:
        """Windows that hold at least one frame of audio (at least 1) when `num_audio_frames` of `num_frames` do."""
        if not self.window_frames:
            return 1
        touched = -(-num_audio_frames // self.stride_frames)
        return max(1, min(touched, self.num_windows(num_frames)))

    def forward(
        self, frames_BRE: Tensor, num_windows: int | None = None, num_frames_B: Sequence[int] | None = None
    ) -> Tensor:
        """Read windows.

        Args:
            frames_BRE: of both encoders, side by side.
            num_windows: how many are read; None: all of them.
            num_frames_B: frames a row has, where rows are padded to the longest; only one window of all frames, which
                would see the padding, asks for it.

        Returns:
            queries_BWQE, float32.
        """
        batch, mask_BR = frames_BRE.shape[0], None
        if self.window_frames:
            windows_BWER = frames_BRE.unfold(1, self.window_frames, self.stride_frames)
            if num_windows is not None:
                windows_BWER = windows_BWER[:, :num_windows]
            windows = windows_BWER.transpose(2, 3).flatten(0, 1)
        else:
            windows = frames_BRE
            if num_frames_B is not None and min(num_frames_B) < frames_BRE.shape[1]:
                places_R = torch.arange(frames_BRE.shape[1], device=frames_BRE.device)
                mask_BR = places_R < torch.tensor(num_frames_B, device=frames_BRE.device)[:, None]
        query = self.query.expand(windows.shape[0], -1, -1)
        hidden = self.qformer(
            query_embeds=query, encoder_hidden_states=windows, encoder_attention_mask=mask_BR, return_dict=True
        ).last_hidden_state
        return hidden.unflatten(0, (batch, -1))
