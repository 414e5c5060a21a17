"""SALMONN: ears, window-level Q-Former and a LLM that answers a prompt about what they hear.

Teacher and student are both this model. It has no flag for 4 bits or LoRA: `students/` transforms it.
Shapes: B batch, T LLM positions, S supervised positions, L audio tokens (W windows x Q queries), N audio samples,
R encoder frames, E encoder or query width, D LLM width.
Source: Tang et al., "SALMONN", ICLR 2024 (arXiv 2310.13289), and bytedance/SALMONN's and Nota's trainers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from shards.audio.augment import mask_mel_
from shards.sample import MAX_SECONDS, SAMPLE_RATE, Sample
from teachers.ears.encoders import find_encoder, second_kinds, shares_spectrum
from teachers.ears.frontend import FRAME_SAMPLES, HOP_SAMPLES
from teachers.ears.length import FULL, parse_ears_seconds
from teachers.ears.one_frontend import OneFrontEnd, measure_approximation
from teachers.ears.precision import ear_autocast
from teachers.ears.shape import FORM, QUANTIZATIONS
from teachers.fourbit import keep_unpacked_
from teachers.logits import head_logits
from teachers.qformer import WindowQFormer
from teachers.words.batch import Batch, check_pad_id, collate
from teachers.words.ending import Ends, TextEnd, read_answer, truncate_after_end
from teachers.words.generation import generate_without_defaults, own_end_ids
from teachers.words.prompts import Prompts, load_prompts
from teachers.words.rows import RowTokenizer
from teachers.words.templates import SALMONN_TEMPLATE

LEAST_SAMPLES = SAMPLE_RATE  # a shorter clip is heard with silence up to 1 s behind it, as every SALMONN was trained


@dataclass(frozen=True)
class SalmonnConfig:
    """What a SALMONN is made of. Model names are local folders or hub ids."""

    llm: str  # any causal LM of transformers
    whisper: str  # a Whisper model; its encoder is used
    second: str = ""  # a second encoder's checkpoint; empty: Whisper alone
    second_kind: str = ""  # which it is, of `teachers.ears.encoders.ENCODERS`
    window_seconds: float = 0.333333  # span of audio that one Q-Former call sees; 0: all of it
    stride_seconds: float = 0.333333  # step from one window to the next
    windows: str = "all"  # "all": also those of pure padding, as SALMONN; "audio": only those that hold audio
    ears_seconds: str = FULL  # what Whisper hears: "30": all it can take; "clip", "clip+P": the clip and P s of silence
    whisper_layers: int = 0  # that are kept of Whisper's, evenly spread; 0: all
    ears_quantization: str = "none"  # of the ears' linear layers, weights alone: "none", "bf16" or "int8"
    ears_lora_rank: int = 0  # of LoRA on Whisper's linear layers; 0: there is none
    prefix_tokens: int = 0  # learned keys and values before those of each layer of the LLM; 0: there are none
    num_queries: int = 1  # vectors a window gives
    qformer_width: int = 768
    qformer_layers: int = 2
    qformer_heads: int = 12
    qformer_ffn: int = 3072
    qformer_dropout: float = 0.0  # SALMONN trains with 0.1
    prompts: str = ""  # JSON file of prompts by task; empty: the library's
    eval_prompts: str = ""  # JSON file of those that evaluation asks with; empty: the first of each task
    template: str = SALMONN_TEMPLATE  # what stands around a prompt; "chat": the LLM's own form, once it is built
    end_token: str = ""  # text that ends an answer; empty: the tokenizer's end token
    bos_token: str = ""  # text of the token before a prompt; empty: the tokenizer's own, if any; "none": nothing
    max_answer_tokens: int = 300  # longer answers are cut before the end token
    front_end: str = "exact"  # "exact", or "shared": Whisper and BEATs from one power spectrum, approximate for BEATs

    def __post_init__(self):
        if self.front_end not in ("exact", "shared"):
            raise ValueError(f"front_end is {self.front_end!r}, but must be 'exact' or 'shared'; correct the config.")
        if self.front_end == "shared" and not shares_spectrum(self.second_kind):
            able = " and ".join(find_encoder(kind).title for kind in filter(shares_spectrum, second_kinds()))
            raise ValueError(
                f"front_end is 'shared', but second_kind is {self.second_kind!r} and only {able} shares Whisper's "
                f"spectrum; use front_end 'exact'."
            )
        if self.ears_quantization not in QUANTIZATIONS:
            raise ValueError(
                f"ears_quantization is {self.ears_quantization!r}, but must be one of {', '.join(QUANTIZATIONS)}; "
                f"correct the config."
            )
        if self.windows not in ("all", "audio"):
            raise ValueError(f"windows is {self.windows!r}, but must be 'all' or 'audio'; correct the config.")
        if parse_ears_seconds(self.ears_seconds) is not None and self.windows == "all":
            raise ValueError(
                f"ears_seconds is {self.ears_seconds!r}, but windows is 'all' and those of pure padding are not heard "
                f"then; set windows to audio, or ears_seconds to 30."
            )
        if bool(self.second) != bool(self.second_kind):
            raise ValueError(
                f"second is {self.second!r} and second_kind {self.second_kind!r}, but they go together; "
                f"set both or neither."
            )

    @property
    def ears_form(self) -> dict[str, int | str]:
        """What becomes of its ears' checkpoints, as `reshape_ears_` takes it."""
        return {name: getattr(self, name) for name in FORM}


@dataclass(frozen=True)
class Heard:
    """What the ears and the Q-Former make of a batch."""

    queries_BWQE: Tensor  # float32
    num_windows_B: list[int]
    frames: list[Tensor] | None = None  # of each encoder, [B, R, E], that they were made of; None: not kept


class Salmonn(nn.Module):
    """The model, from its parts.

    Args:
        config: sizes and names.
        llm: a causal LM of transformers.
        tokenizer: the LLM's tokenizer.
        whisper: the speech encoder; `forward(waveforms_BN, num_samples_B) -> (frames_BRE, num_frames_B)`, `width`.
        second: an optional second encoder of the same form.
    """

    has_queries = True  # of a Q-Former, for a student's to be compared with
    llm_bits = "none"  # of its LLM's linear layers, where they were narrowed after loading
    min_samples = FRAME_SAMPLES  # the shortest clip that is taken, in audio samples

    def __init__(self, config: SalmonnConfig, llm: nn.Module, tokenizer, whisper: nn.Module,
                 second: nn.Module | None = None):  # fmt: skip
        super().__init__()
        keep_unpacked_(llm)
        self.config, self.llm, self.tokenizer, self.whisper, self.second = config, llm, tokenizer, whisper, second
        self.own_names: frozenset[str] | None = None  # tensors it was loaded with; None: those that are trainable
        self.inherited_names: frozenset[str] = frozenset()  # frozen tensors that are in no part's own checkpoint
        self.only_answers = ""  # what was changed so that it only answers; such a one is neither trained nor saved
        self.front_end = None  # of both encoders, where they share one
        if shares_spectrum(config.second_kind):
            self.front_end = OneFrontEnd(whisper.log_mel, approximate=config.front_end == "shared")
        self.is_error_known = not (self.front_end and self.front_end.approximate)
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
            self.read_prompts(),
            config.end_token,
            config.max_answer_tokens,
            config.bos_token,
        )
        check_pad_id(self.rows.pad_id, llm)

    def read_prompts(self) -> Prompts:
        """The prompts that its config names."""
        return load_prompts(self.config.prompts or None, self.config.template, self.config.eval_prompts or None)

    def set_eval_prompts(self, path: str) -> None:
        """Let evaluation ask with the prompts of another file; empty: with the first of each task's own."""
        self.config = replace(self.config, eval_prompts=path)
        self.rows.prompts = self.read_prompts()

    def train(self, mode: bool = True) -> "Salmonn":
        """Training mode for what is trained; frozen parts stay in evaluation (BEATs would drop layers otherwise)."""
        super().train(mode)
        for part in (self.whisper, self.second, self.qformer, self.llm):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.project.weight.device

    # What a clip becomes

    def num_heard(self, num_samples: int) -> int:
        """Audio samples that the ears hear of a clip of so many: one under 1 s counts everywhere as one of 1 s."""
        return max(num_samples, min(LEAST_SAMPLES, self.max_samples))

    def num_frames(self, num_samples: int, ears_seconds: str = "") -> int:
        """Frames of a clip of so many audio samples, those of the encoder that gives more.

        Args:
            num_samples: of the clip.
            ears_seconds: what Whisper hears; empty: as the config says.
        """
        own = 0 if self.second is None else self.second.num_frames(self.num_heard(num_samples))
        return max(self.num_speech_frames(num_samples, ears_seconds), own)

    def num_speech_frames(self, num_samples: int, ears_seconds: str = "") -> int:
        """Whisper's frames of a clip: all it has, or up to the end of what is heard and of the last window with audio.

        Arguments as `num_frames` takes them.
        """
        full = self.whisper.max_samples // FRAME_SAMPLES
        padding_seconds = parse_ears_seconds(ears_seconds or self.config.ears_seconds)
        if padding_seconds is None:
            return full
        num_heard = self.num_heard(num_samples) + round(padding_seconds * SAMPLE_RATE)
        return min(full, max(-(-num_heard // FRAME_SAMPLES), self.end_of_windows(num_samples)))

    def end_of_windows(self, num_samples: int) -> int:
        """The frame at which the last window that holds audio ends; 0 where one window has all frames."""
        if not self.qformer.window_frames:
            return 0
        return (self.num_windows_with_audio(num_samples) - 1) * self.qformer.stride_frames + self.qformer.window_frames

    def num_windows(self, num_samples: int) -> int:
        """Q-Former windows of a clip of so many audio samples."""
        if self.config.windows == "all":
            return self.qformer.num_windows(self.num_frames(num_samples))
        return self.num_windows_with_audio(num_samples)

    def num_windows_with_audio(self, num_samples: int) -> int:
        """Those windows of a clip that hold audio; of one under 1 s, those of its second (3 of a third each)."""
        audio_frames = -(-self.num_heard(num_samples) // FRAME_SAMPLES)
        return self.qformer.windows_with_audio(audio_frames, self.num_frames(num_samples, FULL))

    def num_audio_tokens(self, num_samples: int) -> int:
        return self.num_windows(num_samples) * self.config.num_queries

    @property
    def max_samples(self) -> int:
        """The longest clip the ears take, in audio samples."""
        return min(self.whisper.max_samples, int(MAX_SECONDS * SAMPLE_RATE))

    def collate(self, samples: Sequence[Sample], *, with_answer: bool = True, first_prompt: bool = False) -> Batch:
        """Samples as a batch; without answers it is laid out for `generate`.

        Raises:
            ValueError: a clip is longer or shorter than the ears take; an unknown task; no text.
        """
        for sample in samples:
            if not self.min_samples <= len(sample.waveform_N) <= self.max_samples:
                raise ValueError(
                    f"sample {sample.key} lasts {sample.duration:.2f} s, but these ears take "
                    f"{self.min_samples / SAMPLE_RATE:g} to {self.max_samples / SAMPLE_RATE:g} s; cut it or leave it "
                    f"out with `distill audit`."
                )
        rows = [
            self.rows.row(s, with_answer=with_answer, first_prompt=first_prompt,
                          num_audio_tokens=self.num_audio_tokens(len(s.waveform_N)))
            for s in samples
        ]  # fmt: skip
        return collate(samples, rows, self.rows.pad_id)

    # Hearing

    def frames(self, waveforms_BN: Tensor, num_samples_B: Tensor, masks_B=None, ears_seconds: str = "") -> list[Tensor]:
        """Each encoder's frames [B, R, E], float32, before LayerNorm: what a student with shared ears takes over.

        Args:
            waveforms_BN, num_samples_B: clips and their lengths.
            masks_B: what SpecAugment hides of each.
            ears_seconds: what Whisper hears of them, where that is another's than this model's own.
        """
        heard_B = self._heard_frames(num_samples_B, ears_seconds or self.config.ears_seconds)
        waveforms_BN, num_samples_B = self.pad_short(waveforms_BN, num_samples_B)
        if self.front_end is not None:
            return self._frames_of_one_front_end(waveforms_BN, num_samples_B, masks_B, heard_B)
        cut = () if heard_B is None else (heard_B,)
        with ear_autocast(self.whisper):
            heard = [self.whisper(waveforms_BN, num_samples_B, masks_B, *cut)[0].float()]
        if self.second is not None:
            with ear_autocast(self.second):
                heard.append(self.second(waveforms_BN, num_samples_B, masks_B)[0].float())
        return heard

    def _heard_frames(self, num_samples_B: Tensor, ears_seconds: str) -> list[int] | None:
        """Whisper's frames of each clip where it is cut; None where it hears all it can."""
        if ears_seconds == FULL:
            return None
        return [self.num_speech_frames(num_samples, ears_seconds) for num_samples in num_samples_B.tolist()]

    def pad_short(self, waveforms_BN: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Clips under 1 s with silence behind them up to it, and the lengths that are heard."""
        least = self.num_heard(0)
        padded_BN = nn.functional.pad(waveforms_BN, (0, max(0, least - waveforms_BN.shape[1])))
        return padded_BN, num_samples_B.clamp(min=least)

    def _frames_of_one_front_end(self, waveforms_BN: Tensor, num_samples_B: Tensor, masks_B,
                                 heard_B: list[int] | None) -> list[Tensor]:  # fmt: skip
        for ear in (self.whisper, self.second):
            ear.check(num_samples_B)
        if not self.is_error_known:
            measure_approximation(self.whisper.log_mel, self.second, waveforms_BN, num_samples_B)
            self.is_error_known = True
        mel_BMX, mel_BXM, num_mel_frames_B = self.front_end(waveforms_BN, num_samples_B)
        if masks_B is not None:
            mask_mel_(mel_BMX, (num_samples_B + HOP_SAMPLES - 1) // HOP_SAMPLES, masks_B)
            mask_mel_(mel_BXM.transpose(1, 2), num_mel_frames_B, masks_B)
        with ear_autocast(self.whisper):
            speech_BRE = self.whisper.encode(mel_BMX, heard_B).float()
        with ear_autocast(self.second):
            return [speech_BRE, self.second.encode(mel_BXM, num_mel_frames_B)[0].float()]

    def fuse(self, frames: list[Tensor]) -> Tensor:
        """LayerNorm each encoder's frames, zero-pad the shorter and put them side by side: frames_BRE."""
        if self.second is None:
            return self.ln_speech(frames[0])
        # a second encoder's frame of zeros is one after the row's end: it stays zero, as when the row is alone
        is_heard = (frames[1] != 0).any(-1, keepdim=True)
        speech, audio = self.ln_speech(frames[0]), self.ln_audio(frames[1]) * is_heard
        if self.config.ears_seconds != FULL:
            speech = speech * (frames[0] != 0).any(-1, keepdim=True)
        length = max(speech.shape[1], audio.shape[1])
        padded = [nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in (speech, audio)]
        return torch.cat(padded, dim=-1)

    def hear(self, batch: Batch, frames: list[Tensor] | None = None) -> Heard:
        """The Q-Former's queries of every window; `frames` are taken over when given."""
        if frames is None:
            frames = self.frames(batch.waveforms_BN, batch.num_samples_B, batch.masks_B)
        num_windows_B = [row.num_audio_tokens // self.config.num_queries for row in batch.rows]
        num_frames_B = [self.num_frames(len(sample.waveform_N)) for sample in batch.samples]
        return Heard(self.qformer(self.fuse(frames), max(num_windows_B), num_frames_B), num_windows_B, frames)

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
        states_BTD = self.llm.base_model(  # `model`, `transformer`, `gpt_neox`: every family has its own name for it
            inputs_embeds=self.embed(batch, heard), attention_mask=batch.attention_mask_BT, use_cache=False
        ).last_hidden_state
        return states_BTD.flatten(0, 1)[batch.predicting_S]

    def forward(self, batch: Batch, frames: list[Tensor] | None = None) -> tuple[Tensor, Heard]:
        """Logits at the supervised positions, float32: logits_SV, and what was heard."""
        heard = self.hear(batch, frames)
        return head_logits(self.llm, self.answer_states(batch, heard)), heard

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], *, max_new_tokens: int = 100, num_beams: int = 1,
                 repetition_penalty: float = 1.0, length_penalty: float = 1.0,
                 frames: list[Tensor] | None = None) -> list[str]:  # fmt: skip
        """The model's answers, greedy by default; a row ends at its own end token.

        Args:
            samples: clips with their task and question; `text` is not looked at.
            max_new_tokens: an answer that has not ended by then is cut.
            num_beams, repetition_penalty, length_penalty: as transformers' `generate` takes them.
            frames: what the ears make of the clips, taken over when given.
        """
        ids = self.answer_ids(samples, frames=frames,
                                max_new_tokens=max_new_tokens, num_beams=num_beams,
                                repetition_penalty=repetition_penalty, length_penalty=length_penalty)  # fmt: skip
        return [self.read(row) for row in ids]

    def answer_ids(self, samples: Sequence[Sample], **options) -> list[list[int]]:
        """As `generate_ids`, of samples that are asked as evaluation asks."""
        batch = self.collate(samples, with_answer=False, first_prompt=True).to(self.device)
        return self.generate_ids(batch, **options)

    def read(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without its end."""
        return read_answer(self.tokenizer, ids, self.ends)

    @torch.no_grad()
    def generate_ids(self, batch: Batch, *, frames: list[Tensor] | None = None, logits_processor: Sequence = (),
                     **options) -> list[list[int]]:  # fmt: skip
        """The new ids of each row up to and with its end token; a beam search's are those of its best beam.

        Nothing of the LLM's own `generation_config` counts but the ids that end an answer.

        Args:
            batch: without answers.
            frames: what the ears make of its clips, taken over when given.
            logits_processor: applied last.
            options: `max_new_tokens`, `num_beams` and others of transformers' `GenerationConfig`.
        """
        heard = self.hear(batch, frames)
        ids_BT = generate_without_defaults(
            self.llm, self.embed(batch, heard), batch.attention_mask_BT, ends=self.ends, pad_id=self.rows.pad_id,
            num_tokens=self.num_tokens, processors=logits_processor, **options,
        )  # fmt: skip
        return [truncate_after_end(row, self.ends) for row in ids_BT]

    @cached_property
    def num_tokens(self) -> int:
        """Ids that stand for a token; a padded head has more, and they are no answers."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @property
    def ends(self) -> Ends:
        """Everything that ends an answer: our own end, and the ids that end one of the LLM's."""
        own = TextEnd(self.tokenizer, self.rows.end) if self.rows.end.text else self.rows.end_ids
        return [own, *([token] for token in self.end_ids)]

    @property
    def end_ids(self) -> list[int]:
        """Single ids that end an answer: our end token when it is one id, and the LLM's own."""
        single = self.rows.end_ids if len(self.rows.end.tail) == 1 and not self.rows.end.text else []
        return list(dict.fromkeys([*single, *own_end_ids(self.llm)]))


def describe_end(model: Salmonn, source: str) -> str:
    """One line on what ends a model's answers, and on who says so.

    Args:
        model: the model.
        source: who names the end where its config does.
    """
    end = model.config.end_token or model.tokenizer.convert_ids_to_tokens(model.rows.end_ids[0])
    kind = "text, tokenized with the answer, " if model.rows.end.text else ""
    line = f"answers end with {end} ({kind}from {source if model.config.end_token else 'the tokenizer'})"
    others = [index for index in model.end_ids if index not in model.rows.end.tail]
    if others:
        names = ", ".join(str(model.tokenizer.convert_ids_to_tokens(index)) for index in others)
        line += f", and stop at {names} (from the LLM's generation_config)"
    return line
