"""The LLM of a student as an OpenVINO graph, op by op: its 4-bit codes as they were trained, LoRA apart, K/V as state.

Knows Llama, Qwen2 and Qwen3 as transformers has them. Knows no ears, no prompt and no file.

Inputs: `embeds` [B, T, D] float32, `mask` [B, P] int64 (1 where a position, past ones included, is no padding),
`positions` [B, T] int64, `beams` [B] int32 (which row of the state each row goes on from). Output: `logits` [B, V] of
the last position, float32.

Shapes: B batch, T new positions, P all positions so far, D width, H heads, G groups of keys, A width of a head,
V vocabulary.
"""

import numpy as np
import openvino as ov
import torch
from openvino import Node
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from torch import Tensor, nn

from students.device.constants import Kind, float_constant, product
from teachers.words.prefix import KEYS, VALUES, is_of_prefix

FAMILIES = ("Llama", "Qwen2", "Qwen3")
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
PLAIN = ("Embedding", "ModuleList", "SiLUActivation", "SiLU", "Linear", "Linear4bit")
MAX_POSITIONS = 4096  # of prompt and answer together: rows of the table of rotations
HIDDEN = -3e4  # added to the score of a position that is not seen; half floats hold it


def build_decoder(llm: nn.Module, head: Kind = "f16") -> ov.Model:
    """The graph of a LLM with its LoRA and its prefix.

    Args:
        llm: a causal LM of transformers, 4-bit or whole, with LoRA or without.
        head: in which type the head's weight lies: "f32", "f16", or "int8" (a scale a row); what else is
            not in 4 bits lies in half floats, but with "f32"; LoRA always in float32.

    Raises:
        ValueError: it has a module that the graph has not, a width that is no multiple of 64 or another activation.
    """
    check_llm(llm)
    return DecoderWriter(llm, head).write()


def check_llm(llm: nn.Module) -> None:
    """Refuse a LLM with a module that the graph has not.

    Raises:
        ValueError: naming it.
    """
    known = {family + part for family in FAMILIES for part in PARTS} | set(PLAIN)
    layers = {name for name, module in llm.named_modules() if hasattr(module, "lora_A")}
    for name, module in llm.named_modules():
        is_in_lora = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        if type(module).__name__ not in known and not is_in_lora:
            raise ValueError(
                f"llm is a {type(llm).__name__} whose {name or 'whole'} is a {type(module).__name__}, but the device's "
                f"graph knows the modules of {', '.join(FAMILIES)} only; export it with --merge, for torch."
            )
    config = llm.config
    sliding = [kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"]
    if sliding or config.hidden_act != "silu" or config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        found = sliding[0] if sliding else f"{config.hidden_act}, {config.rope_parameters['rope_type']}"
        raise ValueError(
            f"llm is a {type(llm).__name__} with {found}, but the device's graph has full attention, silu and fixed "
            f"rotations only; export it with --merge, for torch."
        )


class DecoderWriter:
    """Writes the graph of one LLM.

    Args:
        llm: see `build_decoder`.
        head: see there.
    """

    def __init__(self, llm: nn.Module, head: Kind):
        self.llm, self.config, self.head = llm, llm.config, head
        self.num_heads, self.num_groups = self.config.num_attention_heads, self.config.num_key_value_heads
        self.head_width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.num_heads
        self.num_prefix = next((p.shape[1] for name, p in llm.named_parameters() if is_of_prefix(name)), 0)
        self.states: list[Node] = []  # what is written back into the state

    def write(self) -> ov.Model:
        """The whole graph."""
        embeds = op.parameter([-1, -1, self.config.hidden_size], ov.Type.f32, name="embeds")
        mask = op.parameter([-1, -1], ov.Type.i64, name="mask")
        positions = op.parameter([-1, -1], ov.Type.i64, name="positions")
        self.beams = op.parameter([-1], ov.Type.i32, name="beams")
        self.batch = op.gather(op.shape_of(embeds), integers([0]), integers(0))
        self.length = op.gather(op.shape_of(embeds), integers([1]), integers(0))
        self.unseen = self.hide(mask)
        self.turns = self.rotations(positions)
        states = embeds
        for number, layer in enumerate(self.llm.model.layers):
            states = self.layer(layer, states, number)
        last = op.gather(self.norm(states, self.llm.model.norm), integers(-1), integers(1))
        head = self.llm.get_output_embeddings()
        logits = op.result(product(last, head.weight, "head", self.head))
        parameters = {"embeds": embeds, "mask": mask, "positions": positions, "beams": self.beams}
        model = ov.Model([logits], self.states, list(parameters.values()), "llm")
        for name, found in zip(parameters, model.inputs):  # a model's names are its own, not the parameters'
            found.set_names({name})
        model.outputs[0].set_names({"logits"})
        return model

    def hide(self, mask: Node) -> Node:
        """What is added to the scores: 0 where a new position sees one, HIDDEN elsewhere, [B, 1, T, P]."""
        total = op.gather(op.shape_of(mask), integers([1]), integers(0))
        zero, one = integers(0), integers(1)
        places = op.range(zero, op.squeeze(total, zero), one, "i64")
        own = op.range(zero, op.squeeze(self.length, zero), one, "i64")
        own = op.unsqueeze(op.add(own, op.subtract(total, self.length)), one)  # [T, 1]
        is_past = op.less_equal(op.unsqueeze(places, zero), own)
        is_real = op.not_equal(op.unsqueeze(mask, integers([1, 2])), zero)
        hidden = op.select(op.logical_and(is_real, is_past), float_constant(0.0), float_constant(HIDDEN))
        if not self.num_prefix:
            return hidden
        shape = op.gather(op.shape_of(hidden), integers([0, 1, 2]), integers(0))
        before = op.concat([shape, integers([self.num_prefix])], 0)
        return op.concat([op.broadcast(float_constant(0.0), before), hidden], -1)

    def rotations(self, positions: Node) -> tuple[Node, Node]:
        """Cosines and sines of each position, [B, 1, T, A], from a table."""
        size = min(MAX_POSITIONS, self.config.max_position_embeddings)
        with torch.no_grad():
            found = self.llm.model.rotary_emb(torch.zeros(1), torch.arange(size)[None])
        tables = [float_constant(table[0].float().numpy()) for table in found]
        gathered = [op.gather(table, positions, integers(0)) for table in tables]
        return tuple(op.unsqueeze(table, integers(1)) for table in gathered)

    def layer(self, layer: nn.Module, states: Node, number: int) -> Node:
        """A transformer layer."""
        heard = self.attend(layer.self_attn, self.norm(states, layer.input_layernorm), f"layers.{number}")
        states = op.add(states, heard)
        inner, mlp = self.norm(states, layer.post_attention_layernorm), layer.mlp
        gate, up = (
            self.linear(getattr(mlp, part), inner, f"layers.{number}.{part}") for part in ("gate_proj", "up_proj")
        )
        gated = op.multiply(op.swish(gate), up)
        return op.add(states, self.linear(mlp.down_proj, gated, f"layers.{number}.down_proj"))

    def attend(self, attention: nn.Module, states: Node, name: str) -> Node:
        """Self-attention over the state and the new positions."""
        query, key, value = (
            self.heads(self.linear(getattr(attention, f"{part}_proj"), states, f"{name}.{part}_proj"), count)
            for part, count in (("q", self.num_heads), ("k", self.num_groups), ("v", self.num_groups))
        )
        if hasattr(attention, "q_norm"):
            query, key = self.norm(query, attention.q_norm), self.norm(key, attention.k_norm)
        query, key = self.rotate(query), self.rotate(key)
        key = self.repeat(self.remember(key, f"{name}.key", getattr(attention, KEYS, None)))
        value = self.repeat(self.remember(value, f"{name}.value", getattr(attention, VALUES, None)))
        scale = float_constant(attention.scaling)
        heard = op.scaled_dot_product_attention(query, key, value, self.unseen, scale)
        flat = op.reshape(op.transpose(heard, integers([0, 2, 1, 3])), integers([0, 0, -1]), special_zero=True)
        return self.linear(attention.o_proj, flat, f"{name}.o_proj")

    def heads(self, states: Node, count: int) -> Node:
        """[B, T, count * A] as [B, count, T, A]."""
        shaped = op.reshape(states, integers([0, 0, count, self.head_width]), special_zero=True)
        return op.transpose(shaped, integers([0, 2, 1, 3]))

    def rotate(self, states: Node) -> Node:
        """Rotary embedding of a query or key."""
        cosine, sine = self.turns
        first, second = op.split(states, integers(-1), 2).outputs()
        turned = op.concat([op.multiply(second, float_constant(-1.0)), first], -1)
        return op.add(op.multiply(states, cosine), op.multiply(turned, sine))

    def remember(self, new: Node, name: str, prefix: Tensor | None) -> Node:
        """Keys or values of all positions: the state's, row by row as `beams` says, and the new ones behind.

        A state begins with the layer's prefix, if there is one.
        """
        shape = ov.PartialShape([-1, self.num_groups, -1, self.head_width])
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, name
        start = op.concat([self.batch, integers([self.num_groups, self.num_prefix, self.head_width])], 0)
        first = float_constant(0.0 if prefix is None else prefix[None])
        variable = Variable(info)
        old = op.read_value(op.broadcast(first, start), variable)
        everything = op.concat([op.gather(old, self.beams, integers(0)), new], 2)
        self.states.append(op.assign(everything, variable))
        return everything

    def repeat(self, states: Node) -> Node:
        """Each group of keys or values once for every head that reads it."""
        times = self.num_heads // self.num_groups
        if times == 1:
            return states
        ones = float_constant(np.ones((1, 1, times, 1, 1)))  # OpenVINO knows attention by this product, not a broadcast
        wide = op.multiply(op.unsqueeze(states, integers(2)), ones)
        return op.reshape(wide, integers([0, self.num_heads, -1, self.head_width]), special_zero=True)

    def norm(self, states: Node, norm: nn.Module) -> Node:
        """RMSNorm."""
        mean = op.reduce_mean(op.power(states, float_constant(2.0)), integers([-1]), keep_dims=True)
        root = op.sqrt(op.add(mean, float_constant(norm.variance_epsilon)))
        return op.multiply(op.multiply(states, op.divide(float_constant(1.0), root)), float_constant(norm.weight))

    def linear(self, layer: nn.Module, states: Node, name: str) -> Node:
        """A linear layer, with its LoRA beside it."""
        base = getattr(layer, "base_layer", layer)
        made = product(states, base.weight, name, "f32" if self.head == "f32" else "f16")
        if base.bias is not None:
            made = op.add(made, float_constant(base.bias))
        for adapter in getattr(layer, "active_adapters", ()):
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
            made = op.add(made, product(product(states, down, name, "f32"), up, name, "f32"))
        return made


def integers(values: int | list[int]) -> Node:
    """A constant of places or sizes."""
    return op.constant(np.array(values, dtype=np.int64))
