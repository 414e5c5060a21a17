"""A LLM's RMSNorms and gated MLPs on Liger's Triton kernels, for training on a GPU; what they compute stays the same.

Layer by layer, and of this LLM alone: Liger's own switch changes transformers for every model of the process, also for
the teacher, and computes a loss of its own. Knows LLMs of transformers.

Source: Hsu et al., "Liger Kernel", arXiv 2410.10989.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor, nn

PACKAGE, SERIES = "liger-kernel", "0.8"
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # whose layers compute what the kernels do


def check_kernels(llm: nn.Module, device: torch.device) -> None:
    """Refuse kernels where they do not run.

    Raises:
        ValueError: there is no GPU, the package is another or missing, or no layer of the LLM has one.
    """
    said = "train.kernels is liger, but"
    if device.type != "cuda":
        raise ValueError(f"{said} this run is on {device.type} and its kernels need a GPU; set train.kernels=none.")
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = "not installed"
    if found != SERIES and not found.startswith(f"{SERIES}."):
        raise ValueError(
            f"{said} {PACKAGE} is {found} and {SERIES} is needed; pip install '{PACKAGE}=={SERIES}.*', or set "
            f"train.kernels=none."
        )
    if not find_layers(llm):
        raise ValueError(
            f"{said} no layer of a {type(llm).__name__} has one, those of {', '.join(FAMILIES)} do; set "
            f"train.kernels=none."
        )


def find_layers(llm: nn.Module) -> list[nn.Module]:
    """The layers that have a kernel."""
    parts = ("RMSNorm", "MLP") if getattr(llm.config, "hidden_act", "") == "silu" else ("RMSNorm",)
    known = {family + part for family in FAMILIES for part in parts}
    return [layer for layer in llm.modules() if type(layer).__name__ in known]


def use_kernels_(llm: nn.Module) -> None:
    """Let every layer that has a kernel compute with it, in place, until `drop_kernels_`."""
    kernels = importlib.import_module("liger_kernel.transformers.functional")
    for layer in find_layers(llm):
        make = make_mlp if hasattr(layer, "act_fn") else make_norm
        layer.forward = make(layer, kernels)


def drop_kernels_(llm: nn.Module) -> None:
    """Undo `use_kernels_`, in place; a LLM that it was not done to stays as it is."""
    for layer in find_layers(llm):
        vars(layer).pop("forward", None)


def make_norm(layer: nn.Module, kernels: ModuleType):
    """RMSNorm's forward; the gradient that comes in is left as it is, as a residual may need it."""

    def forward(states: Tensor) -> Tensor:
        return kernels.liger_rms_norm(states, layer.weight, layer.variance_epsilon, in_place=False)

    return forward


def make_mlp(layer: nn.Module, kernels: ModuleType):
    """A gated MLP's forward."""

    def forward(states: Tensor) -> Tensor:
        return layer.down_proj(kernels.liger_swiglu(layer.gate_proj(states), layer.up_proj(states)))

    return forward
