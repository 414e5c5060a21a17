"""A GGUF file of a Llama as a folder of transformers: weights, config, tokenizer, chat template. Knows no package.

The tensors are copied into a fresh model: one that transformers loads with `gguf_file=` refuses to be saved.
Shapes: H heads, D width. Format: github.com/ggml-org/ggml, docs/gguf.md; names and the permutation of q and k: its
`convert_hf_to_gguf.py`.
"""

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shards.files.write import staged
from teachers.files.weights import load_strictly_

PARTS = {  # of a block, by GGUF's names
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL, USER_DEFINED = 3, 4  # kinds of GGUF's tokens that stand apart from text
SPLITS = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}  # what comes before bytes, by `pre`


def convert_gguf(source: str | Path, folder: str | Path) -> Path:
    """Write the folder, all of it or nothing.

    Args:
        source: a GGUF file whose architecture is `llama` and whose tokenizer is byte-level BPE.
        folder: is made.

    Raises:
        ValueError: it is of another architecture or tokenizer, or a tensor is missing, unknown or misshapen.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(
            f"{source} is of architecture {fields['general.architecture']!r}, but only 'llama' is converted; name a "
            f"GGUF file of a Llama."
        )
    names = {tensor.name for tensor in reader.tensors}
    config = read_config(fields, is_tied="output.weight" not in names)
    with torch.device("meta"):
        llm = LlamaForCausalLM(config)
    weights = {rename(tensor.name): read_tensor(tensor, config) for tensor in reader.tensors}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights[WHOLE["token_embd.weight"]]
    load_strictly_(llm, weights, source)
    llm.tie_weights()
    tokenizer = build_tokenizer(fields, source)
    with staged(Path(folder), last="config.json") as stage:
        llm.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    return Path(folder)


def read_config(fields: dict, *, is_tied: bool) -> LlamaConfig:
    """The sizes that a GGUF's fields say."""
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),  # 1e-5 in float32
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=is_tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def rename(name: str) -> str:
    """A tensor's name in transformers; an unknown one stays, and is refused with all that do not fit."""
    if name in WHOLE:
        return WHOLE[name]
    _, _, rest = name.partition("blk.")
    number, _, part = rest.partition(".")
    stem, _, kind = part.rpartition(".")
    return f"model.layers.{number}.{PARTS[stem]}.{kind}" if stem in PARTS else name


def read_tensor(tensor, config: LlamaConfig) -> Tensor:
    """A tensor's values in float32, q and k with their rotary halves as transformers has them."""
    values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    if ".attn_q." in tensor.name:
        return unpermute(values, config.num_attention_heads)
    return unpermute(values, config.num_key_value_heads) if ".attn_k." in tensor.name else values


def unpermute(weight_DD: Tensor, num_heads: int) -> Tensor:
    """GGUF keeps the two halves of each rotary pair beside each other; transformers keeps them half a head apart."""
    rows, columns = weight_DD.shape
    paired = weight_DD.view(num_heads, rows // num_heads // 2, 2, columns)
    return paired.transpose(1, 2).reshape(rows, columns).contiguous()


def build_tokenizer(fields: dict, source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF's fields describe.

    Raises:
        ValueError: it is of a kind that is not converted.
    """
    kind, pre = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != "gpt2" or pre not in SPLITS:
        raise ValueError(
            f"{source} has a tokenizer of kind {kind!r} ({pre!r}), but byte-level BPE ('gpt2') with one of "
            f"{', '.join(SPLITS)} is converted; take the model's own tokenizer files."
        )
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*SPLITS[pre], bytewise])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == CONTROL])
    inner.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == USER_DEFINED])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{field}_token_id"]] for name, field in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer
