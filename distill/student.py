"""The student a config names, at its start: its LLM, its ears, its LoRA. Knows no training."""

from collections.abc import Callable

import torch

from distill.config import Config
from students.start import start_from_
from students.student import build_student
from teachers.lora import Lora
from teachers.salmonn import Salmonn


def make_student(config: Config, model: Salmonn, dtype: torch.dtype, say: Callable[[str], None]) -> Salmonn:
    """The config's student, which hears as its teacher or with ears of its own, at its start.

    Args:
        config: of the run.
        model: the teacher.
        dtype: of products, and of what is frozen and not in 4 bits.
        say: is told which parts start anew.
    """
    student = build_student(
        model,
        student_llm(config),
        lora=lora_of(config),
        quantization=config.student.quantization,
        connector=config.student.connector,
        qformer_dropout=config.student.qformer_dropout,
        windows=config.student.windows,
        ears_seconds=config.student.ears_seconds,
        **ears_of(config),
        dtype=dtype,
        seed=config.seed,
        say=say,
    )
    if config.student.start:
        start_from_(student, config.student.start, lora=lora_of(config), quantization=config.student.quantization)
    return student


def student_llm(config: Config) -> str:
    """The student's LLM: `student.llm`, or what `distill/teach.py` made.

    Raises:
        ValueError: the config names none.
    """
    if config.student.llm:
        return config.student.llm
    if config.scratch.steps:
        return str(config.run_folder / "scratch" / "student-llm")
    raise ValueError("student.llm is empty, but a student needs a LLM; give a folder or a hub id.")


def ears_of(config: Config) -> dict[str, str]:
    """The names of the student's own ears, as `build_student` takes them."""
    return {name: getattr(config.student, name) for name in ("whisper", "second", "second_kind")}


def lora_of(config: Config) -> Lora:
    """The student's LoRA settings."""
    student = config.student
    return Lora(student.lora_rank, student.lora_alpha, student.lora_dropout, tuple(student.lora_targets))
