"""A mixture's experts as linear layers of their own, and its routers: for 4 bits, LoRA and the balance of experts.

Knows the fused experts of transformers, and which modules are routers that transformers itself balances. Knows no bits
and no file.

Shapes: S tokens, D LLM width, K experts that a token goes to, E experts, O outputs and I inputs of a matrix.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder


class Experts(nn.Module):
    """Experts that transformers fuses into 3-D weights, each again two linear layers.

    It computes what the fused module does with `experts_implementation="eager"`, bit by bit.

    Args:
        fused: a module for which `is_fused` holds; it is emptied, and keeps biases and activation.
        make: a linear layer of a weight, weight_OI.
    """

    def __init__(self, fused: nn.Module, make: Callable[[Tensor], nn.Module]):
        super().__init__()
        self.fused = fused
        self.up, self.down = (nn.ModuleList(map(make, self._take_(name))) for name in weight_names(fused))

    def _take_(self, name: str) -> Tensor:
        """Remove one of the fused weights: weight_EOI."""
        weight = self.fused.get_parameter(name).detach()
        self.fused.register_parameter(name, None)
        return weight.transpose(1, 2) if self.fused.is_transposed else weight

    def forward(self, hidden_SD: Tensor, experts_SK: Tensor, weights_SK: Tensor) -> Tensor:
        """Add up what the experts of each token make of it, weighted.

        An expert without a token is run on none where gradients are asked for, so that what it trains has one on every
        rank: zeros.
        """
        out_SD = torch.zeros_like(hidden_SD)
        runs_all = torch.is_grad_enabled() or hidden_SD.is_meta
        for expert in range(len(self.up)) if runs_all else experts_SK.unique().tolist():
            places, tokens = self._find(expert, experts_SK)
            made = self._run(expert, hidden_SD[tokens]) * weights_SK[tokens, places, None]
            out_SD.index_add_(0, tokens, made.to(out_SD.dtype))
        return out_SD

    def _find(self, expert: int, experts_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Where an expert was chosen: places among the K, and tokens. On the meta device each has an equal share."""
        if experts_SK.is_meta:
            share = experts_SK.new_zeros(-(-experts_SK.numel() // len(self.up)))
            return share, share
        return torch.where(experts_SK.T.eq(expert))

    def _run(self, expert: int, hidden_SD: Tensor) -> Tensor:
        fused, (up, down) = self.fused, (f"{name}_bias" for name in weight_names(self.fused))
        inner = self.up[expert](hidden_SD)
        if fused.has_bias:
            inner = inner + getattr(fused, up)[expert]
        out_SD = self.down[expert](fused._apply_gate(inner) if fused.has_gate else fused.act_fn(inner))
        if fused.has_bias:
            out_SD = out_SD + getattr(fused, down)[expert]
        return fused.post_expert_norm(out_SD) if fused.has_post_expert_norm else out_SD

    def fuse_(self, read: Callable[[nn.Module], Tensor]) -> nn.Module:
        """The fused module with its weights back, as `read` gives each layer's; this one is to be thrown away."""
        for name, layers in zip(weight_names(self.fused), (self.up, self.down)):
            weight_EOI = torch.stack([read(layer) for layer in layers])
            weight = weight_EOI.transpose(1, 2).contiguous() if self.fused.is_transposed else weight_EOI
            self.fused.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return self.fused


def split_experts_(llm: nn.Module, make: Callable[[Tensor], nn.Module] | None = None) -> None:
    """Make linear layers of every fused expert of a LLM, in place; `make` as `Experts` takes it, None: whole ones."""
    for name, module in list(llm.named_modules()):
        if is_fused(module):
            llm.set_submodule(name, Experts(module, make or whole_linear))


def is_fused(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused experts, whose flags say how their weights lie."""
    flags = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
    if not all(hasattr(module, flag) for flag in flags):
        return False
    fused = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return fused == set(weight_names(module))


def weight_names(fused: nn.Module) -> tuple[str, str]:
    """Of fused experts: into the inner width and out of it."""
    return ("gate_up_proj" if fused.has_gate else "up_proj"), "down_proj"


def whole_linear(weight_OI: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A frozen linear layer of this weight."""
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight_OI, requires_grad=False), bias
    return linear


def expert_names(llm: nn.Module) -> list[str]:
    """The ends of the names of all experts' linear layers, such as `experts.up.0`; none: the LLM has no experts."""
    names = set()
    for name, module in llm.named_modules():
        if isinstance(module, Experts):
            last = name.rpartition(".")[2]
            names |= {f"{last}.{kind}.{number}" for kind in ("up", "down") for number in range(len(module.up))}
    return sorted(names)


# Routers


def routers_of(llm: nn.Module) -> dict[str, nn.Module]:
    """A LLM's routers by name, in order: those whose logits transformers records and balances itself; or none.

    Routers with another rule (DeepSeek-V3's sigmoid with a bias that is kept in balance by hand) are not among them.
    """
    module = sys.modules[type(llm).__module__]
    recorded = getattr(llm, "_can_record_outputs", None) or {}
    spec = recorded.get("router_logits")
    is_known = isinstance(spec, OutputRecorder) and spec.index == 0 and hasattr(module, "load_balancing_loss_func")
    if not is_known:
        return {}
    return {name: found for name, found in llm.named_modules() if isinstance(found, spec.target_class)}


def free_routers_(llm: nn.Module) -> None:
    """Let the routers of a LLM be trained, in float32 whatever the rest is in, in place."""
    for router in routers_of(llm).values():
        router.float().requires_grad_(True)
        router.register_forward_pre_hook(_as_its_weights)


def _as_its_weights(router: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].to(next(router.parameters()).dtype), *inputs[1:]


def trained_router_names(llm: nn.Module) -> set[str]:
    """The names of the routers' tensors where LoRA sets their experts apart; else there are none to be trained."""
    if not any("lora_" in name for m in llm.modules() if isinstance(m, Experts) for name, _ in m.named_parameters()):
        return set()
    return {f"{name}.{part}" for name, router in routers_of(llm).items() for part, _ in router.named_parameters()}


@contextmanager
def record_routers(llm: nn.Module) -> Iterator[list[Tensor]]:
    """While it is open, a pass of the LLM leaves its routers' logits, layer by layer: logits_SE of every position."""
    logits: list[Tensor] = []

    handles = [
        router.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
        for router in routers_of(llm).values()
    ]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()
