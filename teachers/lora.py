"""LoRA on a LLM's linear layers, through peft and in place. Source: Hu et al., 2021 (arXiv 2106.09685)."""

from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from torch import nn


@dataclass(frozen=True)
class Lora:
    """Which layers get LoRA and how large it is; the update is `alpha / rank` times B A."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # names of linear layers; SALMONN's own are these two


def add_lora_(llm: nn.Module, lora: Lora) -> None:
    """Freeze `llm` and give its target layers trainable LoRA matrices, in place.

    Raises:
        ValueError: no layer of the LLM has one of the target names.
    """
    llm.requires_grad_(False)
    names = {name.rsplit(".", 1)[-1] for name, _ in llm.named_modules()}
    missing = sorted(set(lora.targets) - names)
    if missing:
        raise ValueError(
            f"LoRA targets are {list(lora.targets)}, but {type(llm).__name__} has no layer named {missing}; "
            f"choose among its linear layers."
        )
    inject_adapter_in_model(
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            bias="none",
        ),
        llm,
    )
