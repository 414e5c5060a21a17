"""LoRA on a LLM's linear layers, through peft and in place. Source: Hu et al., 2021 (arXiv 2106.09685)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


ALL_LINEAR = ("all-linear",)  # targets: every linear layer but the head, as peft calls them


@dataclass(frozen=True)
class Lora:
    """Which layers get LoRA and how large it is; the update is `alpha / rank` times B A. Defaults: a student's."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    # names of linear layers
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def names_in(self, llm: "nn.Module") -> list[str]:
        """The last parts of the names of its layers in `llm`."""
        return linear_names(llm) if self.targets == ALL_LINEAR else list(self.targets)


SALMONN_LORA = Lora(rank=8, alpha=32.0, targets=("q_proj", "v_proj"))  # of the released teachers


def add_lora_(llm: "nn.Module", lora: Lora) -> None:
    """Freeze `llm` and give its target layers trainable LoRA matrices, in place.

    Raises:
        ValueError: no layer of the LLM has one of the target names.
    """
    # here, as the defaults above need not cost their seconds
    import teachers.fourbit  # noqa: F401 (before peft, which imports bitsandbytes too)

    # isort: split
    from peft import LoraConfig, inject_adapter_in_model

    llm.requires_grad_(False)
    names = {name.rsplit(".", 1)[-1] for name, _ in llm.named_modules()}
    targets = lora.names_in(llm)
    missing = sorted(set(targets) - names)
    if missing:
        raise ValueError(
            f"LoRA targets are {list(lora.targets)}, but {type(llm).__name__} has no layer named {missing}; "
            f"choose among its linear layers: {', '.join(linear_names(llm))}, or [all-linear] for all of them."
        )
    inject_adapter_in_model(
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            bias="none",
        ),
        llm,
    )


def linear_names(llm: "nn.Module") -> list[str]:
    """The names of the layers with one matrix, without the head: what LoRA can go on.

    The experts of a mixture have numbers for names and get none.
    """
    head = llm.get_output_embeddings()
    kinds = ("Linear", "Conv1D", "Linear4bit")  # GPT-2's is a Conv1D
    found = (name for name, module in llm.named_modules() if type(module).__name__ in kinds and module is not head)
    return sorted({last for name in found if not (last := name.rsplit(".", 1)[-1]).isdigit()})
