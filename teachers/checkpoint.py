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

from teachers.loading import build_salmonn, write_atomically
from teachers.lora import Lora
from teachers.salmonn import Salmonn, SalmonnConfig
from teachers.weights import read_torch_file

LORA = re.compile(r"llama_model\.(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight$")
# Saved beside the trainable tensors though they are not: buffers, and second names of shared or tied frozen tensors
LEFTOVER = re.compile(
    r"speech_Qformer\.bert\.embeddings\.position_ids$|.*relative_attention_bias\.weight$|.*lm_head\.weight$|.*inv_freq$"
)
QFORMER = "speech_Qformer.bert."
DIRECT = {
    "speech_query_tokens": "qformer.query",
    "speech_llama_proj.weight": "project.weight",
    "speech_llama_proj.bias": "project.bias",
    "ln_speech.weight": "ln_speech.weight",
    "ln_speech.bias": "ln_speech.bias",
    "ln_audio.weight": "ln_audio.weight",
    "ln_audio.bias": "ln_audio.bias",
}


@dataclass(frozen=True)
class KeyReport:
    """What became of a checkpoint's keys. Anything else is an error."""

    loaded: list[str]
    leftover: list[str]  # in the file, and rightly not loaded
    frozen: list[str]  # parts that are expected from elsewhere

    def __str__(self) -> str:
        return f"{len(self.loaded)} tensors loaded, {len(self.leftover)} leftovers, frozen: {', '.join(self.frozen)}"


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
                    qformer_heads: int = 12, lora_alpha: float = 32.0, end_token: str = "", windows: str = "all",
                    prompts: str = "", dtype: torch.dtype = torch.float32) -> tuple[Salmonn, KeyReport]:  # fmt: skip
    """A released SALMONN as a frozen teacher, and the report of its keys.

    Args:
        path: the `.pth` file.
        llm, whisper, second, second_kind: the frozen parts it was trained on, as in `SalmonnConfig`.
        qformer_heads, lora_alpha: what no tensor's shape tells.
        end_token: text it ends answers with; empty: the tokenizer's end token.
        windows, prompts: as in `SalmonnConfig`.
        dtype: of the LLM's weights.

    Raises:
        ValueError: the file is no SALMONN checkpoint, holds code or is cut, or does not fit these parts.
    """
    state = read_torch_file(path).get("model")
    if state is None or "speech_query_tokens" not in state:
        raise ValueError(f"{path} holds no SALMONN: speech_query_tokens is missing under 'model'; give its checkpoint.")
    names = _translate(state, path)
    config = SalmonnConfig(
        llm=llm, whisper=whisper, second=second, second_kind=second_kind, windows=windows, prompts=prompts,
        end_token=end_token, qformer_heads=qformer_heads, **_qformer_sizes(state),
    )  # fmt: skip
    model = build_salmonn(config, lora=_lora_settings(state, lora_alpha), dtype=dtype)
    own = {name: state[key] for key, name in names.items() if name is not None}
    _load_strictly_(model, own, path)
    model.own_names = frozenset(own)
    frozen = [f"{part} ({name})" for part, name in (("llm", llm), ("whisper", whisper), ("second", second)) if name]
    report = KeyReport([k for k, n in names.items() if n], [k for k, n in names.items() if n is None], frozen)
    return model.eval().requires_grad_(False), report


def save_checkpoint(model: Salmonn, path: str | Path) -> None:
    """Write the model's own tensors under SALMONN's names, so that SALMONN's code can serve it."""
    state = {}
    for name, parameter in model.named_parameters():
        key = their_name(name)
        if key is not None:
            state[key] = parameter.detach().cpu().clone()
    write_atomically(Path(path), lambda temporary: torch.save({"model": state}, temporary))


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


def _translate(state: dict[str, Tensor], path) -> dict[str, str | None]:
    names, unknown = {}, []
    for key in state:
        try:
            names[key] = our_name(key)
        except KeyError:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors that no SALMONN has ({', '.join(unknown[:3])}), but every tensor "
            f"must be known; give a checkpoint of this architecture."
        )
    return names


def _qformer_sizes(state: dict[str, Tensor]) -> dict[str, int]:
    _, num_queries, width = state["speech_query_tokens"].shape
    layers = {int(m[1]) for key in state if (m := re.match(r"speech_Qformer\.bert\.encoder\.layer\.(\d+)\.", key))}
    ffn = state[f"{QFORMER}encoder.layer.0.intermediate_query.dense.weight"].shape[0]
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
        parameters[name].data.copy_(own[name])
