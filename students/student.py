"""A student: the teacher's Q-Former, and its ears or smaller ones, on a smaller LLM in 4 bits with LoRA.

Trained are LoRA, Q-Former, its LayerNorms and the projection, the routers of a mixture whose experts have LoRA, and a
prefix; frozen are the LLM's 4-bit weights, and the ears but where Whisper, or LoRA on it, is trained too.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from shards.status import print_status
from students.answering import prepare_to_answer_
from students.ears import (
    CONNECTOR,
    EARS,
    describe_ears,
    find_shared,
    inherit_connector_,
    inherited_names,
    share_or_load_ears,
)
from students.hearing import Connector, Hearing
from students.quantize import check_whole, quantize_4bit_
from teachers.experts import trained_router_names
from teachers.files.loading import build_salmonn, load_salmonn, read_config, save_salmonn
from teachers.lora import Lora
from teachers.salmonn import Salmonn
from teachers.words.prefix import Prefix, add_prefix_, describe_prefix, is_of_prefix
from teachers.words.rows import RowTokenizer
from teachers.words.templates import CHAT
from teachers.words.vocabulary import Vocabulary

LORA, HEARING, CONNECTOR_START = Lora(), Hearing(), Connector()  # of a student where nothing else is said


def build_student(
    teacher: Salmonn,
    llm: str,
    *,
    lora: Lora = LORA,
    quantization: str = "nf4",
    hearing: Hearing = HEARING,
    connector: Connector = CONNECTOR_START,
    template: str = "",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    say: Callable[[str], None] = print_status,
) -> Salmonn:
    """A student that hears with the teacher's own (shared, frozen) encoders, or with ones of its own.

    Args:
        teacher: whose ears, prompts and Q-Former sizes are inherited; its encoders are shared, not copied.
        llm: the student's LLM, a local folder or hub id.
        lora: LoRA on it.
        quantization: "nf4" or "none".
        hearing: ears other than the teacher's, or the teacher's in another form; whether Whisper, or LoRA on it, is
            trained.
        connector: what LayerNorms, Q-Former and projection start from, and their dropout.
        template: what stands around a prompt, see `SalmonnConfig`; empty: the teacher's. In its own chat form the
            student's answers end as its turns do.
        dtype: the data type of the LLM's products, of what is not quantized, and of ears of its own.
        seed: the seed of LoRA's and the connector's random weights, so that every rank starts from the same.
        say: is told which ears are its own, which tensors of the connector are not the teacher's, and when its answers
            end otherwise.

    Raises:
        ValueError: the names of the ears contradict each other, the LLM cannot be quantized so, or ears in few bits
            are to be trained.
        FileNotFoundError: there is no such encoder.
    """
    torch.manual_seed(seed)
    heard, words = hearing.of(teacher.config), choose_words(teacher, llm, template, say)
    config = dataclasses.replace(heard, llm=llm, qformer_dropout=connector.dropout, prefix_tokens=0, **words)
    student = build_salmonn(
        config,
        lora=lora,
        dtype=dtype,
        transform_llm_=quantizer(quantization, dtype),
        ears=share_or_load_ears(teacher, config, dtype, train_ears=hearing.trains_ears),
    )
    shared = find_shared(teacher.config, config, train_ears=hearing.trains_ears)
    if own := set(EARS) - shared:
        say(f"ears of its own: {describe_ears(config, own)}")
    if connector.start == "teacher":
        say(inherit_connector_(student, teacher))
    student.inherited_names = inherited_names(student, teacher, shared)
    return train_own_(student, train_ears=hearing.trains_ears)


def choose_words(teacher: Salmonn, llm: str, template: str, say: Callable[[str], None]) -> dict[str, str]:
    """What stands around a student's prompts and answers, by field of `SalmonnConfig`."""
    if template == CHAT:
        return {"template": CHAT, "end_token": "", "bos_token": ""}
    return {
        "template": template or teacher.config.template,
        "end_token": choose_end_token(teacher, llm, say),
        "bos_token": choose_bos_token(teacher, llm),
    }


def choose_end_token(teacher: Salmonn, llm: str, say: Callable[[str], None]) -> str:
    """The text that ends a student's answers: the teacher's, or none where its own tokenizer reads that otherwise.

    A student of another family then ends with its own end token: one step to generate instead of several, and one
    position to compare with the teacher's.
    """
    text = teacher.config.end_token
    if not text:
        return ""
    tokenizer = AutoTokenizer.from_pretrained(llm)
    own = RowTokenizer(tokenizer, teacher.rows.prompts, text, teacher.config.max_answer_tokens).end
    is_alike = own == teacher.rows.end or (len(own.tail) == 1 and not own.text)
    if is_alike or tokenizer.eos_token is None:
        return text
    say(f"answers end with {tokenizer.eos_token}, as {text} is {len(own.ids)} tokens of this student")
    return ""


def choose_bos_token(teacher: Salmonn, llm: str) -> str:
    """What begins a student's prompts: as its own tokenizer says, or the teacher's where all tokens are the same.

    Targets of a cache belong to a prompt's ids, which then are to be the teacher's.
    """
    text = teacher.config.bos_token
    if not text:
        return ""
    is_same = Vocabulary.of(AutoTokenizer.from_pretrained(llm)).sha256 == Vocabulary.of(teacher.tokenizer).sha256
    return text if is_same else ""


def give_prefix_(student: Salmonn, num_tokens: int, *, seed: int = 0) -> Prefix:
    """Put a prefix of so many tokens before each layer of a student's LLM, in place, to be trained.

    Returns:
        What it adds, and what it changes at the start.

    Raises:
        ValueError: the attention of its LLM takes none, or it has one.
    """
    add_prefix_(student.llm, num_tokens, seed=seed)
    student.config = dataclasses.replace(student.config, prefix_tokens=num_tokens)
    if student.own_names is not None:
        student.own_names |= {name for name, _ in student.named_parameters() if is_of_prefix(name)}
    return describe_prefix(student.llm)


def train_own_(student: Salmonn, *, train_ears: bool = False) -> Salmonn:
    """Make exactly what `trained_names` names trainable, in float32, in place.

    Raises:
        ValueError: it was loaded to answer alone.
    """
    if student.only_answers:
        raise ValueError(
            f"student was loaded to answer alone ({student.only_answers}), but training needs its weights as they were "
            f"trained; load it with load_student(folder), without for_inference."
        )
    trained = trained_names(student, train_ears=train_ears)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            parameter.data = parameter.data.float()
    return student


def trained_names(student: Salmonn, *, train_ears: bool = False) -> set[str]:
    """The names of the tensors that a student trains; of a mixture's routers where its experts have LoRA.

    Args:
        student: the model.
        train_ears: its Whisper too: all of it, or the LoRA that it has.
    """
    parts: dict[str, list[str]] = {}
    for name, _ in student.named_parameters():
        parts.setdefault(name.split(".", 1)[0], []).append(name)
    names = {name for part in CONNECTOR for name in parts.get(part, ())}
    names |= {name for name in parts["llm"] if "lora_" in name or is_of_prefix(name)}
    names |= {f"llm.{name}" for name in trained_router_names(student.llm)}
    if train_ears:
        names |= {name for name in parts["whisper"] if "lora_" in name or not student.config.ears_lora_rank}
    return names


def quantizer(quantization: str, dtype: torch.dtype):
    """The in-place transform of a LLM that a quantization's name stands for."""
    if quantization == "none":
        return check_whole

    def transform_(llm: nn.Module) -> None:
        quantize_4bit_(llm, compute_dtype=dtype)

    return transform_


def save_student(student: Salmonn, folder: str | Path, *, lora: Lora, quantization: str) -> None:
    """Write a folder that `load_student` reads: trainable tensors, names and hashes of the frozen rest, tokenizer."""
    save_salmonn(student, folder, settings={"lora": dataclasses.asdict(lora), "quantization": quantization})


def load_student(folder: str | Path, *, dtype: torch.dtype = torch.float32, for_inference: bool = False,
                 head: str = "auto") -> Salmonn:  # fmt: skip
    """Load what `save_student` wrote, quantized as it was trained, in evaluation mode.

    Args:
        folder: the folder of the student.
        dtype: the data type of the products, and of what is not quantized.
        for_inference: it is to answer on a processor, as fast as that can: see `students.answering`. It is then neither
            trained nor saved.
        head: what becomes of head and embeddings then: "auto", "whole", "bf16" or "int8".
    """
    settings = read_config(folder)["settings"]
    student = load_salmonn(folder, dtype=dtype, transform_llm_=quantizer(settings["quantization"], dtype))
    return prepare_to_answer_(student, head) if for_inference else student
