"""4-bit weights: a LLM's linear layers and fused experts become NF4 with double quantization, in place, and back.

Knows which weights of a LLM have a 4-bit form and how many are in it. Knows no LoRA and no file.

Shapes: O outputs and I inputs of a matrix.
Source: Dettmers et al., QLoRA, 2023 (arXiv 2305.14314).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

from teachers.experts import Experts, split_experts_, whole_linear
from teachers.fourbit import bnb, check_unpacked, keep_unpacked_
from teachers.int8 import is_linear
from teachers.words.prefix import is_of_prefix

MOST_WHOLE = 0.05  # of the weights between embeddings and head: routers, short convolutions and the like


def quantize_4bit_(llm: nn.Module, *, compute_dtype: torch.dtype = torch.float32) -> None:
    """Replace every linear layer of `llm` but its head, and its fused experts, by 4-bit ones, in place.

    The head stays whole: it is tied to the embeddings in small LLMs, and the objective reads it row by row. Layers of a
    pre-quantized folder keep their 4 bits.

    Args:
        llm: a causal LM of transformers.
        compute_dtype: the data type of the products; float32 on a CPU, bfloat16 on a GPU.

    Raises:
        ValueError: it is quantized otherwise, or much of it has no 4-bit form here.
    """
    head = llm.get_output_embeddings()
    for name, module in list(llm.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            _adopt_(module, name, compute_dtype)
        elif is_linear(module) and module is not head:
            llm.set_submodule(name, to_4bit(module, compute_dtype))
    split_experts_(llm, lambda weight_OI: to_4bit(whole_linear(weight_OI), compute_dtype))
    check_share(llm)
    keep_unpacked_(llm)
    llm.is_loaded_in_4bit = True  # peft looks here before it puts LoRA on a 4-bit layer


def to_4bit(linear: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    """One linear layer as NF4 with double quantization, on the same device."""
    small = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    small.weight = bnb.nn.Params4bit(
        linear.weight.detach().cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=small
    )
    small.bias = linear.bias
    # bitsandbytes packs the weights when they are moved to a device
    return small.to(linear.weight.device)


def _adopt_(layer: nn.Module, name: str, compute_dtype: torch.dtype) -> None:
    """Let a layer that came in 4 bits multiply in `compute_dtype`, forward and backward, as those made here do."""
    state = layer.weight.quant_state
    if state.quant_type != "nf4":
        raise ValueError(
            f"{name} of the LLM is stored in {state.quant_type}, but student.quantization is nf4; name the folder of "
            f"the whole LLM, or one in nf4."
        )
    layer.compute_dtype, layer.compute_type_is_set, state.dtype = compute_dtype, True, compute_dtype


@torch.no_grad()
def dequantize_(llm: nn.Module) -> None:
    """Turn every 4-bit layer of a LLM, whoever made it, into a whole one in float32, in place."""
    for name, module in list(llm.named_modules()):
        if isinstance(module, Experts):
            llm.set_submodule(name, module.fuse_(lambda layer: dequantize(layer.weight)))
    for name, module in list(llm.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            llm.set_submodule(name, whole_linear(dequantize(module.weight), module.bias))
    llm.is_loaded_in_4bit = False
    if hasattr(llm, "hf_quantizer"):
        _forget_folder_(llm)


def _forget_folder_(llm: nn.Module) -> None:
    """Let transformers save a LLM that came in 4 bits as the whole one it is now."""
    llm.hf_quantizer.remove_quantization_config(llm)
    kept = getattr(llm, "_weight_conversions", None) or []  # from the folder's tensors to the model's: undone on saving
    llm._weight_conversions = [c for c in kept if not any(isinstance(o, Bnb4bitDeserialize) for o in operations(c))]


def operations(conversion) -> list:
    """Of one of transformers' conversions; a mere renaming has none."""
    return getattr(conversion, "operations", None) or []


def dequantize(weight: Tensor) -> Tensor:
    """A linear layer's weight in float32, read back from its 4 bits where it has those.

    Raises:
        ValueError: bitsandbytes packed it for answers.
    """
    if isinstance(weight, bnb.nn.Params4bit):
        check_unpacked(weight)
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.detach().float()


@dataclass(frozen=True)
class Share:
    """How much of a LLM is truly in 4 bits, LoRA and a prefix left out."""

    num_4bit: int  # weights
    whole: dict[str, int]  # number of weights that are not, by name

    @property
    def value(self) -> float:
        return self.num_4bit / max(self.num_4bit + sum(self.whole.values()), 1)

    def __str__(self) -> str:
        total = self.num_4bit + sum(self.whole.values())
        largest = max(self.whole, key=self.whole.__getitem__, default=None)
        rest = f"; the largest of the rest is {largest} with {self.whole[largest]:,}" if largest else ""
        return f"{self.value:.1%} of the LLM's weights are in 4 bits ({self.num_4bit:,} of {total:,}{rest})"


def measure_share(llm: nn.Module) -> Share:
    """Count a LLM's weights, embeddings and head included, a tied one once."""
    num_4bit, whole = 0, {}
    for name, weight in llm.named_parameters():
        if isinstance(weight, bnb.nn.Params4bit):
            num_4bit += weight.quant_state.shape.numel()
        elif "lora_" not in name and not is_of_prefix(name):
            whole[name] = weight.numel()
    return Share(num_4bit, whole)


def check_share(llm: nn.Module) -> None:
    """Refuse a LLM that would be called 4-bit while much of it between embeddings and head is not.

    Raises:
        ValueError: naming the share, the weight and its module.
    """
    outside = {id(p) for m in llm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outside |= {id(p) for p in llm.get_output_embeddings().parameters()}
    body = {name for name, p in llm.named_parameters() if id(p) not in outside}
    share = measure_share(llm)
    share = Share(share.num_4bit, {name: number for name, number in share.whole.items() if name in body})
    if 1 - share.value > MOST_WHOLE:
        name = max(share.whole, key=share.whole.__getitem__)
        kind = type(llm.get_submodule(name.rpartition(".")[0])).__name__
        raise ValueError(
            f"student.quantization is nf4, but {1 - share.value:.0%} of the layers' weights in this "
            f"{type(llm).__name__} have no 4-bit form here ({name} of a {kind} and others); set it to none, or choose "
            f"another LLM."
        )


def check_whole(llm: nn.Module) -> None:
    """Refuse a LLM that came in 4 bits for a student that is said to have none.

    Raises:
        ValueError: naming the share.
    """
    share = measure_share(llm)
    if share.num_4bit:
        raise ValueError(
            f"student.quantization is none, but {share} as its folder has them; set it to nf4, or name the folder of "
            f"the whole LLM."
        )


def nf4_bytes(num_weights: int) -> float:
    """Bytes of so many weights in NF4 with double quantization: 4 bits, and 0.127 bits for the scales.

    Blocks of 64 weights share an 8-bit scale; 256 of those share a float32 and all share an offset.
    """
    return num_weights * (4 + 8 / 64 + 32 / (64 * 256)) / 8
