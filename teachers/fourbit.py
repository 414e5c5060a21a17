"""bitsandbytes' 4-bit layers made safe to train, and fast to ask: imported here and nowhere else.

What bitsandbytes 0.50 does by itself is undone here. Its import fetches compiled code from a hub and runs it where the
package `kernels` is installed, on a processor with AVX512-BF16. And on such a processor a layer in evaluation packs its
weight anew, in place, when it first answers; from then on it has no gradient, other weights, and dies where it is
narrower than 64.

A packed layer answers some ten times as fast, in bfloat16 products: 0.3 % from the plain one's. So what a user reads is
answered packed (`evaluate`, `transcribe`, `Student`), through `packed_for_answers`; what weights come from is not: the
teacher's answers, a student's of an on-policy round, and the validation that chooses the best step are the same on
every processor. Knows no LLM: `students.quantize` makes 4-bit layers and reads them back.
"""

import copy
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

FLAG = "support_avx512bf16_for_cpu"  # of a layer: whether its first answer packs it
WORD_BYTES = 4
PACKED_OUTPUTS = 32  # a packed weight has whole blocks of so many rows


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, without what its import fetches and without the line that says that it did not fetch it.

    And without torch's compiler, a fifth of a command's start, which it asks for optimizers that few use.
    """
    logger, absent = logging.getLogger("bitsandbytes.backends.cpu.ops"), object()
    kernels = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # importing it is an error now, which bitsandbytes expects
    logger.addFilter(_is_no_alarm)
    compile_now, torch.compile = torch.compile, _compile_later
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile_now
        logger.removeFilter(_is_no_alarm)
        del sys.modules["kernels"]
        if kernels is not absent:
            sys.modules["kernels"] = kernels


def _compile_later(function: Callable | None = None, **options) -> Callable:
    """`torch.compile` as a decorator, which compiles when the function is first called."""
    if function is None:
        return functools.partial(_compile_later, **options)
    compiled = functools.cache(lambda: torch.compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


def _is_no_alarm(record: logging.LogRecord) -> bool:
    return "Failed to load CPU gemm_4bit_forward" not in record.getMessage()


bnb = import_bitsandbytes()


def keep_unpacked_(llm: nn.Module) -> None:
    """Forbid the 4-bit layers of a LLM, whoever made them, to pack themselves for answers, in place.

    An answer is slower so on a processor with AVX512-BF16, and as elsewhere. The layers stay so when they are moved,
    copied, pickled or loaded into.

    Raises:
        RuntimeError: this version of bitsandbytes has no such switch.
        ValueError: a layer has answered already and is packed.
    """
    for name, layer in llm.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        if not hasattr(layer, FLAG):
            raise RuntimeError(
                f"bitsandbytes is {bnb.__version__}, but its Linear4bit has no {FLAG}, without which an answer can "
                f"end the training of a 4-bit layer unseen; install a version of the range in setup.cfg."
            )
        check_unpacked(layer.weight, f"{name}.weight")
        setattr(layer, FLAG, False)


@contextmanager
def packed_for_answers(llm: nn.Module) -> Iterator[int]:
    """While it is open, 4-bit layers on a processor with AVX512-BF16 are packed when they first answer.

    Afterwards each has the weight and the state that it had before, the very tensors, however it ended. Layers that
    cannot be packed answer as ever; where the processor cannot, and inside another of these, nothing changes.

    Yields:
        How many layers may pack themselves.
    """
    kept = []
    try:
        for layer in find_packable(llm):
            weight = layer.weight
            kept.append((layer, weight.data, weight.quant_state))
            weight.quant_state = copy.copy(weight.quant_state)  # bitsandbytes changes it in place
            setattr(layer, FLAG, True)
        yield len(kept)
    finally:
        for layer, data, state in kept:
            setattr(layer, FLAG, False)
            layer.weight.data, layer.weight.quant_state = data, state


def pack_for_good_(llm: nn.Module) -> int:
    """Let 4-bit layers be packed when they first answer and stay so, in place, without a copy: for answers alone.

    Returns:
        How many layers there are that may; 0 where the processor has no AVX512-BF16.
    """
    layers = find_packable(llm)
    for layer in layers:
        setattr(layer, FLAG, True)
    return len(layers)


def find_packable(llm: nn.Module) -> list[nn.Module]:
    """The 4-bit layers that this processor multiplies faster packed, and that are not to be packed already."""
    if not bnb.nn.modules.has_avx512bf16():
        return []
    layers = [layer for layer in find_4bit(llm) if not getattr(layer, FLAG)]
    return [layer for layer in layers if layer.weight.device.type == "cpu" and fits_blocks(layer.weight.quant_state)]


def fits_blocks(state) -> bool:
    """Whether a weight of this quantization state has whole blocks, as the packed layout needs them."""
    num_outputs, num_inputs = state.shape
    return num_outputs % PACKED_OUTPUTS == 0 and num_inputs % state.blocksize == 0


def check_unpacked(weight: Tensor, name: str = "weight") -> None:
    """Refuse a 4-bit weight that bitsandbytes packed for answers: it cannot be read back or trained through.

    Raises:
        ValueError: it is packed.
    """
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"{name} is packed for answers on AVX512-BF16, but 4 bits are read and trained in bitsandbytes' plain "
            f"layout only; load the LLM again and let it answer inside a model that teachers.files.loading built."
        )


def to_words_(module: nn.Module) -> None:
    """Keep every 4-bit weight of a module as float32 words, in place, where only floating points are taken.

    bitsandbytes reads them as it does the bytes; a weight that fills no whole words stays as it is.
    """
    for layer in find_4bit(module):
        state, data = layer.weight.quant_state, layer.weight.data
        if data.numel() * data.element_size() % WORD_BYTES == 0:
            layer.quant_state = state  # where bitsandbytes looks for the state of a weight that is a plain parameter
            words = data.view(torch.uint8).view(-1, WORD_BYTES).view(torch.float32)
            layer.weight = nn.Parameter(words, requires_grad=False)


def from_words_(module: nn.Module) -> None:
    """Undo `to_words_`, in place."""
    for layer in find_4bit(module):
        if layer.weight.dtype == torch.float32:
            state = layer.quant_state
            layer.weight = bnb.nn.Params4bit(
                layer.weight.data.view(torch.uint8).view(-1, 1), requires_grad=False, quant_state=state,
                blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type,
                module=layer, bnb_quantized=True,
            )  # fmt: skip


def find_4bit(module: nn.Module) -> list[nn.Module]:
    """The 4-bit layers of a module."""
    return [layer for layer in module.modules() if isinstance(layer, bnb.nn.Linear4bit)]


def count_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights, and of the scales that 4-bit ones are read with."""
    total = 0
    for p in module.parameters():
        state = getattr(p, "quant_state", None)
        scales = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        total += sum(x.numel() * x.element_size() for x in (p, *scales))
    return total
