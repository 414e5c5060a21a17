"""A Qwen2-Audio in the published format, which brings all of its parts."""

from pathlib import Path

import torch
from transformers import PretrainedConfig, Qwen2AudioForConditionalGeneration

from shards.status import print_status
from teachers.kinds.settings import check_settings, moved_parts
from teachers.qwen2_audio import Qwen2Audio, describe_qwen2_audio, is_qwen2_audio, load_qwen2_audio
from teachers.salmonn import SalmonnConfig, describe_end

PUBLISHED = ("Qwen/Qwen2-Audio-7B", "Qwen/Qwen2-Audio-7B-Instruct")


def recognizes(path: Path) -> bool:
    """A folder of one, or its published name."""
    return is_qwen2_audio(path) or str(path) in PUBLISHED


def load(parts, path: Path, *, dtype: torch.dtype, ear_precision: str, llm_weights: bool = True) -> Qwen2Audio:
    """The model, whole whether or not its LLM is asked."""
    own, _ = describe(parts, path)
    check_settings(parts, own, path)
    moved_parts(parts, {"model": own, "frozen": {}}, path)
    model = load_qwen2_audio(path, prompts=parts.prompts, dtype=dtype, ears=ear_precision)
    print_status(f"teacher {path}: {describe_end(model, 'its chat')}")
    return model


def describe(parts, path: Path) -> tuple[SalmonnConfig, None]:
    """Its config; it has no LoRA."""
    return describe_qwen2_audio(path, parts.prompts), None


def build_empty(config: SalmonnConfig, llm_config: PretrainedConfig, dtype: torch.dtype, tokenizer) -> Qwen2Audio:
    """The model with whatever weights the context's device gives."""
    return Qwen2Audio(config, Qwen2AudioForConditionalGeneration(llm_config).to(dtype), tokenizer)
