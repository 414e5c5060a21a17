"""A LLM of transformers as one GGUF file, quantized by the package `gguf` in Python and read back.

Knows Llama and Qwen2 with a byte-level BPE, whose pre-tokenizer llama.cpp has a name for; other tokenizers are left out
of the file, which then takes ids and embeddings only.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

DEQUANTIZED = dict[str, np.ndarray]
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
PRE_TOKENIZERS = {"llama": "llama-bpe", "qwen2": "qwen2"}  # of Llama 3 and of Qwen2
PERMUTED = ("q_proj.weight", "k_proj.weight")  # of a Llama: llama.cpp turns neighbors, transformers halves


def write_gguf(folder: Path, path: Path, kind: str) -> DEQUANTIZED:
    """Write a LLM's folder as GGUF.

    Args:
        folder: the LLM's folder as transformers saves it, LoRA merged.
        path: the file.
        kind: a name of `gguf.GGMLQuantizationType` that Python can make of the matrices; norms and biases are float32.

    Returns:
        What the file holds, read back, by transformers' names.

    Raises:
        ValueError: another architecture, or widths that are no multiple of a block.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"llm is a {config.model_type}, but GGUF is written of {', '.join(ARCHITECTURES)}; choose --format vllm."
        )
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, config.model_type)
    add_fields(writer, config)
    add_tokenizer(writer, config, folder)
    quantized, own_names = gguf.GGMLQuantizationType[kind], {}
    for name, parameter in llm.named_parameters():
        array = parameter.detach().numpy()
        if config.model_type == "llama" and name.endswith(PERMUTED):
            array = interleave(array, heads_of(name, config))
        if array.ndim == 2:
            check_width(name, array, quantized)
            array = to_iq4_nl(array) if kind == "IQ4_NL" else gguf.quants.quantize(array, quantized)
        own = names.get_name(name.removesuffix(".weight").removesuffix(".bias")) + "." + name.rpartition(".")[2]
        own_names[own] = name
        writer.add_tensor(own, array, raw_dtype=quantized if parameter.ndim == 2 else None)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return read_back(path, own_names, config)


def read_back(path: Path, own_names: dict[str, str], config) -> DEQUANTIZED:
    """The tensors of a file as floats, by transformers' names and in its order of heads."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = own_names[tensor.name]
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if config.model_type == "llama" and name.endswith(PERMUTED):
            array = separate(array, heads_of(name, config))
        tensors[name] = array
    return tensors


def add_fields(writer: gguf.GGUFWriter, config) -> None:
    """Sizes and rotations; Llama 3's scaling is a tensor of factors, as llama.cpp has it."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", scaled_rotations(config.rope_parameters, width))
    elif config.rope_parameters["rope_type"] != "default":
        raise ValueError(
            f"rope_type of the LLM is {config.rope_parameters['rope_type']}, but GGUF has default and llama3 here; "
            f"choose --format vllm."
        )


def scaled_rotations(rope: dict, width: int) -> np.ndarray:
    """By how much each pair of a head turns slower than without scaling. Source: llama.cpp's convert_hf_to_gguf.py."""
    periods = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    old, low, high = (rope[f] for f in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = np.clip((old / periods - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def add_tokenizer(writer: gguf.GGUFWriter, config, folder: Path) -> None:
    """A byte-level BPE with its merges; of any other kind none."""
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if state["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(state["pre_tokenizer"]):
        writer.add_tokenizer_model("none")
        return
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in state["model"]["vocab"].items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    for added in state["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    merges = state["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[config.model_type])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def to_iq4_nl(weight: np.ndarray) -> np.ndarray:
    """A matrix in IQ4_NL: a half float and 32 codes of 4 bits a block; of several scales each block has the best.

    The package reads this kind and does not make it.
    """
    grid = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
    blocks = weight.reshape(-1, 32).astype(np.float32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    best = np.full(len(blocks), np.inf)
    scales, codes = np.zeros((len(blocks), 1), np.float16), np.zeros(blocks.shape, np.uint8)
    for level in (-127.0, -120.0, -113.0, -106.0, 98.0, 106.0, 113.0, 120.0):  # what the largest weight becomes
        scale = (largest / level).astype(np.float16)
        exact = np.where(scale == 0, 1, scale).astype(np.float32)
        found = np.searchsorted((grid[1:] + grid[:-1]) / 2, blocks / exact).astype(np.uint8)
        error = np.square(grid[found] * exact - blocks).sum(1)
        is_better = error < best
        best[is_better], scales[is_better], codes[is_better] = error[is_better], scale[is_better], found[is_better]
    packed = codes[:, :16] | (codes[:, 16:] << 4)
    return np.concatenate([scales.view(np.uint8), packed], 1).reshape(len(weight), -1)


def heads_of(name: str, config) -> int:
    """Heads of a query's or a key's matrix."""
    return config.num_attention_heads if "q_proj" in name else config.num_key_value_heads


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head so that the two that turn together are neighbors."""
    return np.ascontiguousarray(weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))


def separate(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def check_width(name: str, array: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    """Refuse a matrix whose rows are no whole blocks.

    Raises:
        ValueError: naming it.
    """
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if array.shape[1] % block:
        raise ValueError(
            f"{name} has {array.shape[1]} inputs, but {kind.name} has blocks of {block}; choose --format vllm."
        )
