"""Checkpoints of SALMONN's own trainers: read into a `Salmonn`, every key accounted for, and written back.

A file is `{"model": trainable tensors, …}` as bytedance/SALMONN and Nota's trainer save it: LoRA under peft's old or
new names, on any of the LLM's projections. Frozen parts (LLM, Whisper, BEATs)
are not in it and come from their own files.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shards.files.write import explain_unwritten, open_atomically
from teachers.files.loading import build_salmonn
from teachers.files.weights import assign_parameter_, read_torch_file
from teachers.lora import SALMONN_LORA, Lora
from teachers.salmonn import Salmonn, SalmonnConfig, describe_end
from teachers.words.rows import NO_BOS

LORA = re.compile(r"llama_model\.(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight$")
# Saved beside the trainable tensors though they are not: buffers, and second names of shared or tied frozen tensors
LEFTOVER = re.compile(
    r"speech_Qformer\.bert\.embeddings\.position_ids$|.*relative_attention_bias\.weight$|.*lm_head\.weight$|.*inv_freq$"
)
QFORMER = "speech_Qformer.bert."
TRAINED_EARS = {
    "speech_encoder": "Whisper",
    "beats": "BEATs",
}  # where freeze_*: false
DIRECT = {
    "speech_query_tokens": "qformer.query",
    "speech_llama_proj.weight": "project.weight",
    "speech_llama_proj.bias": "project.bias",
    "ln_speech.weight": "ln_speech.weight",
    "ln_speech.bias": "ln_speech.bias",
    "ln_audio.weight": "ln_audio.weight",
    "ln_audio.bias": "ln_audio.bias",
}
# What SALMONN's trainer calls the settings that no tensor tells
SETTINGS = {
    "prompt_template": "template",
    "end_sym": "end_token",
    "max_txt_len": "max_answer_tokens",
    "bos_token": "bos_token",  # ours alone: theirs is in the code of a trainer
    "second_per_window": "window_seconds",
    "second_stride": "stride_seconds",
    "qformer_heads": "qformer_heads",  # ours alone: theirs is always 12
}


@dataclass(frozen=True)
class KeyReport:
    """What became of a checkpoint's keys. Anything else is an error."""

    loaded: list[str]
    leftover: list[str]  # in the file, and rightly not loaded
    frozen: list[str]  # parts that are expected from elsewhere
    end: str  # what ends its answers, and who says so
    begin: str  # what begins its prompts, and who says so

    def __str__(self) -> str:
        parts = f"{len(self.loaded)} tensors loaded, {len(self.leftover)} leftovers, frozen: {', '.join(self.frozen)}"
        return f"{parts}; {self.end}; {self.begin}"


def our_name(key: str) -> str | None:
    """The name in a `Salmonn` of a checkpoint's key; None for a leftover.

    Raises:
        KeyError: the key is none of SALMONN's.
    """
    if LEFTOVER.match(key):
        return None
    if key in DIRECT:
        return DIRECT[key]
    if key.startswith(QFORMER):
        name = key.removeprefix(QFORMER).replace("embeddings.LayerNorm.", "layernorm.")
        return "qformer.qformer." + re.sub(r"\.(attention|crossattention)\.self\.", r".\1.attention.", name)
    if match := LORA.match(key):
        return f"llm.{match[1]}.{match[2]}.default.weight"
    raise KeyError(key)


def load_checkpoint(path: str | Path, *, llm: str, whisper: str, second: str = "", second_kind: str = "",
                    lora_alpha: float | None = None, dtype: torch.dtype = torch.float32, ear_precision: str = "",
                    llm_weights: bool = True, **settings) -> tuple[Salmonn, KeyReport]:  # fmt: skip
    """A released SALMONN as a frozen teacher, and the report of its keys.

    Args:
        path: the `.pth` file.
        llm, whisper, second, second_kind: the frozen parts it was trained on, as in `SalmonnConfig`.
        lora_alpha: that of LoRA, which no tensor's shape tells; None: the file's own config, or SALMONN's 32.
        dtype: the data type of the LLM's weights.
        ear_precision: how the encoders hear, see `teachers.ears.precision`; empty: as `dtype` says.
        llm_weights: False leaves the LLM on the meta device, all but what the file itself holds of it.
        settings: further fields of `SalmonnConfig`. What neither they nor the tensors' shapes tell is taken from the
            config that SALMONN's trainer saves in the file: windows, template and end token.

    Raises:
        ValueError: the file is no SALMONN checkpoint, holds code or is cut, or does not fit these parts.
    """
    content = read_torch_file(path)
    config, lora = describe_checkpoint(
        content, path, lora_alpha, llm=llm, whisper=whisper, second=second, second_kind=second_kind, **settings
    )
    state = content["model"]
    names = _translate(state, path)
    model = build_salmonn(config, lora=lora, dtype=dtype, ear_precision=ear_precision, llm_weights=llm_weights)
    theirs = _read_config(content)
    _check_mels(model, theirs, path)
    if not config.end_token:
        check_end(model, path)
    if not config.bos_token:
        check_begin(model, path)
    own = {name: state[key] for key, name in names.items() if name is not None}
    _load_strictly_(model, own, path)
    model.own_names = frozenset(own)
    frozen = [f"{part} ({name})" for part, name in (("llm", llm), ("whisper", whisper), ("second", second)) if name]
    source = "teacher.end_token" if settings.get("end_token") else "the file's config"
    told = describe_end(model, source), describe_begin(model, "bos_token" in settings)
    report = KeyReport([k for k, n in names.items() if n], [k for k, n in names.items() if n is None], frozen, *told)
    return model.eval().requires_grad_(False), report


def check_end(model: Salmonn, path: str | Path) -> None:
    """Refuse to guess with which of several tokens a file's answers end that does not say so itself.

    Raises:
        ValueError: naming them.
    """
    tokenizer = model.tokenizer
    ids = dict.fromkeys([tokenizer.eos_token_id, *model.end_ids])
    names = [tokenizer.convert_ids_to_tokens(index) for index in ids if index is not None and index < len(tokenizer)]
    if len(names) > 1:
        raise ValueError(
            f"{path} does not say what ends its answers, but {model.config.llm} knows {', '.join(names)}; set "
            f"teacher.end_token to the one that it was trained with."
        )


def check_begin(model: Salmonn, path: str | Path) -> None:
    """Refuse to guess what stood before a file's prompts where its LLM has no BOS: some trainers put one by number.

    Raises:
        ValueError: naming a token that it may have been.
    """
    tokenizer = model.tokenizer
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"{path} does not say what begins its prompts, but {model.config.llm} has no BOS token and trainers differ "
            f"there; set teacher.bos_token to the token that its trainer put before them, such as "
            f"{tokenizer.pad_token or tokenizer.eos_token}, or to {NO_BOS}."
        )


def describe_begin(model: Salmonn, is_set: bool) -> str:
    """In a few words what begins a model's prompts, and who says so."""
    config, names = model.config, model.tokenizer.convert_ids_to_tokens(model.rows.bos_ids)
    source = "teacher.bos_token" if is_set else "the file's config"
    return f"prompts begin with {' '.join(names) or 'no BOS'} (from {source if config.bos_token else 'the tokenizer'})"


def describe_checkpoint(content: dict, path: str | Path, lora_alpha: float | None = None,
                        **settings) -> tuple[SalmonnConfig, Lora | None]:  # fmt: skip
    """The config and the LoRA of a checkpoint that was read, its tensors perhaps on the meta device.

    Raises:
        ValueError: it is no SALMONN's.
    """
    state = content.get("model")
    if isinstance(state, dict):
        _check_connector(state, content, path)
    if not isinstance(state, dict) or "speech_query_tokens" not in state:
        raise ValueError(f"{path} holds no SALMONN: speech_query_tokens is missing under 'model'; give its checkpoint.")
    theirs = _read_config(content)
    if lora_alpha is None:
        lora_alpha = theirs.get("lora_alpha", SALMONN_LORA.alpha)
    config = SalmonnConfig(**{**_trained_settings(theirs), **_qformer_sizes(state, path), **settings})
    return config, _lora_settings(state, lora_alpha)


def save_checkpoint(model: Salmonn, path: str | Path) -> None:
    """Write the model's own tensors under SALMONN's names, so that SALMONN's code can serve it."""
    state = {}
    for name, parameter in model.named_parameters():
        key = their_name(name)
        if key is not None:
            state[key] = parameter.detach().cpu().clone()
    content = {"model": state, "config": {"model": _settings_to_save(model)}}

    with explain_unwritten(Path(path)), open_atomically(Path(path), "wb") as file:
        torch.save(content, file)


def their_name(name: str) -> str | None:
    """SALMONN's name of one of our tensors; None for a frozen part's."""
    back = {ours: theirs for theirs, ours in DIRECT.items()}
    if name in back:
        return back[name]
    if name.startswith("qformer.qformer."):
        inner = name.removeprefix("qformer.qformer.")
        inner = re.sub(r"^layernorm\.", "embeddings.LayerNorm.", inner)
        return QFORMER + re.sub(r"\.(attention|crossattention)\.attention\.", r".\1.self.", inner)
    if ".lora_" in name:
        return name.replace("llm.", "llama_model.base_model.model.", 1)
    return None


def _check_connector(state: dict[str, Tensor], content: dict, path) -> None:
    """Refuse the file of a training whose Q-Former or projection was frozen: it holds neither."""
    if not any(key.startswith(("ln_speech.", "speech_llama_proj.", "llama_model.")) for key in state):
        return
    lost = [key for key in ("speech_query_tokens", "speech_llama_proj.weight") if key not in state]
    if lost:
        source = _read_config(content).get("ckpt") or "the checkpoint that it started from"
        raise ValueError(
            f"{path} holds no {lost[0]}, as where that part of the connector was frozen in training, but a teacher "
            f"needs all of it; take the missing tensors from {source} into this file's 'model'."
        )


def _translate(state: dict[str, Tensor], path) -> dict[str, str | None]:
    names, unknown = {}, []
    for key in state:
        try:
            names[key] = our_name(key)
        except KeyError:
            unknown.append(key)
    trained = sorted({key.split(".", 1)[0] for key in unknown} & TRAINED_EARS.keys())
    if trained:
        raise ValueError(
            f"{path} holds tensors of {' and '.join(TRAINED_EARS[name] for name in trained)}, which {trained[0]} says "
            f"were trained too, but ears are read from files of their own; save them as such files, name those, and "
            f"take them out of the checkpoint."
        )
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors that no SALMONN has ({', '.join(unknown[:3])}), but every tensor "
            f"must be known; give a checkpoint of this architecture."
        )
    return names


def _read_config(content: dict) -> dict:
    """The model's part of the config that SALMONN's trainer saves beside the tensors; empty where there is none."""
    config = content.get("config")
    return config["model"] if isinstance(config, dict) and "model" in config else {}


def _trained_settings(theirs: dict) -> dict:
    """Our fields out of SALMONN's config."""
    found = {ours: theirs[name] for name, ours in SETTINGS.items() if theirs.get(name) not in (None, "")}
    if "window_level_Qformer" in theirs and not theirs["window_level_Qformer"]:
        found |= {"window_seconds": 0.0, "stride_seconds": 0.0}
    return found


def _check_mels(model: Salmonn, theirs: dict, path) -> None:
    """Refuse a Whisper whose features are not those it was trained on: no tensor's shape tells 80 from 128 mels."""
    trained_on = Path(theirs.get("whisper_path", "")).name
    if not re.search("tiny|base|small|medium|large", trained_on):
        return
    expected, found = (128 if "large-v3" in trained_on else 80), model.whisper.log_mel.num_mels
    if found != expected:
        raise ValueError(
            f"{model.config.whisper} has {found} mel bins, but {path} was trained on {trained_on} with {expected}; "
            f"name that Whisper."
        )


def _settings_to_save(model: Salmonn) -> dict:
    theirs = {name: getattr(model.config, ours) for name, ours in SETTINGS.items()}
    theirs |= {"end_sym": model.config.end_token or model.tokenizer.eos_token, "window_level_Qformer": True}
    if model.tokenizer.bos_token_id is None:  # a file does not say nothing where that would be a question
        theirs["bos_token"] = model.config.bos_token or NO_BOS
    if not model.config.window_seconds:
        theirs["window_level_Qformer"] = False
    if lora := getattr(model.llm, "peft_config", None):
        theirs |= {"lora": True, "lora_rank": lora["default"].r, "lora_alpha": lora["default"].lora_alpha}
    paths = {"llama_path": model.config.llm, "whisper_path": model.config.whisper}
    if model.config.second_kind:
        paths[f"{model.config.second_kind}_path"] = model.config.second
    return {**theirs, **paths, "num_speech_query_token": model.config.num_queries}


def _qformer_sizes(state: dict[str, Tensor], path) -> dict[str, int]:
    first = f"{QFORMER}encoder.layer.0.intermediate_query.dense.weight"
    if first not in state:
        raise ValueError(f"{path} has no {first}, but every SALMONN's Q-Former has; give a whole checkpoint.")
    _, num_queries, width = state["speech_query_tokens"].shape
    layers = {int(m[1]) for key in state if (m := re.match(r"speech_Qformer\.bert\.encoder\.layer\.(\d+)\.", key))}
    ffn = state[first].shape[0]
    return {"num_queries": num_queries, "qformer_width": width, "qformer_layers": len(layers), "qformer_ffn": ffn}


def _lora_settings(state: dict[str, Tensor], alpha: float) -> Lora | None:
    found = [(match, tensor) for key, tensor in state.items() if (match := LORA.match(key)) and match[2] == "lora_A"]
    if not found:
        return None
    targets = sorted({match[1].rsplit(".", 1)[-1] for match, _ in found})
    return Lora(rank=found[0][1].shape[0], alpha=alpha, targets=tuple(targets))


def _load_strictly_(model: Salmonn, own: dict[str, Tensor], path) -> None:
    parameters = dict(model.named_parameters())
    expected = {name for name in parameters if their_name(name) is not None}
    for name in sorted(expected | set(own)):
        found = tuple(own[name].shape) if name in own else "nothing"
        wanted = tuple(parameters[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise ValueError(
                f"{path} holds {found} for {name}, but these parts need {wanted}; check llm, whisper and second."
            )
        assign_parameter_(model, name, own[name])
