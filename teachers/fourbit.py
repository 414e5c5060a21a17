"""bitsandbytes' 4-bit layers made safe to train: imported here and nowhere else, and never packed for answers.

What bitsandbytes 0.50 does by itself is undone here. Its import fetches compiled code from a hub and runs it where the
package `kernels` is installed, on a processor with AVX512-BF16. And on such a processor a layer in evaluation packs its
weight anew, in place, when it first answers; from then on it has no gradient, other weights, and dies where it is
narrower than 64. Knows no LLM: `students.quantize` makes 4-bit layers and reads them back.
"""

import importlib
import logging
import sys
from types import ModuleType

from torch import Tensor, nn

FLAG = "support_avx512bf16_for_cpu"  # of a layer: whether its first answer packs it


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, without what its import fetches and without the line that says that it did not fetch it."""
    logger, absent = logging.getLogger("bitsandbytes.backends.cpu.ops"), object()
    kernels = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # importing it is an error now, which bitsandbytes expects
    logger.addFilter(_is_no_alarm)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.removeFilter(_is_no_alarm)
        del sys.modules["kernels"]
        if kernels is not absent:
            sys.modules["kernels"] = kernels


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
