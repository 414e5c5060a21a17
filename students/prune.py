"""A smaller LLM made of a larger one's own weights: fewer layers, heads or feed-forward channels.

Which ones go is measured on the texts of calibration shards: a layer by its block influence (1 - the cosine of what
enters and what leaves it; Men et al., "ShortGPT", arXiv 2403.03853), a head or channel by the size of what it adds.
What is left has to be healed by training; its cross-entropy at the start is printed beside the whole model's and a
uniform guess's. Knows no audio.

Shapes: B batch, T positions, D LLM width, H heads, I channels of a feed-forward.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer

from shards.files.write import staged
from shards.status import print_status
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from teachers.blocks import llm_blocks
from teachers.ears.shape import even_places
from teachers.files.loading import load_llm

REPORT, CONFIG = "prune.json", "config.json"
BATCH_SIZE = 8  # texts at once


@dataclass(frozen=True)
class Pruned:
    """What became of a LLM. Cross-entropies are nats a token of the calibration texts."""

    layers: list[int]  # those that stay, from 0
    heads: int  # attention heads of a layer
    ffn: int  # channels of a layer's feed-forward
    whole_ce: float
    start_ce: float
    uniform_ce: float

    def __str__(self) -> str:
        rows = {"whole": self.whole_ce, "pruned": self.start_ce, "uniform": self.uniform_ce}
        lines = [f"  {name:<8} {value:7.3f} nats a token" for name, value in rows.items()]
        excess = self.start_ce - self.whole_ce
        if self.start_ce > self.uniform_ce:
            verdict = "worse than a guess: LoRA alone may not heal it; keep more, or choose layers by their influence"
        else:
            share = excess / (self.uniform_ce - self.whole_ce)
            verdict = f"{excess:.2f} nats to heal by training, {share:.0%} of what it knew"
        return "\n".join([*lines, f"  {verdict}"])


def prune_(llm: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], *, layers: int = 0, heads: int = 0, ffn: int = 0,
           evenly: bool = False) -> Pruned:  # fmt: skip
    """Leave out what the calibration texts need least, in place: layers first, then heads, then channels.

    Args:
        llm: a causal LM of transformers; heads and channels go of those that name their layers as Llama does.
        batches: the calibration texts, as `batch_texts` gives them.
        layers, heads, ffn: how many stay; 0: all.
        evenly: choose the layers evenly spaced, first and last among them, instead of by influence.

    Raises:
        ValueError: more is to stay than there is, or heads that do not fill their groups.
    """
    config = llm.config.get_text_config()
    check_sizes(config, layers, heads, ffn)
    whole_ce = cross_entropy_of(llm, batches)
    kept = list(range(config.num_hidden_layers))
    if layers:
        kept = even_places(layers, len(kept)) if evenly else most_influential(block_influence(llm, batches), layers)
        keep_layers_(llm, kept)
    if heads:
        keep_heads_(llm, measure_inputs(llm, batches, "o_proj"), heads)
    if ffn:
        keep_channels_(llm, measure_inputs(llm, batches, "down_proj"), ffn)
    start_ce = cross_entropy_of(llm, batches)
    return Pruned(
        kept, config.num_attention_heads, config.intermediate_size, whole_ce, start_ce, math.log(config.vocab_size)
    )


def check_sizes(config, layers: int, heads: int, ffn: int) -> None:
    """Refuse what a LLM of these sizes cannot be cut to.

    Raises:
        ValueError: naming the size.
    """
    there = {
        "layers": (layers, config.num_hidden_layers),
        "heads": (heads, config.num_attention_heads),
        "ffn": (ffn, config.intermediate_size),
    }
    for name, (asked, most) in there.items():
        if not 0 <= asked <= most:
            raise ValueError(f"--{name} is {asked}, but the LLM has {most}; give 1 to {most}.")
    group = config.num_attention_heads // config.num_key_value_heads
    if heads % group:
        raise ValueError(
            f"--heads is {heads}, but {group} heads share their keys and values and go together; give a multiple of "
            f"{group}."
        )
    if not layers and not heads and not ffn:
        raise ValueError("--layers, --heads and --ffn are not given, but something is to be pruned; give one of them.")


def most_influential(influence_L: Sequence[float], kept: int) -> list[int]:
    """Numbers of the layers of the largest influence, in order."""
    return sorted(sorted(range(len(influence_L)), key=lambda layer: -influence_L[layer])[:kept])


@torch.no_grad()
def block_influence(llm: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Of each layer: 1 - the mean cosine of its input and its output, over all positions."""
    sums, count = [0.0] * len(llm_blocks(llm)), 0
    for ids_BT, mask_BT in batches:
        states = states_between(llm, ids_BT, mask_BT)
        is_real_BT = mask_BT.bool()
        count += int(is_real_BT.sum())
        for layer, (before_BTD, after_BTD) in enumerate(pairwise(states)):
            cosine_BT = cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
            sums[layer] += float((1 - cosine_BT)[is_real_BT].sum())
    return [value / count for value in sums]


def states_between(llm: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> list[Tensor]:
    """What enters the first block, and what leaves each: [B, T, D]."""
    states, blocks = [], llm_blocks(llm)

    def keep(module, inputs, output):
        if not states:
            states.append(inputs[0])
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        llm.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


@torch.no_grad()
def measure_inputs(llm: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], name: str) -> list[Tensor]:
    """Of each layer: how much each column of its linear layer `name` adds, the size of its input times its own.

    Raises:
        ValueError: a layer has no linear layer of that name.
    """
    linears = [find_linear(block, name) for block in llm_blocks(llm)]
    squares = [torch.zeros(linear.in_features) for linear in linears]
    is_real_BT = None

    def add(layer: int):
        def hook(module, inputs, output):
            squares[layer] += inputs[0].float()[is_real_BT].square().sum(0)

        return hook

    handles = [linear.register_forward_hook(add(layer)) for layer, linear in enumerate(linears)]
    try:
        for ids_BT, mask_BT in batches:
            is_real_BT = mask_BT.bool()
            llm.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [square_I.sqrt() * linear.weight.float().norm(dim=0) for square_I, linear in zip(squares, linears)]


def find_linear(block: nn.Module, name: str) -> nn.Linear:
    """A block's linear layer by the last part of its name."""
    found = [m for path, m in block.named_modules() if path.rpartition(".")[2] == name and isinstance(m, nn.Linear)]
    if len(found) != 1:
        raise ValueError(
            f"{type(block).__name__} has {len(found)} linear layers named {name}, but heads and channels are cut where "
            f"there is one, as in Llama, Qwen and Mistral; give --layers alone."
        )
    return found[0]


def keep_layers_(llm: nn.Module, kept: Sequence[int]) -> None:
    """Leave out all blocks but these, in place."""
    config, blocks, decoder = llm.config.get_text_config(), llm_blocks(llm), llm.get_decoder()
    name = next(name for name, module in decoder.named_children() if module is blocks)
    setattr(decoder, name, nn.ModuleList(blocks[layer] for layer in kept))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    config.num_hidden_layers = len(kept)
    for number, block in enumerate(llm_blocks(llm)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number


def keep_heads_(llm: nn.Module, added: Sequence[Tensor], kept: int) -> None:
    """Leave out, in place, the groups of heads that add least in each layer; a group shares its keys and values."""
    config = llm.config.get_text_config()
    groups, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    for block, added_I in zip(llm_blocks(llm), added):
        width = len(added_I) // (groups * group)
        strength_G = added_I.view(groups, group * width).square().sum(1)
        chosen = strength_G.topk(kept // group).indices.sort().values
        queries, keys = rows_of(chosen, group * width), rows_of(chosen, width)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            cut_(find_linear(block, name), rows, dim=0)
        cut_(find_linear(block, "o_proj"), queries, dim=1)
    config.head_dim = width
    config.num_attention_heads, config.num_key_value_heads = kept, kept // group


def keep_channels_(llm: nn.Module, added: Sequence[Tensor], kept: int) -> None:
    """Leave out, in place, the channels of each feed-forward that add least."""
    for block, added_I in zip(llm_blocks(llm), added):
        chosen = added_I.topk(kept).indices.sort().values
        for name in ("gate_proj", "up_proj"):
            cut_(find_linear(block, name), chosen, dim=0)
        cut_(find_linear(block, "down_proj"), chosen, dim=1)
    llm.config.get_text_config().intermediate_size = kept


def rows_of(chosen: Tensor, size: int) -> Tensor:
    """The rows of chosen blocks of so many rows each."""
    return (chosen[:, None] * size + torch.arange(size)).flatten()


def cut_(linear: nn.Linear, places: Tensor, *, dim: int) -> None:
    """Keep these rows (0) or columns (1) of a linear layer, in place."""
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, places), requires_grad=False)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[places], requires_grad=False)
    linear.out_features, linear.in_features = linear.weight.shape


@torch.no_grad()
def cross_entropy_of(llm: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The mean cross-entropy of the texts' next tokens, nats."""
    total, count = 0.0, 0
    for ids_BT, mask_BT in batches:
        labels_BT = ids_BT.where(mask_BT.bool(), -100)
        tokens = int(mask_BT[:, 1:].sum())
        output = llm(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False)
        total, count = total + float(output.loss) * tokens, count + tokens
    return total / count


def read_texts(shards: str | Path, num_texts: int, seed: int) -> list[str]:
    """Texts of labelled samples, drawn from all of the shards.

    Raises:
        ValueError: no sample has one.
    """
    stream = ShardStream(shards, Order(batch_size=1, seed=seed, epochs=1), decode=False)
    texts = []
    for samples in stream:
        texts += [sample.text for sample in samples if sample.text]
        if len(texts) >= num_texts:
            break
    if not texts:
        raise ValueError(f"{shards} holds no text, but a LLM is pruned by what it reads; name labelled shards.")
    return texts[:num_texts]


def batch_texts(tokenizer, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Ids and attention mask of texts, each between its begin and end tokens, padded at the end."""
    ends = [[] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    rows = [[*ends[0], *tokenizer.encode(text, add_special_tokens=False), *ends[1]] for text in texts]
    batches = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        length = max(map(len, batch))
        ids_BT = torch.tensor([row + [0] * (length - len(row)) for row in batch])
        batches.append((ids_BT, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])))
    return batches


def prune(llm: str, out: Path, shards: str | Path, *, num_texts: int, seed: int = 0, **sizes) -> Pruned:
    """Write the pruned LLM's folder: weights, config, tokenizer, and `prune.json`, which says how it was made.

    Args:
        llm: folder or hub id.
        out: a new folder.
        shards: whose texts are read.
        num_texts: how many texts.
        seed: decides which.
        sizes: as `prune_` takes them.

    Raises:
        FileExistsError: the folder holds a model.
        ValueError: the sizes do not fit, or the shards hold no text.
    """
    if (out / CONFIG).exists():
        raise FileExistsError(f"OUT is {out}, but it holds a {CONFIG} already; name a new folder.")
    texts = read_texts(shards, num_texts, seed)
    model, tokenizer = load_llm(llm, torch.float32).eval(), AutoTokenizer.from_pretrained(llm)
    pruned = prune_(model, batch_texts(tokenizer, texts), **sizes)
    with staged(out, last=CONFIG) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        (stage / REPORT).write_text(json.dumps({"llm": llm, "shards": str(shards), "texts": len(texts),
                                                **asdict(pruned)}, indent=1))  # fmt: skip
    return pruned


def main(args: argparse.Namespace) -> int:
    """Run `distill prune`."""
    pruned = prune(args.llm, args.out, args.shards, num_texts=args.texts, layers=args.layers, heads=args.heads,
                   ffn=args.ffn, evenly=args.evenly)  # fmt: skip
    print(pruned)
    print_status(f"LLM: {args.out} ({len(pruned.layers)} layers, {pruned.heads} heads, {pruned.ffn} channels)")
    return 0
