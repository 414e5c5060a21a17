"""A sparse mixture made of a dense LLM: each layer's experts start as copies of its feed-forward, behind a new router.

Equal to the dense LLM at the start, whatever the router says: the weights of the chosen experts sum to one. Which
experts the router sends a token to, and what sets them apart, is left to training. Knows no audio and no data.

Shapes: B batch, T positions, E experts, D LLM width, I inner width of a feed-forward, V vocabulary.
Source: Komatsuzaki et al., "Sparse Upcycling", ICLR 2023 (arXiv 2212.05055).
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from shards.files.write import staged
from shards.status import print_status
from teachers.files.loading import load_llm

REPORT, CONFIG = "upcycle.json", "config.json"
# By the family of a dense LLM: that of transformers whose layers differ in their feed-forward alone
MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
PROBE = (2, 32)  # rows and positions of the random ids on which both are compared


@dataclass(frozen=True)
class Upcycled:
    """What became of a LLM."""

    family: str  # of transformers
    experts: int  # of a layer
    top_k: int  # of them, that a token goes to
    dense_parameters: int
    parameters: int
    active_parameters: int  # that a token passes, embeddings and head included
    bytes: int  # of the weights as they are stored
    difference: float  # the largest of logits to the dense LLM's, both in float32
    largest_logit: float
    same_greedy: int  # ids that both find likeliest
    num_probed: int  # of so many

    def __str__(self) -> str:
        return "\n".join([
            f"  dense   {self.dense_parameters / 1e6:10,.1f} M parameters",
            f"  mixture {self.parameters / 1e6:10,.1f} M parameters, {self.bytes / 1e9:.2f} GB; a token passes "
            f"{self.active_parameters / 1e6:,.1f} M",
            f"  change  {self.difference:.1e} in logits of up to {self.largest_logit:.3g}; {self.same_greedy} of "
            f"{self.num_probed} greedy ids are the same",
        ])  # fmt: skip


def upcycle_moe(llm: nn.Module, *, experts: int, top_k: int, seed: int = 0) -> nn.Module:
    """The mixture that computes what a dense LLM does.

    Its tensors are the dense LLM's own, and the experts of a layer share one storage: see `part_experts_`.

    Args:
        llm: a causal LM of a family in `MIXTURES`.
        experts: how many each layer gets.
        top_k: to how many of them a token goes.
        seed: decides the routers, which are drawn as the family draws its new weights.

    Raises:
        ValueError: the numbers do not fit, or there is no mixture of this family.
    """
    check_numbers(experts, top_k)
    config = mixture_config(llm.config, experts, top_k)
    with init_empty_weights(include_buffers=False):
        mixture = AutoModelForCausalLM.from_config(config, dtype=llm.dtype)
    tensors = mixture_tensors(llm, experts, seed)
    check_places(llm, mixture, tensors)
    mixture.load_state_dict(tensors, assign=True)
    mixture.tie_weights()
    mixture.generation_config = llm.generation_config
    return mixture.train(llm.training)


def check_numbers(experts: int, top_k: int) -> None:
    """Refuse a mixture that is none.

    Raises:
        ValueError: naming the number.
    """
    if experts < 2:
        raise ValueError(f"--experts is {experts}, but a mixture has 2 or more; give 8, say.")
    if not 1 <= top_k <= experts:
        raise ValueError(f"--top-k is {top_k}, but a token goes to 1 to {experts} of {experts} experts; give 2, say.")


def check_places(llm: nn.Module, mixture: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a LLM with a tensor that its mixture has no place for, or without one that it needs.

    Raises:
        ValueError: naming the tensor.
    """
    odd = sorted(tensors.keys() ^ mixture.state_dict().keys())
    if odd:
        has_it = odd[0] in tensors
        raise ValueError(
            f"LLM is a {type(llm).__name__} {'with' if has_it else 'without'} {odd[0]}, but a {type(mixture).__name__} "
            f"has it {'not' if has_it else 'always'}; take one as Llama, Mistral and Qwen3 are published, without "
            f"biases."
        )


def mixture_config(dense: PretrainedConfig, experts: int, top_k: int) -> PretrainedConfig:
    """The config of a mixture of a dense LLM: the same rope, heads, ids and norms.

    Raises:
        ValueError: there is no mixture of this family here.
    """
    family = dense.model_type
    if family not in MIXTURES:
        raise ValueError(
            f"LLM is of family {family}, but a mixture is made of {', '.join(MIXTURES)} alone: transformers has no "
            f"mixture whose layers are otherwise those of {family}; choose one of these."
        )
    if getattr(dense, "quantization_config", None) is not None:
        raise ValueError(
            "LLM is stored in few bits, but experts are copies of a whole feed-forward; name the folder of the whole "
            "LLM (student.quantization=nf4 puts the mixture in 4 bits)."
        )
    if family == "qwen3" and dense.use_sliding_window:
        raise ValueError(
            "use_sliding_window of the LLM is true, but a mixture of Qwen3 looks back over everything; take one "
            "without, as Qwen3 is published."
        )
    target = AutoConfig.for_model(MIXTURES[family])
    own = {"model_type", "architectures", "transformers_version", "_name_or_path", "attention_bias", "mlp_bias",
           "pretraining_tp", "layer_types", "max_window_layers", "dtype"}  # fmt: skip
    kept = {key: value for key, value in dense.to_dict().items() if key not in own}
    if MIXTURES[family] == "qwen3_moe":
        kept |= {"moe_intermediate_size": dense.intermediate_size, "decoder_sparse_step": 1, "norm_topk_prob": True}
    return type(target)(**kept, num_experts_per_tok=top_k, num_local_experts=experts)


def mixture_tensors(llm: nn.Module, experts: int, seed: int) -> dict[str, Tensor]:
    """The tensors of a mixture by name: the dense LLM's, each feed-forward as so many experts, and new routers."""
    config, tensors = llm.config, dict(llm.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for number in range(config.num_hidden_layers):
        block = f"model.layers.{number}.mlp"
        gate_ID, up_ID, down_DI = (tensors.pop(f"{block}.{name}.weight") for name in FEED_FORWARD)
        tensors[f"{block}.experts.gate_up_proj"] = torch.cat([gate_ID, up_ID]).expand(experts, -1, -1)
        tensors[f"{block}.experts.down_proj"] = down_DI.expand(experts, -1, -1)
        router_ED = torch.randn(experts, config.hidden_size, generator=generator) * config.initializer_range
        tensors[f"{block}.gate.weight"] = router_ED.to(gate_ID)
    return tensors


def part_experts_(mixture: nn.Module, dtype: torch.dtype) -> None:
    """Give each expert weights of its own, in place, and all of the mixture this data type: to be saved or trained."""
    for module in mixture.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim == 3:
                module.register_parameter(name, nn.Parameter(weight.detach().to(dtype).contiguous()))
    mixture.to(dtype)


@torch.no_grad()
def describe(dense: nn.Module, mixture: nn.Module, dtype: torch.dtype) -> Upcycled:
    """How large a mixture is, stored in `dtype`, and how its logits differ from the dense LLM's on random ids."""
    config = mixture.config
    ids_BT = torch.randint(config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    before_BTV, after_BTV = (llm(ids_BT, use_cache=False).logits for llm in (dense, mixture))
    parameters = sum(p.numel() for p in mixture.parameters())
    of_one_expert = sum(p[0].numel() for p in mixture.parameters() if p.ndim == 3)
    return Upcycled(
        family=config.model_type,
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        dense_parameters=sum(p.numel() for p in dense.parameters()),
        parameters=parameters,
        active_parameters=parameters - (config.num_local_experts - config.num_experts_per_tok) * of_one_expert,
        bytes=parameters * dtype.itemsize,
        difference=float((after_BTV - before_BTV).abs().max()),
        largest_logit=float(before_BTV.abs().max()),
        same_greedy=int((after_BTV.argmax(-1) == before_BTV.argmax(-1)).sum()),
        num_probed=ids_BT.numel(),
    )


def upcycle(llm: str, out: Path, *, experts: int, top_k: int, seed: int = 0) -> Upcycled:
    """Write a mixture's folder: weights in the dense LLM's own type, config, tokenizer, and `upcycle.json`.

    Args:
        llm: folder or hub id.
        out: a new folder.
        experts, top_k, seed: as `upcycle_moe` takes them.

    Raises:
        FileExistsError: there is something at `out`.
        ValueError: the numbers do not fit, or there is no mixture of this family.
    """
    check_numbers(experts, top_k)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"OUT is {out}, but it holds files already; name a new folder.")
    dense, tokenizer = load_llm(llm, torch.float32).eval(), AutoTokenizer.from_pretrained(llm)
    dtype = AutoConfig.from_pretrained(llm).dtype or torch.float32
    mixture = upcycle_moe(dense, experts=experts, top_k=top_k, seed=seed)
    upcycled = describe(dense, mixture, dtype)
    del dense
    part_experts_(mixture, dtype)
    with staged(out, last=CONFIG) as stage:
        mixture.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        (stage / REPORT).write_text(json.dumps({"llm": llm, "seed": seed, **asdict(upcycled)}, indent=1))
    return upcycled


def main(args: argparse.Namespace) -> int:
    """Run `distill upcycle`."""
    upcycled = upcycle(args.llm, args.out, experts=args.experts, top_k=args.top_k, seed=args.seed)
    print(upcycled)
    print_status(f"LLM: {args.out} ({upcycled.family}, {upcycled.top_k} of {upcycled.experts} experts a token)")
    return 0
