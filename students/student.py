"""A student: the teacher's ears and Q-Former on a smaller LLM, in 4 bits with LoRA.

Trained are LoRA, Q-Former, its LayerNorms and the projection; frozen are the ears and the LLM's 4-bit weights.
"""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from students.quantize import quantize_4bit_
from teachers.loading import build_salmonn, load_salmonn, read_config, save_salmonn
from teachers.lora import Lora
from teachers.salmonn import Salmonn

EARS = ("whisper", "second")
CONNECTOR = ("ln_speech", "ln_audio", "qformer", "project")


def build_student(
    teacher: Salmonn,
    llm: str,
    *,
    lora: Lora,
    quantization: str = "nf4",
    connector: str = "teacher",
    qformer_dropout: float = 0.0,
    windows: str = "audio",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Salmonn:
    """A student that hears with the teacher's own (shared, frozen) encoders.

    Args:
        teacher: whose ears, prompts and Q-Former sizes are inherited; its encoders are shared, not copied.
        llm: the student's LLM, a local folder or hub id.
        lora: LoRA on it.
        quantization: "nf4" or "none".
        connector: "teacher" starts LayerNorms and Q-Former from the teacher's weights, "new" from random ones.
        qformer_dropout: in training.
        windows: "audio" or "all", see `SalmonnConfig`.
        dtype: of the LLM's products and of what is not quantised.
        seed: of LoRA's and the connector's random weights, so that every rank starts from the same.
    """
    torch.manual_seed(seed)
    config = dataclasses.replace(teacher.config, llm=llm, windows=windows, qformer_dropout=qformer_dropout)
    student = build_salmonn(
        config,
        lora=lora,
        dtype=dtype,
        transform_llm_=quantizer(quantization, dtype),
        ears=(teacher.whisper, teacher.second),
    )
    if connector == "teacher":
        for name in CONNECTOR[:3]:
            if getattr(teacher, name) is not None:
                getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
        if student.project.weight.shape == teacher.project.weight.shape:
            student.project.load_state_dict(teacher.project.state_dict())
    student.inherited_names = frozenset(n for n in teacher.own_names or () if n.split(".", 1)[0] in EARS)
    return train_own_(student)


def train_own_(student: Salmonn) -> Salmonn:
    """Make exactly LoRA and the connector trainable, in float32, in place."""
    for name, parameter in student.named_parameters():
        is_own = name.split(".", 1)[0] in CONNECTOR or "lora_" in name
        parameter.requires_grad_(is_own)
        if is_own:
            parameter.data = parameter.data.float()
    return student


def quantizer(quantization: str, dtype: torch.dtype):
    """The in-place transform of a LLM that a quantisation's name stands for; None for "none"."""
    if quantization == "none":
        return None

    def transform_(llm: nn.Module) -> None:
        quantize_4bit_(llm, compute_dtype=dtype)

    return transform_


def save_student(student: Salmonn, folder: str | Path, *, lora: Lora, quantization: str) -> None:
    """Write a folder that `load_student` reads: trainable tensors, names and hashes of the frozen rest, tokenizer."""
    save_salmonn(student, folder, settings={"lora": dataclasses.asdict(lora), "quantization": quantization})


def load_student(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Salmonn:
    """Load what `save_student` wrote, quantised as it was trained, in evaluation mode."""
    settings = read_config(folder)["settings"]
    return load_salmonn(folder, dtype=dtype, transform_llm_=quantizer(settings["quantization"], dtype))
