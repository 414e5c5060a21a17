"""The student a config names, at its start: its LLM, its ears, its LoRA. Knows no training."""

from collections.abc import Callable
from dataclasses import replace

import torch

from distill.config import Config
from distill.training.ranks import resolve_precision
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from students.ears import describe_ears_error, share_or_load_ears, with_ears
from students.hearing import Connector
from students.start import load_start_weights_
from students.student import build_student, give_prefix_
from teachers.lora import Lora
from teachers.salmonn import Salmonn

NUM_CLIPS = 4  # on which the error of ears in fewer bits is measured


def make_student(config: Config, model: Salmonn, dtype: torch.dtype, say: Callable[[str], None]) -> Salmonn:
    """The config's student, which hears as its teacher or with ears of its own, at its start.

    Args:
        config: the configuration of the run.
        model: the teacher.
        dtype: the data type of products, and of what is frozen and not in 4 bits.
        say: is told which parts start anew, and what a prefix adds.
    """
    student = build_student(
        model,
        student_llm(config),
        lora=lora_of(config),
        quantization=config.student.quantization,
        hearing=config.student.hearing,
        connector=Connector(config.student.connector, config.student.qformer_dropout),
        template=config.student.template,
        dtype=dtype,
        seed=config.seed,
        say=say,
    )
    if config.student.prefix_tokens:
        say(str(give_prefix_(student, config.student.prefix_tokens, seed=config.seed)))
    if config.student.start:
        load_start_weights_(
            student, config.student.start, lora=lora_of(config), quantization=config.student.quantization
        )
    return student


def tell_ears_error(config: Config, teacher: Salmonn, student: Salmonn, say: Callable[[str], None]) -> None:
    """Say what ears in fewer bits cost on the first clips of the training split; of whole ears nothing is said."""
    if student.config.ears_quantization in ("none", teacher.config.ears_quantization):
        return
    whole = replace(student.config, ears_quantization="none")
    hearing = config.student.hearing
    exact = share_or_load_ears(teacher, whole, resolve_precision(config.precision), train_ears=hearing.trains_ears)
    adapters = {name: x for name, x in student.whisper.state_dict().items() if "lora_" in name}
    exact[0].load_state_dict(adapters, strict=False)
    stream = ShardStream(config.shards("train"), Order(batch_size=NUM_CLIPS, shuffle=False, epochs=1))
    samples = next(iter(stream))
    say(describe_ears_error(with_ears(student, *exact).to(student.device), student, samples))


def student_llm(config: Config) -> str:
    """The student's LLM: `student.llm`, or what `distill teach` made.

    Raises:
        ValueError: the config names none.
    """
    if config.student.llm:
        return config.student.llm
    if config.scratch.steps:
        return str(config.run_folder / "scratch" / "student-llm")
    raise ValueError("student.llm is empty, but a student needs a LLM; give a folder or a hub id.")


def lora_of(config: Config) -> Lora:
    """The student's LoRA settings."""
    student = config.student
    return Lora(student.lora_rank, student.lora_alpha, student.lora_dropout, tuple(student.lora_targets))
