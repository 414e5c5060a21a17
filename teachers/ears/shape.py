"""What becomes of an ear's checkpoint before it hears: fewer layers, linear layers in fewer bits, LoRA beside them.

All are said by a model's config, and done where its ears are loaded or copied. Knows no model around them.
"""

from collections.abc import Iterable

from torch import nn

from teachers.ears.lora import add_ear_lora_
from teachers.int8 import BITS, narrow_linears_

QUANTIZATIONS = ("none", *BITS)
FORM = ("whisper_layers", "ears_quantization", "ears_lora_rank")  # of ears: fields of a `SalmonnConfig`


def reshape_ears_(whisper: nn.Module | None, second: nn.Module | None, *, whisper_layers: int = 0,
                  ears_quantization: str = "none", ears_lora_rank: int = 0) -> None:  # fmt: skip
    """Change ears as they are loaded into those that a config describes, in place; they stay frozen.

    Args:
        whisper, second: the ears that are not in that form yet; None: there is none.
        whisper_layers: that Whisper keeps; 0: all.
        ears_quantization: how the linear layers of both are kept, one of `QUANTIZATIONS`.
        ears_lora_rank: the rank of LoRA on Whisper's; 0: none.

    Raises:
        ValueError: it has not so many layers.
    """
    if whisper is not None and whisper_layers:
        keep_layers_(whisper, whisper_layers)
    if ears_quantization != "none":
        for ear in present(whisper, second):
            narrow_linears_(ear, ears_quantization)
    if whisper is not None and ears_lora_rank:
        add_ear_lora_(whisper, ears_lora_rank)


def present(*ears: nn.Module | None) -> Iterable[nn.Module]:
    """Those that there are."""
    return (ear for ear in ears if ear is not None)


def keep_layers_(whisper: nn.Module, num_layers: int) -> None:
    """Leave a Whisper so many of its layers, evenly spread from the first to the last, in place.

    Raises:
        ValueError: it has not so many.
    """
    encoder, count = whisper.encoder, len(whisper.encoder.layers)
    if num_layers > count:
        raise ValueError(
            f"whisper_layers is {num_layers}, but this Whisper has {count}; choose at most so many, or 0 for all."
        )
    encoder.layers = nn.ModuleList(encoder.layers[place] for place in even_places(num_layers, count))
    encoder.config.encoder_layers = num_layers


def even_places(number: int, of: int) -> list[int]:
    """So many places among `of`, the first and the last among them where there are two or more."""
    return [round(i * (of - 1) / max(number - 1, 1)) for i in range(number)]
