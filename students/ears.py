"""The encoders of a student: the teacher's own frozen modules, or others; and how its connector is filled.

A student with other ears reads other frames. Every tensor of the teacher's connector that still fits is its start: of
the cross-attention's keys and values, which stand over both encoders' frames side by side, the columns of an encoder
whose frames are as wide as the teacher's. Knows no LLM.
"""

import copy
import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from shards.sample import Sample
from teachers.ears.encoders import WHISPER
from teachers.ears.lora import copy_layers
from teachers.ears.shape import reshape_ears_
from teachers.files.loading import load_ear
from teachers.salmonn import Salmonn, SalmonnConfig
from teachers.words.batch import pad_waveforms

EARS = ("whisper", "second")
CONNECTOR = ("ln_speech", "ln_audio", "qformer", "project")


def find_shared(teacher: SalmonnConfig, student: SalmonnConfig, *, train_ears: bool = False) -> frozenset[str]:
    """Which of `EARS` are the teacher's own modules: of one checkpoint, in one form, and not trained by the student."""
    is_other = train_ears or teacher.ears_lora_rank != student.ears_lora_rank
    return find_held(teacher, student, train_ears=train_ears) - ({"whisper"} if is_other else set())


def find_held(teacher: SalmonnConfig, student: SalmonnConfig, *, train_ears: bool = False) -> frozenset[str]:
    """Which of `EARS` have the teacher's own weights in memory, in its modules or in copies with LoRA around them."""
    has_bits = teacher.ears_quantization == student.ears_quantization
    is_whole = teacher.whisper_layers == student.whisper_layers and (not train_ears or student.ears_lora_rank > 0)
    return frozenset(name for name in find_same(teacher, student) if has_bits and (name != "whisper" or is_whole))


def find_same(teacher: SalmonnConfig, student: SalmonnConfig) -> frozenset[str]:
    """Which of `EARS` come from the teacher's checkpoint: they have one name or are one file."""
    has_whisper = is_same_place(student.whisper, teacher.whisper)
    has_second = student.second_kind == teacher.second_kind and is_same_place(student.second, teacher.second)
    return frozenset(name for name, is_shared in zip(EARS, (has_whisper, has_second)) if is_shared)


def is_same_place(own: str, theirs: str) -> bool:
    """Whether two names mean one checkpoint."""
    return own == theirs or (os.path.exists(own) and os.path.exists(theirs) and os.path.samefile(own, theirs))


def share_or_load_ears(
    teacher: Salmonn, config: SalmonnConfig, dtype: torch.dtype, *, train_ears: bool = False
) -> tuple[nn.Module, nn.Module | None]:
    """The encoders of a student's config, frozen: the teacher's own modules, copies of them in another form, or loaded.

    Args:
        teacher: whose ears they may be.
        config: the configuration of the student.
        dtype: the data type of those that are loaded.
        train_ears: the student's Whisper is to be trained, or LoRA on it, so it is no module of the teacher's; under
            LoRA its weights are the teacher's own.

    Raises:
        ValueError: layers are to be taken out of a Whisper that lacks some already, or it has LoRA of another rank.
    """
    same = find_same(teacher.config, config)
    shared = find_shared(teacher.config, config, train_ears=train_ears)
    held = find_held(teacher.config, config, train_ears=train_ears)
    if "whisper" in same:
        check_form(teacher.config, config)
    places = {"whisper": (WHISPER, config.whisper), "second": (config.second_kind, config.second)}
    ears, anew = {}, {}
    for name, (kind, path) in places.items():
        own = getattr(teacher, name)
        if name in shared or not path:
            ears[name] = own if name in shared else None
        else:
            copy_ear = copy_layers if name in held else copy.deepcopy
            ears[name] = anew[name] = copy_ear(own) if name in same else load_ear(kind, path, dtype)
    reshape_ears_(anew.get("whisper"), anew.get("second"), **config.ears_form)
    if train_ears:
        ears["whisper"].precision = None  # as the run's products are, not as a frozen teacher's
    return ears["whisper"], ears["second"]


def check_form(teacher: SalmonnConfig, student: SalmonnConfig) -> None:
    """Refuse what cannot be made of the teacher's Whisper.

    Raises:
        ValueError: it lacks layers already, or has LoRA of another rank.
    """
    if teacher.whisper_layers not in (0, student.whisper_layers):
        raise ValueError(
            f"whisper_layers is {student.whisper_layers}, but the teacher's Whisper has only "
            f"{teacher.whisper_layers} left; leave student.whisper_layers at 0, or at that."
        )
    if teacher.ears_lora_rank not in (0, student.ears_lora_rank):
        raise ValueError(
            f"ears_lora_rank is {student.ears_lora_rank}, but the teacher's Whisper has LoRA of rank "
            f"{teacher.ears_lora_rank}; set student.ears_lora_rank={teacher.ears_lora_rank} to train that on, or 0 to "
            f"hear with it."
        )


def inherited_names(student: Salmonn, teacher: Salmonn, shared: Collection[str]) -> frozenset[str]:
    """The student's tensors of ears that lie in no encoder's checkpoint, but in the teacher's own folder.

    Args:
        student, teacher: the models.
        shared: the ears that are one module in both.
    """
    names = set()
    for ear in find_same(teacher.config, student.config):
        theirs = {name for name in teacher.own_names or () if name.split(".", 1)[0] == ear}
        own = {name for name, _ in student.named_parameters() if name.split(".", 1)[0] == ear}
        names |= theirs if ear in shared else own if theirs else set()
    return frozenset(names)


def with_ears(model: Salmonn, whisper: nn.Module, second: nn.Module | None) -> Salmonn:
    """A model that hears with other encoders and shares all else with this one."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules) | {"whisper": whisper, "second": second}
    return twin


def narrow_ears_(student: Salmonn, bits: str) -> Salmonn:
    """Put the ears of a trained student in fewer bits, in place; they are copied, as others may hear with them.

    Returns:
        The student as it heard before, for `measure_ears_error`.

    Raises:
        ValueError: they are in fewer bits already.
    """
    if student.config.ears_quantization != "none":
        raise ValueError(
            f"ears are to be in {bits}, but they are in {student.config.ears_quantization} since training; leave them."
        )
    before = with_ears(student, student.whisper, student.second)
    student.whisper, student.second = copy.deepcopy(student.whisper), copy.deepcopy(student.second)
    reshape_ears_(student.whisper, student.second, ears_quantization=bits)
    student.config = dataclasses.replace(student.config, ears_quantization=bits)
    named = [name for name, _ in student.named_parameters()]
    own = {name.split(".", 1)[0] for name in student.own_names or () if "lora_" not in name} & set(EARS)
    student.own_names = frozenset(student.own_names or ()) | {n for n in named if n.split(".", 1)[0] in own}
    return before


def describe_ears_error(exact: Salmonn, near: Salmonn, samples: Sequence[Sample]) -> str:
    """One line on what ears in fewer bits cost: see `measure_ears_error`."""
    errors = measure_ears_error(exact, near, samples)
    found = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    return f"ears in {near.config.ears_quantization}: error of their frames on {len(samples)} clips {found}"


@torch.no_grad()
def measure_ears_error(exact: Salmonn, near: Salmonn, samples: Sequence[Sample]) -> dict[str, float]:
    """How far one model's frames are from another's of the same ears: norm of the difference by that of the exact.

    Args:
        exact, near: the models; `near` has ears in fewer bits.
        samples: clips.

    Returns:
        A share for each of `EARS` that there is.
    """
    waveforms_BN, num_samples_B = pad_waveforms([sample.waveform_N for sample in samples])
    both = []
    for model in (exact, near):
        both.append(model.frames(waveforms_BN.to(model.device), num_samples_B, ears_seconds=near.config.ears_seconds))
    pairs = zip(EARS, *both)  # a model without a second encoder has one
    return {name: float((x_BRE.cpu() - y_BRE.cpu()).norm() / x_BRE.norm().cpu()) for name, x_BRE, y_BRE in pairs}


def describe_ears(config: SalmonnConfig, names: Collection[str]) -> str:
    """Some of `EARS` by kind and checkpoint, in one line."""
    second = f"{config.second_kind} {config.second}" if config.second else "no second encoder"
    texts = {"whisper": f"whisper {config.whisper}", "second": second}
    return ", ".join(texts[name] for name in EARS if name in names)


@torch.no_grad()
def inherit_connector_(student: Salmonn, teacher: Salmonn) -> str:
    """Start the student's LayerNorms, Q-Former and projection from the teacher's, in place, wherever a tensor fits.

    Returns:
        What did not, in one line.
    """
    theirs, copied, anew = dict(teacher.named_parameters()), 0, {}
    for name, own in student.named_parameters():
        if name.split(".", 1)[0] not in CONNECTOR:
            continue
        source = theirs.get(name)
        if source is not None and source.shape == own.shape:
            own.copy_(source)
            copied += 1
        else:
            kept = [] if source is None else copy_columns_(own, source, frame_widths(student), frame_widths(teacher))
            note = f" (but its columns of {' and '.join(kept)} are not)" if kept else ""
            anew[re.sub(r"\.\d+\.", ".*.", name)] = note
    text = ", ".join(f"{name}{note}" for name, note in anew.items()) or "nothing"
    return f"connector: {copied} tensors start as the teacher's; new: {text}"


def copy_columns_(own: Tensor, source: Tensor, widths: Mapping[str, int], their_widths: Mapping[str, int]) -> list[str]:
    """Copy, in place, a matrix's columns over the frames of each encoder that is as wide as the teacher's.

    Args:
        own, source: matrices with a column for each number of both encoders' frames, or other tensors.
        widths, their_widths: of the encoders' frames, by name, in the order of the columns.

    Returns:
        The encoders whose columns were copied.
    """
    sizes = (sum(widths.values()), sum(their_widths.values()))
    if own.ndim != 2 or len(own) != len(source) or (own.shape[1], source.shape[1]) != sizes:
        return []
    blocks = dict(zip(widths, own.split(list(widths.values()), dim=1)))
    their_blocks = dict(zip(their_widths, source.split(list(their_widths.values()), dim=1)))
    kept = [name for name in blocks if name in their_blocks and widths[name] == their_widths[name]]
    for name in kept:
        blocks[name].copy_(their_blocks[name])
    return kept


def frame_widths(model: Salmonn) -> dict[str, int]:
    """How wide each encoder's frames are, in the order in which they stand side by side."""
    ears = {name: getattr(model, name) for name in EARS}
    return {name: ear.width for name, ear in ears.items() if ear is not None}
