"""Weights of other formats become folders of transformers that compute the same; what is damaged is refused."""

import struct

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from benchmarks.real_weights.packages import DataFile, find
from benchmarks.real_weights.whisper_from_ctranslate2 import (
    END,
    PLACES,
    PREVIOUS,
    SILENT,
    START,
    TASKS,
    convert_ctranslate2,
)
from teachers.ears.whisper import WhisperEar

gguf = pytest.importorskip("gguf", reason="of the extra `real`, and of `test`")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["It is 1984, and the clocks strike 13.", "don't  shout <|im_end|> here", "naïve café\n\n  x"]
LANGUAGES = ["<|en|>", "<|de|>"]


def train_bytewise(tokens: list[str], *, digits: bool) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytewise]) \
        if digits else bytewise  # fmt: skip
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    return inner


def make_llama(tokenizer: Tokenizer, *, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4}, tie_word_embeddings=tied,
    )).eval()  # fmt: skip


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's `convert_hf_to_gguf.py` writes q and k."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, llm: LlamaForCausalLM, tokenizer: Tokenizer, *, left_out: str = "", architecture: str = "llama"):
    """A GGUF file of the model, its down projections in 8 bits; returns those as they are then."""
    from benchmarks.real_weights.llama_from_gguf import PARTS, WHOLE

    config, writer, rounded = llm.config, gguf.GGUFWriter(path, architecture), {}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    import json

    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = {theirs: own for own, theirs in WHOLE.items()}
    for name, parameter in llm.named_parameters():
        values = parameter.detach().numpy()
        if name in names:
            own = names[name]
        else:
            _, _, number, part = name.split(".", 3)
            own = f"blk.{number}.{next(a for a, b in PARTS.items() if f'{b}.weight' == part)}.weight"
        if ".attn_q." in own or ".attn_k." in own:
            values = permute(values, config.num_attention_heads if "_q." in own else config.num_key_value_heads)
        if own == left_out:
            continue
        if ".ffn_down." in own:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            rounded[name] = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0).copy())
            writer.add_tensor(own, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_of_a_gguf_file_computes_what_the_model_does_and_reads_text_as_its_tokenizer(tmp_path, tied):
    from benchmarks.real_weights.llama_from_gguf import convert_gguf

    tokenizer = train_bytewise(SPECIAL, digits=True)
    llm = make_llama(tokenizer, tied=tied)
    rounded = write_gguf(tmp_path / "tiny.gguf", llm, tokenizer)
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny")
    llm.load_state_dict(rounded, strict=False)
    made, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids_BT = torch.arange(40)[None]
    assert torch.allclose(made(ids_BT).logits, llm(ids_BT).logits, atol=1e-5)
    assert made.config.tie_word_embeddings is tied and made.config.eos_token_id == 2
    for text in TEXTS:
        assert words.encode(text) == tokenizer.encode(text).ids
        assert words.decode(words.encode(text)) == text
    turn = [{"role": "user", "content": "hello"}]
    assert words.apply_chat_template(turn, tokenize=False) == "<|im_start|>hello<|im_end|>"


def test_a_gguf_file_of_another_architecture_or_without_a_tensor_is_refused(tmp_path):
    from benchmarks.real_weights.llama_from_gguf import convert_gguf

    tokenizer = train_bytewise(SPECIAL, digits=True)
    llm = make_llama(tokenizer, tied=True)
    write_gguf(tmp_path / "other.gguf", llm, tokenizer, architecture="gpt2")
    with pytest.raises(ValueError, match="is of architecture 'gpt2', but only 'llama' is converted"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "out")
    write_gguf(tmp_path / "cut.gguf", llm, tokenizer, left_out="blk.1.attn_v.weight")
    with pytest.raises(ValueError, match=r"1 missing \(model.layers.1.self_attn.v_proj.weight\)"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def make_whisper(vocab_size: int) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=vocab_size, num_mel_bins=80, d_model=32, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=40,
        max_source_positions=100, max_target_positions=24, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=1,
    )  # fmt: skip
    whisper = WhisperForConditionalGeneration(config).eval()
    for parameter in whisper.parameters():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).half().float()  # as stored
    return whisper


def write_ctranslate2(whisper: WhisperForConditionalGeneration, *, bias_of_k: float = 0.0) -> bytes:
    """The bytes of CTranslate2's `model.bin` of a Whisper."""
    state, arrays = whisper.state_dict(), {}
    for side in ("encoder", "decoder"):
        prefix, config = f"model.{side}.", whisper.config
        kinds = {"weight": "gamma", "bias": "beta"}
        for kind, own in kinds.items():
            arrays[f"{side}/layer_norm/{own}"] = state[f"{prefix}layer_norm.{kind}"]
        arrays[f"{side}/position_encodings/encodings"] = state[f"{prefix}embed_positions.weight"]
        arrays[f"{side}/num_heads"] = np.int16(getattr(config, f"{side}_attention_heads"))
        for number in range(getattr(config, f"{side}_layers")):
            for part, places in PLACES.items():
                if part.startswith("attention") and side == "encoder":
                    continue
                for kind in ("weight", "bias"):
                    pieces = [state.get(f"{prefix}layers.{number}.{place}.{kind}") for place in places]
                    pieces = [torch.full_like(pieces[0 if "q" in places[0] else 1], bias_of_k) if p is None else p
                              for p in pieces]  # fmt: skip
                    own = kinds[kind] if "layer_norm" in part else kind
                    arrays[f"{side}/layer_{number}/{part}/{own}"] = torch.cat(pieces)
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            arrays[f"encoder/{name}/{kind}"] = state[f"model.encoder.{name}.{kind}"]
    arrays["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    text = lambda s: struct.pack("<H", len(s) + 1) + s.encode() + b"\0"  # noqa: E731
    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, values in sorted(arrays.items()):
        array = values.half().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", {np.dtype("f2"): 4, np.dtype("i2"): 2}[array.dtype], array.nbytes) + array.tobytes()
    return data + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


@pytest.fixture
def whisper_files(tmp_path):
    special = [END, START, PREVIOUS, SILENT, *TASKS, *LANGUAGES]
    tokenizer = train_bytewise(special, digits=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "words")
    languages = [tokenizer.token_to_id(name) for name in LANGUAGES]
    settings = {"lang_ids": languages, "alignment_heads": [[0, 1]], "suppress_ids": [9], "suppress_ids_begin": [8]}
    return make_whisper(tokenizer.get_vocab_size()), tmp_path / "words" / "tokenizer.json", settings


def test_a_whisper_of_a_ctranslate2_file_hears_and_speaks_as_the_model_does(tmp_path, whisper_files):
    whisper, tokenizer, settings = whisper_files
    folder = convert_ctranslate2(write_ctranslate2(whisper), tokenizer, settings, tmp_path / "whisper")
    made = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    mel_BMX, ids_BT = torch.randn(1, 80, 200), torch.arange(6)[None]
    with torch.no_grad():
        theirs, own = (model(input_features=mel_BMX, decoder_input_ids=ids_BT) for model in (whisper, made))
        frames_BRE = WhisperEar.from_pretrained(folder).encode(mel_BMX)
    assert torch.equal(own.logits, theirs.logits)
    assert torch.allclose(frames_BRE, theirs.encoder_last_hidden_state, atol=1e-5)
    assert made.generation_config.lang_to_id == dict(zip(LANGUAGES, settings["lang_ids"]))
    said = made.generate(mel_BMX, language="en", task="transcribe", max_new_tokens=3)
    assert said.shape[1] <= 3 + 4


def test_a_ctranslate2_file_that_is_cut_continued_of_another_kind_or_with_a_bias_of_k_is_refused(
    tmp_path, whisper_files
):
    whisper, tokenizer, settings = whisper_files
    whole = write_ctranslate2(whisper)
    faults = {
        "is 1000 bytes, but names": whole[:1000],
        "holds 7 bytes behind its last entry": whole + b"1234567",
        "of version 7": struct.pack("<I", 7) + whole[4:],
        "gives k a bias of up to 0.5, but Whisper's k has none": write_ctranslate2(whisper, bias_of_k=0.5),
    }
    for message, data in faults.items():
        with pytest.raises(ValueError, match=message):
            convert_ctranslate2(data, tokenizer, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_of_another_version_or_with_other_bytes_is_refused():
    from importlib.metadata import version

    with pytest.raises(FileNotFoundError, match="package no-such-weights is not installed"):
        find(DataFile("no-such-weights", "1.0", "weights.bin", "0" * 64, "MIT"))
    with pytest.raises(ValueError, match=r"package pytest is version .*, but 0.1 is the one"):
        find(DataFile("pytest", "0.1", "pytest/__init__.py", "0" * 64, "MIT"))
    with pytest.raises(FileNotFoundError, match=r"package pytest holds no pytest/weights.bin"):
        find(DataFile("pytest", version("pytest"), "pytest/weights.bin", "0" * 64, "MIT"))
    with pytest.raises(ValueError, match=r"has sha256 .*, but the file that was checked has 0000000000000000"):
        find(DataFile("pytest", version("pytest"), "pytest/__init__.py", "0" * 64, "MIT"))
