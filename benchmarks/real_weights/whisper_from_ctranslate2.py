"""A CTranslate2 Whisper as a folder of transformers: weights, config, tokenizer, generation config. Knows no package.

The file (`model.bin`, version 6) is a list of named arrays; q, k and v are fused there, and k's bias is 0, as Whisper's
k has none. Format: github.com/OpenNMT/CTranslate2, python/ctranslate2/specs/model_spec.py.
Shapes: E width.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from shards.files.write import staged
from teachers.files.weights import load_strictly_

VERSION, SPEC = 6, "WhisperSpec"
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by their numbers in the file
KINDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
PLACES = {  # of a layer's parts, by CTranslate2's names; fused ones are cut up
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
WHOLE = {
    "conv1": "conv1", "conv2": "conv2", "layer_norm": "layer_norm", "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
}  # fmt: skip
START, END, PREVIOUS, SILENT = "<|startoftranscript|>", "<|endoftext|>", "<|startofprev|>", "<|notimestamps|>"
TASKS = ("<|transcribe|>", "<|translate|>")


def convert_ctranslate2(model: bytes, tokenizer: str | Path, settings: dict, folder: str | Path) -> Path:
    """Write the folder, all of it or nothing.

    Args:
        model: the content of `model.bin`.
        tokenizer: path of Whisper's `tokenizer.json`.
        settings: CTranslate2's `config.json`: alignment heads, languages, ids that are suppressed.
        folder: is made.

    Raises:
        ValueError: it is no such model, is cut short, has a bias on k, or a tensor is missing or misshapen.
    """
    arrays, aliases = read_arrays(model)
    words = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token=END, pad_token=END)
    config = read_config(arrays, words)
    weights = {name: values for own, array in arrays.items() if array.ndim for name, values in place(own, array)}
    if aliases.get("decoder/projection/weight") == "decoder/embeddings/weight":
        weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    with torch.device("meta"):
        whisper = WhisperForConditionalGeneration(config).half()
    load_strictly_(whisper, weights, "model.bin")
    whisper.tie_weights()
    whisper.generation_config = describe_generation(config, words, settings)
    with staged(Path(folder), last="config.json") as stage:
        whisper.save_pretrained(stage)
        words.save_pretrained(stage)
        WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(stage)
    return Path(folder)


def read_arrays(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every array by name, and the aliases of some.

    Raises:
        ValueError: another version or model, or fewer bytes than it says.
    """
    reader = _Reader(data)
    version, spec, revision = reader.number("I"), reader.text(), reader.number("I")
    if (version, spec) != (VERSION, SPEC):
        raise ValueError(
            f"model.bin is a {spec!r} of version {version} (revision {revision}), but a {SPEC} of version {VERSION} "
            f"is converted; name a CTranslate2 Whisper."
        )
    arrays = dict(reader.array() for _ in range(reader.number("I")))
    aliases = {reader.text(): reader.text() for _ in range(reader.number("I"))}
    if reader.place != len(data):
        raise ValueError(
            f"model.bin holds {len(data) - reader.place} bytes behind its last entry, but must end there; join its "
            f"parts in order, each once."
        )
    return arrays, aliases


class _Reader:
    """A place in the bytes that moves on with all that is read."""

    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        self.place += size
        if self.place > len(self.data):
            raise ValueError(
                f"model.bin is {len(self.data)} bytes, but names {self.place}; install its package again, or join "
                f"all its parts."
            )
        return self.data[self.place - size : self.place]

    def number(self, kind: str) -> int:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return self.take(self.number("H")).rstrip(b"\0").decode(errors="replace")

    def array(self) -> tuple[str, np.ndarray]:
        name, rank = self.text(), self.number("B")
        shape = [self.number("I") for _ in range(rank)]
        dtype, size = self.number("B"), self.number("I")
        if dtype >= len(DTYPES):
            raise ValueError(
                f"{name} of model.bin has dtype number {dtype}, but 0 to {len(DTYPES) - 1} are known; name a model in "
                f"float32 or float16."
            )
        return name, np.frombuffer(self.take(size), DTYPES[dtype]).reshape(shape)


def place(name: str, array: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """An array as the tensors of transformers' Whisper that it holds, in the precision it is stored in.

    Raises:
        ValueError: it is no part of a Whisper, or gives k a bias.
    """
    side, _, rest = name.partition("/")
    stem, _, kind = rest.rpartition("/")
    values, kind = torch.from_numpy(np.array(array)), KINDS.get(kind, kind)
    if stem in WHOLE:
        yield f"model.{side}.{WHOLE[stem]}.{kind}", values
        return
    layer, _, part = stem.partition("/")
    if part not in PLACES:
        raise ValueError(f"{name} is in model.bin, but is no part of a Whisper; name a CTranslate2 Whisper.")
    for own, piece in zip(PLACES[part], values.chunk(len(PLACES[part]))):
        if not (own.endswith("k_proj") and kind == "bias"):
            yield f"model.{side}.layers.{layer.removeprefix('layer_')}.{own}.{kind}", piece
        elif piece.abs().max() > 0:
            raise ValueError(
                f"{name} of model.bin gives k a bias of up to {piece.abs().max():.3g}, but Whisper's k has none; name "
                f"a CTranslate2 Whisper."
            )


def read_config(arrays: dict[str, np.ndarray], words: PreTrainedTokenizerFast) -> WhisperConfig:
    """The sizes that the arrays' shapes say, and the ids that the tokenizer says."""
    width, num_mels, _ = arrays["encoder/conv1/weight"].shape
    sizes = {}
    for side in ("encoder", "decoder"):
        sizes |= {
            f"{side}_layers": sum(
                name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/bias") for name in arrays
            ),
            f"{side}_attention_heads": int(arrays[f"{side}/num_heads"]),
            f"{side}_ffn_dim": arrays[f"{side}/layer_0/ffn/linear_0/bias"].shape[0],
        }
    end, start = words.convert_tokens_to_ids([END, START])
    return WhisperConfig(
        **sizes,
        vocab_size=arrays["decoder/embeddings/weight"].shape[0],
        num_mel_bins=num_mels,
        d_model=width,
        max_source_positions=arrays["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=arrays["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )


def describe_generation(config: WhisperConfig, words: PreTrainedTokenizerFast, settings: dict) -> GenerationConfig:
    """What `generate` needs to know of a Whisper of many languages."""
    ids = words.get_vocab()
    languages = {words.convert_ids_to_tokens(index): index for index in settings["lang_ids"]}
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id={name.strip("<|>"): ids[name] for name in TASKS},
        no_timestamps_token_id=ids[SILENT],
        prev_sot_token_id=ids[PREVIOUS],
        alignment_heads=settings["alignment_heads"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        max_length=config.max_target_positions,
        decoder_start_token_id=config.decoder_start_token_id,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config.eos_token_id),
    )
