"""Qwen2-Audio as a teacher: a Whisper-like tower, averaged to 25 vectors a second, straight into a Qwen2 LLM.

It answers like a `Salmonn` and is used as one; it has no Q-Former, so its targets hold no queries. A student hears with
its tower's weights, at 50 frames a second, as with any Whisper.

Shapes: B batch, N audio samples, M mel bins, X mel frames, R tower frames (20 ms), L audio tokens (40 ms), E tower
width, D LLM width.
Source: Chu et al., "Qwen2-Audio Technical Report", 2024 (arXiv 2407.10759); transformers' `Qwen2Audio*`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2AudioForConditionalGeneration

from teachers.ears.frontend import HOP_SAMPLES
from teachers.ears.precision import WEIGHTS, ear_autocast, set_ear_precision_
from teachers.ears.whisper import ear_from_tower
from teachers.files.loading import CONFIG
from teachers.files.weights import read_json
from teachers.fourbit import keep_unpacked_
from teachers.salmonn import Heard, Salmonn, SalmonnConfig
from teachers.words.batch import Batch, check_pad_id
from teachers.words.prompts import AUDIO_IN_FRONT, AUDIO_PLACE, Prompts
from teachers.words.rows import RowTokenizer

MODEL_TYPE = "qwen2_audio"
PLACE = f"Audio 1: <|audio_bos|>{AUDIO_PLACE}<|audio_eos|>\n"  # and in Qwen2-Audio's own chat
TURN_END = "<|im_end|>"
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


class Qwen2Audio(Salmonn):
    """A frozen Qwen2-Audio behind a `Salmonn`'s methods.

    Args:
        config: where it lies (as `llm` and `whisper`), its prompts, template and end token.
        loaded: transformers' model.
        tokenizer: its tokenizer.
    """

    has_queries = False
    min_samples = 4 * HOP_SAMPLES  # one audio token

    def __init__(self, config: SalmonnConfig, loaded: Qwen2AudioForConditionalGeneration, tokenizer):
        nn.Module.__init__(self)
        core = loaded.model if hasattr(loaded, "model") else loaded  # as transformers 5.23 and older ones nest it
        self.config, self.tokenizer, self.second, self.front_end = config, tokenizer, None, None
        self.own_names = self.inherited_names = frozenset()
        self.llm = join_llm(loaded, core)
        keep_unpacked_(self.llm)
        self.whisper = ear_from_tower(core.audio_tower)  # what a student shares
        self.pool = core.audio_tower.avg_pooler
        self.project = core.multi_modal_projector.linear
        self.qformer = self.ln_speech = self.ln_audio = None
        prompts = self.read_prompts()
        self.rows = RowTokenizer(tokenizer, prompts, config.end_token, config.max_answer_tokens, config.bos_token)
        check_pad_id(self.rows.pad_id, self.llm)
        self.eval().requires_grad_(False)

    def read_prompts(self) -> Prompts:
        """As a `Salmonn`'s, with its own mark around the audio."""
        prompts = super().read_prompts()
        by_task = {task: tuple(map(to_own_placeholder, own)) for task, own in prompts.by_task.items()}
        asked = {task: to_own_placeholder(prompt) for task, prompt in prompts.evaluation.items()}
        return Prompts(by_task, prompts.template, asked)

    def num_frames(self, num_samples: int) -> int:
        """Tower frames that hold audio, before they are averaged in pairs."""
        return (-(-num_samples // HOP_SAMPLES) - 1) // 2 + 1

    def num_windows(self, num_samples: int) -> int:
        return (self.num_frames(num_samples) - 2) // 2 + 1

    def num_audio_tokens(self, num_samples: int) -> int:
        return self.num_windows(num_samples)

    def frames(self, waveforms_BN: Tensor, num_samples_B: Tensor, masks_B=None) -> list[Tensor]:
        """The averaged tower's vectors, frames_BLE; unlike Whisper it never looks at padding."""
        with ear_autocast(self.whisper):
            return self._frames(waveforms_BN, num_samples_B, masks_B)

    def _frames(self, waveforms_BN: Tensor, num_samples_B: Tensor, masks_B) -> list[Tensor]:
        tower = self.whisper.encoder
        mel_BMX = self.whisper.mel(waveforms_BN, num_samples_B, masks_B).to(tower.conv1.weight.dtype)
        frames_BRE = nn.functional.gelu(tower.conv2(nn.functional.gelu(tower.conv1(mel_BMX)))).transpose(1, 2)
        frames_BRE = frames_BRE + tower.embed_positions.weight
        num_frames = torch.tensor([self.num_frames(n) for n in num_samples_B.tolist()], device=frames_BRE.device)
        is_heard_BR = torch.arange(frames_BRE.shape[1], device=frames_BRE.device) < num_frames[:, None]
        mask = torch.zeros(is_heard_BR.shape, dtype=frames_BRE.dtype, device=frames_BRE.device)
        mask = mask.masked_fill(~is_heard_BR, torch.finfo(mask.dtype).min)[:, None, None]
        mask = mask.expand(-1, 1, frames_BRE.shape[1], -1)
        for layer in tower.layers:
            states = layer(frames_BRE, mask)
            frames_BRE = states[0] if isinstance(states, tuple) else states
        pooled_BLE = self.pool(frames_BRE.transpose(1, 2)).transpose(1, 2)
        return [tower.layer_norm(pooled_BLE)]

    def hear(self, batch: Batch, frames: list[Tensor] | None = None) -> Heard:
        """Each audio token's vector before its projection, as one window of one query.

        `frames` of shared ears are not taken over: a student's are neither masked nor averaged.
        """
        frames_BLE = self.frames(batch.waveforms_BN, batch.num_samples_B, batch.masks_B)[0]
        return Heard(frames_BLE[:, :, None], [row.num_audio_tokens for row in batch.rows])


def to_own_placeholder(prompt: str) -> str:
    """A prompt of SALMONN's form in Qwen2-Audio's."""
    return prompt.replace(AUDIO_IN_FRONT, PLACE).replace(AUDIO_IN_FRONT.rstrip(), PLACE)


def join_llm(loaded: Qwen2AudioForConditionalGeneration, core: nn.Module) -> nn.Module:
    """The causal LM inside a Qwen2-Audio, its head included."""
    if not hasattr(loaded, "lm_head"):
        return core.language_model
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(loaded.config.text_config)
    llm.model, llm.lm_head = core.language_model, loaded.lm_head
    llm.generation_config = loaded.generation_config
    return llm


def is_qwen2_audio(folder: str | Path) -> bool:
    """Whether a folder holds a Qwen2-Audio."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return False
    config = read_json(path)
    return "model_type" in config and config["model_type"] == MODEL_TYPE


def load_qwen2_audio(folder: str | Path, *, prompts: str = "", dtype: torch.dtype = torch.float32,
                     ears: str = "") -> Qwen2Audio:  # fmt: skip
    """Load a folder in the published format.

    Args:
        folder: the folder of Qwen2-Audio, instructed or not.
        prompts: JSON file of prompts by task, with `<SpeechHere>` where audio goes; empty: the library's.
        dtype: the data type of the weights.
        ears: how its tower hears, see `teachers.ears.precision`; empty: as `dtype` says.

    Raises:
        ValueError: tensors are missing, unknown or of other shapes, or a token of its chat is not in its vocabulary.
    """
    wide = torch.promote_types(dtype, WEIGHTS[ears]) if ears else dtype
    loaded, report = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=wide, output_loading_info=True)
    faults = {name: sorted(map(str, keys)) for name, keys in report.items() if keys and name.endswith("_keys")}
    if faults:
        fault, names = next(iter(faults.items()))
        raise ValueError(
            f"{folder} has {len(names)} {fault.replace('_', ' ')} ({names[0]}), but every tensor must fit; "
            f"download Qwen2-Audio again."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    missing = [token for token in ("<|audio_bos|>", "<|audio_eos|>", TURN_END) if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"{folder} has no token {missing[0]}, but Qwen2-Audio's chat needs it; use its own tokenizer.")
    model = Qwen2Audio(describe_qwen2_audio(folder, prompts), loaded, tokenizer)
    if ears:
        model.llm.to(dtype)
        model.project.to(dtype)
        set_ear_precision_(model.whisper, ears)
    return model


def describe_qwen2_audio(folder: str | Path, prompts: str = "") -> SalmonnConfig:
    """The config of a Qwen2-Audio in a folder; what concerns a Q-Former is for students."""
    return SalmonnConfig(llm=str(folder), whisper=str(folder), windows="audio", prompts=prompts, template=TEMPLATE,
                         end_token=TURN_END)  # fmt: skip
