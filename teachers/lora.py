"""LoRA on a LLM's linear layers, through peft and in place. Source: Hu et al., 2021 (arXiv 2106.09685)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


ALL_LINEAR = "all-linear"  # target: every linear layer but the head and those of experts
LINEARS = ("Linear", "Conv1D", "Linear4bit")  # kinds of layers that LoRA goes on; GPT-2's is a Conv1D
EXPERTS = "experts"  # target: every matrix of every expert of a mixture, whose routers are trained then


@dataclass(frozen=True)
class Lora:
    """Which layers get LoRA and how large it is; the update is `alpha / rank` times B A. Defaults: a student's."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    # names of linear layers
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def names_in(self, llm: "nn.Module") -> list[str]:
        """The ends of the names of its layers in `llm`, whose experts are split."""
        from teachers.experts import expert_names

        found = []
        for target in self.targets:
            given = {ALL_LINEAR: linear_names, EXPERTS: expert_names}
            found += given[target](llm) if target in given else [target]
        return found


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

    from teachers.experts import free_routers_, split_experts_

    llm.requires_grad_(False)
    if EXPERTS in lora.targets:
        split_experts_(llm)
    check_targets(llm, lora)
    holder = inject_adapter_in_model(
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.names_in(llm),
            bias="none",
        ),
        hide_family(llm),
    )
    llm.peft_config = holder.peft_config  # what peft leaves on a LLM, for who writes SALMONN's own files
    if EXPERTS in lora.targets:
        free_routers_(llm)  # now, as peft freezes whatever is not its own


def check_targets(llm: "nn.Module", lora: Lora) -> None:
    """Refuse targets that a LLM has not.

    Raises:
        ValueError: naming them, and those that it has.
    """
    names, there = {name.rsplit(".", 1)[-1] for name, _ in llm.named_modules()}, linear_names(llm)
    missing = sorted({*lora.targets} - names - {ALL_LINEAR})
    if EXPERTS in lora.targets and not Lora(targets=(EXPERTS,)).names_in(llm):
        missing = [EXPERTS]
    if not there:
        raise ValueError(
            f"LoRA targets are {list(lora.targets)}, but no layer of {type(llm).__name__} is a {' or '.join(LINEARS)} "
            f"beside its head; choose another LLM."
        )
    if missing:
        raise ValueError(
            f"LoRA targets are {list(lora.targets)}, but {type(llm).__name__} has no layer named {missing}; "
            f"choose among its linear layers: {', '.join(there)}, or [{ALL_LINEAR}] for all of them; {EXPERTS} are a "
            f"mixture's alone."
        )


def hide_family(llm: "nn.Module") -> "nn.Module":
    """A module that holds a LLM and has no config: peft renames the targets of mixtures whose config it sees.

    It takes `gate_proj` for the fused experts' weight, which is not there once they are split.
    """
    from torch import nn

    holder = nn.Module()
    holder.llm, holder.is_loaded_in_4bit = llm, getattr(llm, "is_loaded_in_4bit", False)
    return holder


def linear_names(llm: "nn.Module") -> list[str]:
    """The names of the layers with one matrix, without the head: what LoRA can go on.

    The experts of a mixture have numbers for names and are not among them: see `EXPERTS`.
    """
    head = llm.get_output_embeddings()
    found = (name for name, module in llm.named_modules() if type(module).__name__ in LINEARS and module is not head)
    return sorted({last for name in found if not (last := name.rsplit(".", 1)[-1]).isdigit()})
