"""What a student hears with: the teacher's frozen encoders, or others; and what its connector starts from.

A student with other ears reads other frames. Every tensor of the teacher's connector that still fits is its start: of
the cross-attention's keys and values, which stand over both encoders' frames side by side, the columns of an encoder
whose frames are as wide as the teacher's. Knows no LLM.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from shards.telling import tell
from teachers.ears.encoders import WHISPER, second_kinds, shares_spectrum
from teachers.files.loading import load_ear
from teachers.salmonn import Salmonn, SalmonnConfig

EARS = ("whisper", "second")
CONNECTOR = ("ln_speech", "ln_audio", "qformer", "project")
NONE = "none"  # as a second encoder's kind: there is to be no second encoder


def choose_ears(teacher: SalmonnConfig, *, whisper: str = "", second: str = "", second_kind: str = "") -> SalmonnConfig:
    """The teacher's config with a student's ears.

    Args:
        teacher: of whom what is not named is taken.
        whisper: folder or hub id; empty: the teacher's.
        second: file or folder of the second encoder; empty: the teacher's.
        second_kind: of `teachers.ears.encoders`, or "none" for no second encoder; empty: the teacher's.

    Raises:
        ValueError: the second encoder's name and kind contradict each other or the teacher's.
    """
    if second_kind == NONE and second:
        raise ValueError(f"student.second is {second!r}, but student.second_kind is 'none'; empty one of them.")
    if second and not (second_kind or teacher.second_kind):
        raise ValueError(
            f"student.second is {second!r}, but student.second_kind is empty and the teacher has no second encoder "
            f"whose kind it could be; set student.second_kind to {' or '.join(second_kinds())}."
        )
    if not second and second_kind not in ("", NONE, teacher.second_kind):
        raise ValueError(
            f"student.second_kind is {second_kind!r}, but student.second is empty and the teacher's second encoder is "
            f"{teacher.second_kind or NONE!r}; give the {second_kind} file as student.second."
        )
    if second_kind == NONE:
        kept = {"second": "", "second_kind": ""}
    else:
        kept = {"second": second or teacher.second, "second_kind": second_kind or teacher.second_kind}
    front_end = teacher.front_end if shares_spectrum(kept["second_kind"]) else "exact"
    return dataclasses.replace(teacher, whisper=whisper or teacher.whisper, front_end=front_end, **kept)


def find_shared(teacher: SalmonnConfig, student: SalmonnConfig) -> frozenset[str]:
    """Which of `EARS` are the teacher's own: they have one name or are one file."""
    has_whisper = is_same_place(student.whisper, teacher.whisper)
    has_second = student.second_kind == teacher.second_kind and is_same_place(student.second, teacher.second)
    return frozenset(name for name, is_shared in zip(EARS, (has_whisper, has_second)) if is_shared)


def is_same_place(own: str, theirs: str) -> bool:
    """Whether two names mean one checkpoint."""
    return own == theirs or (os.path.exists(own) and os.path.exists(theirs) and os.path.samefile(own, theirs))


def share_or_load_ears(
    teacher: Salmonn, config: SalmonnConfig, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module | None]:
    """The encoders of a student's config: the teacher's own modules where they are the same, others loaded, frozen."""
    shared = find_shared(teacher.config, config)
    whisper = teacher.whisper if "whisper" in shared else load_ear(WHISPER, config.whisper, dtype)
    if "second" in shared:
        return whisper, teacher.second
    return whisper, load_ear(config.second_kind, config.second, dtype) if config.second else None


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


def print_to_stderr(text: str) -> None:
    """Tell whoever builds a student."""
    tell(text)
