"""A student that only answers, made as fast and as small as its processor allows: it is neither trained nor saved.

Each step is one that a processor must have something for, and is left out where it has not: ears in bfloat16 (AMX), 4
bits packed (AVX512-BF16), head and embeddings in fewer bits. On a GPU there is nothing to do: there the whole student
is in bfloat16. What it costs in accuracy is in docs/ears.md. Knows no file.
"""

import torch
from torch import nn

from teachers.ears.precision import has_amx_bf16, set_ear_precision_
from teachers.fourbit import pack_for_good_
from teachers.int8 import BITS, is_linear, narrow_head_
from teachers.salmonn import Salmonn

HEADS = ("auto", "whole", *BITS)  # "auto": bf16 with AMX, else whole
AS_TRAINED = "its weights as they were trained"  # where a processor has nothing faster


def prepare_to_answer_(student: Salmonn, head: str = "auto") -> Salmonn:
    """Change a loaded student, on a processor, into one that only answers, in place.

    Args:
        student: in evaluation mode, frozen.
        head: what becomes of the LLM's head and embeddings, one of `HEADS`.

    Raises:
        ValueError: there is no such form of a head, or this LLM's has none.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}, but must be one of {', '.join(HEADS)}; choose one.")
    has_amx, done = has_amx_bf16(), []
    if has_amx:
        for ear in find_wide_ears(student):
            set_ear_precision_(ear, "bf16")
            done.append(f"{type(ear).__name__.removesuffix('Ear')} in bf16")
    bits = choose_head(student.llm, head, has_amx)
    if bits != "whole":
        narrow_head_(student.llm, bits)
        done.append(f"head and embeddings in {bits}")
    if num_layers := pack_for_good_(student.llm):
        done.append(f"{num_layers} 4-bit layers packed for AVX512-BF16")
    student.only_answers = ", ".join(done) or AS_TRAINED
    return student


def find_wide_ears(student: Salmonn) -> list[nn.Module]:
    """The ears that are in float32."""
    ears = [ear for ear in (student.whisper, student.second) if ear is not None]
    return [ear for ear in ears if any(p.dtype == torch.float32 for p in ear.parameters())]


def choose_head(llm: nn.Module, head: str, has_amx: bool) -> str:
    """In which bits a head is to be: "whole", or one of `BITS`."""
    if head != "auto":
        return head
    parts = llm.get_input_embeddings(), llm.get_output_embeddings()
    is_plain = type(parts[0]).forward is nn.Embedding.forward and is_linear(parts[1])
    return "bf16" if has_amx and is_plain and parts[1].weight.dtype == torch.float32 else "whole"
