"""SALMONN: ears, window-level Q-Former and a LLM that answers a prompt about what they hear.

Teacher and student are both this model. It has no flag for 4 bits or LoRA: `students/` transforms it.
Shapes: B batch, T LLM positions, S supervised positions, L audio tokens (W windows x Q queries), N audio samples,
R encoder frames, E encoder or query width, D LLM width.
Source: Tang et al., "SALMONN", ICLR 2024 (arXiv 2310.13289), and bytedance/SALMONN's and Nota's trainers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shards.sample import MAX_SECONDS, SAMPLE_RATE, Sample
from teachers.batch import Batch, RowTokenizer, collate
from teachers.prompts import load_prompts
from teachers.qformer import WindowQFormer

FRAME_SAMPLES = 320  # audio samples behind one encoder frame: Whisper, BEATs and EAT all give 50 a second
FRAME_SECONDS = FRAME_SAMPLES / SAMPLE_RATE


@dataclass(frozen=True)
class SalmonnConfig:
    """What a SALMONN is made of. Model names are local folders or hub ids."""

    llm: str  # any causal LM of transformers
    whisper: str  # a Whisper model; its encoder is used
    second: str = ""  # a second encoder's checkpoint; empty: Whisper alone
    second_kind: str = ""  # "beats" or "eat"
    window_seconds: float = 0.333333  # span of audio that one Q-Former call sees; 0: all of it
    stride_seconds: float = 0.333333  # step from one window to the next
    windows: str = "all"  # "all": also those of pure padding, as SALMONN; "audio": only those that hold audio
    num_queries: int = 1  # vectors a window gives
    qformer_width: int = 768
    qformer_layers: int = 2
    qformer_heads: int = 12
    qformer_ffn: int = 3072
    qformer_dropout: float = 0.0  # SALMONN trains with 0.1
    prompts: str = ""  # JSON file of prompts by task; empty: the library's
    template: str = "USER: {}\nASSISTANT:"
    end_token: str = ""  # text that ends an answer; empty: the tokenizer's end token
    max_answer_tokens: int = 300  # longer answers are cut before the end token

    def __post_init__(self):
        if self.windows not in ("all", "audio"):
            raise ValueError(f"windows is {self.windows!r}, but must be 'all' or 'audio'; correct the config.")
        if bool(self.second) != bool(self.second_kind):
            raise ValueError(
                f"second is {self.second!r} and second_kind {self.second_kind!r}, but they go together; "
                f"set both or neither."
            )


@dataclass(frozen=True)
class Heard:
    """What the ears and the Q-Former make of a batch."""

    queries_BWQE: Tensor  # float32
    num_windows_B: list[int]


class Salmonn(nn.Module):
    """The model, from its parts.

    Args:
        config: sizes and names.
        llm: a causal LM of transformers.
        tokenizer: the LLM's tokenizer.
        whisper: the speech encoder; `forward(waveforms_BN, num_samples_B) -> (frames_BRE, num_frames_B)`, `width`.
        second: an optional second encoder of the same form.
    """

    def __init__(self, config: SalmonnConfig, llm: nn.Module, tokenizer, whisper: nn.Module,
                 second: nn.Module | None = None):  # fmt: skip
        super().__init__()
        self.config, self.llm, self.tokenizer, self.whisper, self.second = config, llm, tokenizer, whisper, second
        self.own_names: frozenset[str] | None = None  # tensors it was loaded with; None: those that are trainable
        self.ln_speech = nn.LayerNorm(whisper.width)
        self.ln_audio = nn.LayerNorm(second.width) if second is not None else None
        self.qformer = WindowQFormer(
            whisper.width + (second.width if second is not None else 0),
            width=config.qformer_width,
            num_layers=config.qformer_layers,
            num_heads=config.qformer_heads,
            ffn_width=config.qformer_ffn,
            num_queries=config.num_queries,
            window_frames=round(1500 * config.window_seconds / 30),  # SALMONN's arithmetic, its rounding included
            stride_frames=round(1500 * config.stride_seconds / 30),
            dropout=config.qformer_dropout,
        )
        self.project = nn.Linear(config.qformer_width, llm.get_input_embeddings().embedding_dim)
        self.rows = RowTokenizer(
            tokenizer,
            load_prompts(config.prompts or None, config.template),
            config.end_token,
            self.num_audio_tokens,
            config.max_answer_tokens,
        )

    def train(self, mode: bool = True) -> "Salmonn":
        """Training mode for what is trained; frozen ears stay in evaluation (BEATs would drop layers otherwise)."""
        super().train(mode)
        for ear in (self.whisper, self.second):
            if ear is not None and not any(p.requires_grad for p in ear.parameters()):
                ear.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.project.weight.device

    # What a clip becomes

    def num_windows(self, num_samples: int) -> int:
        """Q-Former windows of a clip of so many audio samples."""
        num_frames = self.whisper.max_samples // FRAME_SAMPLES
        if self.second is not None:
            num_frames = max(num_frames, self.second.num_frames(num_samples))
        if self.config.windows == "all":
            return self.qformer.num_windows(num_frames)
        return self.qformer.windows_with_audio(-(-num_samples // FRAME_SAMPLES), num_frames)

    def num_audio_tokens(self, num_samples: int) -> int:
        return self.num_windows(num_samples) * self.config.num_queries

    @property
    def max_samples(self) -> int:
        """The longest clip the ears take, in audio samples."""
        return min(self.whisper.max_samples, int(MAX_SECONDS * SAMPLE_RATE))

    def collate(self, samples: Sequence[Sample], *, with_answer: bool = True, first_prompt: bool = False) -> Batch:
        """Samples as a batch; without answers it is laid out for `generate`.

        Raises:
            ValueError: a clip is longer than the ears take or shorter than a frame; an unknown task; no text.
        """
        for sample in samples:
            if not FRAME_SAMPLES <= len(sample.waveform_N) <= self.max_samples:
                raise ValueError(
                    f"sample {sample.key} lasts {sample.duration:.2f} s, but these ears take {FRAME_SECONDS} to "
                    f"{self.max_samples / SAMPLE_RATE:g} s; cut it or leave it out with `distill audit`."
                )
        rows = [self.rows.row(s, with_answer=with_answer, first_prompt=first_prompt) for s in samples]
        return collate(samples, rows, self.rows.pad_id)

    # Hearing

    def frames(self, waveforms_BN: Tensor, num_samples_B: Tensor, masks_B=None) -> list[Tensor]:
        """Each encoder's frames [B, R, E], before their LayerNorms: what a student that shares the ears takes over."""
        frames = [self.whisper(waveforms_BN, num_samples_B, masks_B)[0]]
        if self.second is not None:
            frames.append(self.second(waveforms_BN, num_samples_B, masks_B)[0])
        return frames

    def fuse(self, frames: list[Tensor]) -> Tensor:
        """LayerNorm each encoder's frames, zero-pad the shorter and put them side by side: frames_BRE."""
        if self.second is None:
            return self.ln_speech(frames[0])
        # a second encoder's frame of zeros is one after the row's end: it stays zero, as when the row is alone
        is_heard = (frames[1] != 0).any(-1, keepdim=True)
        speech, audio = self.ln_speech(frames[0]), self.ln_audio(frames[1]) * is_heard
        length = max(speech.shape[1], audio.shape[1])
        padded = [nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in (speech, audio)]
        return torch.cat(padded, dim=-1)

    def hear(self, batch: Batch, frames: list[Tensor] | None = None) -> Heard:
        """The Q-Former's queries of every window; `frames` are taken over when given."""
        if frames is None:
            frames = self.frames(batch.waveforms_BN, batch.num_samples_B, batch.masks_B)
        num_windows_B = [row.num_audio_tokens // self.config.num_queries for row in batch.rows]
        return Heard(self.qformer(self.fuse(frames), max(num_windows_B)), num_windows_B)

    # Answering

    def embed(self, batch: Batch, heard: Heard) -> Tensor:
        """Token embeddings with the audio tokens at their places: [B, T, D]."""
        embeds_BTD = self.llm.get_input_embeddings()(batch.input_ids_BT)
        tokens_BLD = self.project(heard.queries_BWQE.to(self.project.weight.dtype)).flatten(1, 2)
        kept = [tokens_BLD[b, : row.num_audio_tokens] for b, row in enumerate(batch.rows)]
        flat = embeds_BTD.flatten(0, 1).index_copy(0, batch.audio_places, torch.cat(kept).to(embeds_BTD.dtype))
        return flat.view_as(embeds_BTD)

    def answer_states(self, batch: Batch, heard: Heard) -> Tensor:
        """The LLM's last hidden states at the positions that predict the labels: hidden_SD."""
        states_BTD = self.llm.model(
            inputs_embeds=self.embed(batch, heard), attention_mask=batch.attention_mask_BT, use_cache=False
        ).last_hidden_state
        return states_BTD.flatten(0, 1)[batch.predicting_S]

    def forward(self, batch: Batch, frames: list[Tensor] | None = None) -> tuple[Tensor, Heard]:
        """Logits at the supervised positions, float32: logits_SV, and what was heard."""
        heard = self.hear(batch, frames)
        return self.llm.lm_head(self.answer_states(batch, heard)).float(), heard

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], *, max_new_tokens: int = 100, num_beams: int = 1,
                 repetition_penalty: float = 1.0, length_penalty: float = 1.0) -> list[str]:  # fmt: skip
        """The model's answers, greedy by default; a row ends at its own end token.

        Args:
            samples: clips with their task and question; `text` is not looked at.
            max_new_tokens: an answer that has not ended by then is cut.
            num_beams, repetition_penalty, length_penalty: as transformers' `generate` takes them.
        """
        ids = self.generate_ids(self.collate(samples, with_answer=False, first_prompt=True).to(self.device),
                                max_new_tokens=max_new_tokens, num_beams=num_beams,
                                repetition_penalty=repetition_penalty, length_penalty=length_penalty)  # fmt: skip
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    @torch.no_grad()
    def generate_ids(self, batch: Batch, **options) -> list[list[int]]:
        """The new ids of each row up to and with its end token."""
        # pad = end id: what stands behind a row's end is cut below, so no id has to be spared for padding
        heard = self.hear(batch)
        ids_BT = self.llm.generate(
            inputs_embeds=self.embed(batch, heard),
            attention_mask=batch.attention_mask_BT,
            do_sample=False,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
            **options,
        ).tolist()
        return [_cut_after_end(row, set(self.end_ids)) for row in ids_BT]

    @property
    def end_ids(self) -> list[int]:
        """Ids that end an answer: the last of our end token's, and those the LLM's own generation config names."""
        own = self.llm.generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        return list(dict.fromkeys([self.rows.end_ids[-1], *own]))


def _cut_after_end(ids: list[int], end_ids: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1]
    return ids
