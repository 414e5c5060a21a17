"""A prefix of learned keys and values that every position of a LLM sees before its own: prefix tuning, in place.

A prompt without words, for each layer its own. The layers stay as they are: transformers hands their queries, keys and
values to an attention function that it looks up by name, and the one registered here puts the prefix before keys and
values and goes on as "sdpa". So nothing else knows of it: a prefix has no position, no place in a cache of keys and in
no mask. Knows no audio and no training.

Shapes: B batch, H heads, G heads of keys and values, P prefix tokens, T LLM positions, C positions that are seen, the
cached ones among them, W width of a head, D LLM width.
Source: Li and Liang, "Prefix-Tuning", ACL 2021 (arXiv 2101.00190).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA, BEHIND_PREFIX = "sdpa", "sdpa_behind_prefix"  # names of attention functions
KEYS, VALUES = "prefix_keys", "prefix_values"  # of an attention
KEY_SCALE = 0.5  # standard deviation of keys at the start: the larger, the more attention they draw from what is said
PROBE = 16  # random ids, with and without the prefix before them


@dataclass(frozen=True)
class Prefix:
    """What a prefix adds to a LLM, and what it changes."""

    tokens: int  # of a layer
    layers: int
    parameters: int
    bytes: int
    difference: float  # the largest of logits to the LLM's without it
    largest_logit: float

    def __str__(self) -> str:
        return (
            f"a prefix of {self.tokens} tokens in {self.layers} layers: {self.parameters / 1e6:.3g} M parameters, "
            f"{self.bytes / 1e6:.3g} MB; it changes logits of up to {self.largest_logit:.3g} by up to "
            f"{self.difference:.2g}"
        )


def add_prefix_(llm: nn.Module, num_tokens: int, *, seed: int = 0) -> None:
    """Let every attention of a LLM see so many keys and values of its own before all others, in place, in float32.

    At the start the keys are random and the values zero, so that an answer only loses what attention they draw. A query
    sees them as it sees a key at its own position.

    Args:
        llm: a causal LM of transformers, with or without LoRA and 4 bits.
        num_tokens: keys and values in each layer.
        seed: decides the keys.

    Raises:
        ValueError: the attention of this family takes no prefix, or the LLM has one.
    """
    attentions, generator = find_attentions(llm), torch.Generator().manual_seed(seed)
    for attention in attentions:
        num_heads = attention.k_proj.out_features // attention.head_dim
        widths = attention.head_dim, attention.v_proj.out_features // num_heads
        keys_GPW = KEY_SCALE * torch.randn(num_heads, num_tokens, widths[0], generator=generator, device="cpu")
        values_GPW = torch.zeros(num_heads, num_tokens, widths[1], device="cpu")
        for name, tensor in ((KEYS, keys_GPW), (VALUES, values_GPW)):
            attention.register_parameter(name, nn.Parameter(tensor.to(attention.k_proj.weight.device)))
    llm.set_attn_implementation(BEHIND_PREFIX)


def find_attentions(llm: nn.Module) -> list[nn.Module]:
    """The attentions of a LLM, one a layer, where they can have a prefix.

    Raises:
        ValueError: they cannot, or they have one.
    """
    found = [m for m in llm.modules() if all(hasattr(m, name) for name in ("k_proj", "v_proj", "head_dim"))]
    is_looked_up = llm.config._attn_implementation == SDPA and llm._can_set_attn_implementation()
    if has_prefix(llm):
        raise ValueError(f"LLM is a {type(llm).__name__} with a prefix, but it takes one; load it without.")
    if not is_looked_up or len(found) != llm.config.get_text_config().num_hidden_layers:
        raise ValueError(
            f"LLM is a {type(llm).__name__}, but a prefix goes before keys and values of layers that all have k_proj, "
            f"v_proj and an attention that transformers looks up as {SDPA}, as Llama, Qwen, Mistral, Mixtral and Gemma "
            f"have; set student.prefix_tokens=0, or choose one of these."
        )
    return found


def attend_behind_prefix(attention: nn.Module, query_BHTW: Tensor, key_BGCW: Tensor, value_BGCW: Tensor,
                         attention_mask: Tensor, **options) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls for a layer's attention: "sdpa" over the layer's prefix and the keys that are seen.

    Args:
        attention: the layer's module, which has the prefix.
        query_BHTW, key_BGCW, value_BGCW: with their rotations.
        attention_mask: true where a query sees a key, or what is added to the scores, [B or 1, H or 1, T, C].
        options: as transformers' functions take them.

    Returns:
        [B, T, H, W], and no weights.
    """
    keys_GPW, values_GPW = (getattr(attention, name).to(key_BGCW) for name in (KEYS, VALUES))
    key_BGCW = torch.cat([keys_GPW.expand(len(key_BGCW), -1, -1, -1), key_BGCW], 2)
    value_BGCW = torch.cat([values_GPW.expand(len(value_BGCW), -1, -1, -1), value_BGCW], 2)
    is_seen = True if attention_mask.dtype == torch.bool else 0.0
    mask = F.pad(attention_mask, (keys_GPW.shape[1], 0), value=is_seen)
    return sdpa_attention_forward(attention, query_BHTW, key_BGCW, value_BGCW, mask, **options)


def mask_always(*args, **options) -> Tensor:
    """The mask of "sdpa", also where that needs none: a causal one that is left out could not be told from nothing."""
    return sdpa_mask(*args, **options | {"allow_is_causal_skip": False})


AttentionInterface.register(BEHIND_PREFIX, attend_behind_prefix)
AttentionMaskInterface.register(BEHIND_PREFIX, mask_always)


def is_of_prefix(name: str) -> bool:
    """Whether a tensor of this name is of a prefix."""
    return name.rpartition(".")[2] in (KEYS, VALUES)


def has_prefix(llm: nn.Module) -> bool:
    """Whether a LLM has a prefix."""
    return any(is_of_prefix(name) for name, _ in llm.named_parameters())


@contextmanager
def without_prefix(llm: nn.Module) -> Iterator[None]:
    """While it is open, a LLM answers as if it had no prefix, to the last bit."""
    llm.set_attn_implementation(SDPA)
    try:
        yield
    finally:
        llm.set_attn_implementation(BEHIND_PREFIX)


@torch.no_grad()
def describe_prefix(llm: nn.Module) -> Prefix:
    """How large a LLM's prefix is, and how its logits differ from those without it on a few random ids."""
    added = [p for name, p in llm.named_parameters() if is_of_prefix(name)]
    generator, embedding = torch.Generator().manual_seed(0), llm.get_input_embeddings()
    ids_BT = torch.randint(embedding.num_embeddings, (1, PROBE), generator=generator).to(embedding.weight.device)
    logits_BTV = llm(input_ids=ids_BT, use_cache=False).logits
    with without_prefix(llm):
        plain_BTV = llm(input_ids=ids_BT, use_cache=False).logits
    return Prefix(
        tokens=added[0].shape[1],
        layers=len(added) // 2,
        parameters=sum(p.numel() for p in added),
        bytes=sum(p.numel() * p.element_size() for p in added),
        difference=float((logits_BTV - plain_BTV).abs().max()),
        largest_logit=float(plain_BTV.abs().max()),
    )
