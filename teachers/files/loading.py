"""A SALMONN on disk: built from named parts, saved as its own tensors, loaded back. Knows no training.

A saved folder holds `config.json` (the parts' names, LoRA, and the hash of every frozen part), `model.safetensors`
(the tensors that are the model's own: all that are trainable, or all when it is exported) and the tokenizer.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from shards.field_types import expand_home, to_path
from shards.files.hash import remember_hash
from shards.files.write import staged
from shards.status import is_quiet
from teachers.ears.encoders import WHISPER, load_encoder
from teachers.ears.precision import WEIGHTS as WEIGHTS_OF_EARS
from teachers.ears.precision import set_ear_precision_
from teachers.ears.shape import reshape_ears_
from teachers.files.weights import assign_parameter_, open_safetensors, read_json
from teachers.lora import Lora, add_lora_
from teachers.salmonn import Salmonn, SalmonnConfig
from teachers.words.prefix import add_prefix_
from teachers.words.templates import CHAT, read_chat

if is_quiet() or not sys.stderr.isatty():  # a bar is for who watches
    disable_progress_bar()

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
# fields of `SalmonnConfig` that name a place; "./…": in the folder
PARTS = ("llm", "whisper", "second", "prompts", "eval_prompts")


def build_salmonn(config: SalmonnConfig, *, lora: Lora | None = None, dtype: torch.dtype = torch.float32,
                  transform_llm_=None, tokenizer_path: str | Path | None = None,
                  ears: tuple[nn.Module, nn.Module | None] | None = None,
                  ear_precision: str = "", llm_weights: bool = True) -> Salmonn:  # fmt: skip
    """Put a model together from pre-trained parts; Q-Former and projection are new. Ears and LLM are frozen.

    Args:
        config: names of the parts and sizes.
        lora: LoRA to add to the LLM.
        dtype: the data type of the LLM's and the encoders' weights.
        transform_llm_: changes the LLM in place before LoRA, such as `students.quantize.quantize_4bit_`.
        tokenizer_path: where the tokenizer lies when not with the LLM.
        ears: encoders to share instead of loading them by name, in the form that the config says.
        ear_precision: how encoders that are loaded hear, see `teachers.ears.precision`; empty: as `dtype` says.
        llm_weights: False leaves the LLM on the meta device, for a teacher whose targets are cached.
    """
    llm = load_llm(config.llm, dtype, weights=llm_weights)
    if transform_llm_ is not None:
        transform_llm_(llm)
    if config.prefix_tokens:
        add_prefix_(llm, config.prefix_tokens)
    llm.requires_grad_(False)
    if lora is not None:
        add_lora_(llm, lora)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path or config.llm)
    config = in_own_words(config, tokenizer)
    whisper, second = ears if ears is not None else load_ears(config, dtype, ear_precision)
    return Salmonn(config, llm, tokenizer, whisper, second)


def in_own_words(config: SalmonnConfig, tokenizer) -> SalmonnConfig:
    """The config with the text of the chat form that it asks for; the ends that it names itself stay.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if config.template != CHAT:
        return config
    form = read_chat(tokenizer)
    named = {name: getattr(config, name) for name in ("end_token", "bos_token") if getattr(config, name)}
    return dataclasses.replace(config, **form | named)


def load_ears(config: SalmonnConfig, dtype: torch.dtype, ear_precision: str = "") -> tuple[nn.Module, nn.Module | None]:
    """The encoders a config names, frozen and in evaluation mode."""
    dtype = WEIGHTS_OF_EARS[ear_precision] if ear_precision else dtype
    second = load_ear(config.second_kind, config.second, dtype) if config.second else None
    whisper = load_ear(WHISPER, config.whisper, dtype)
    reshape_ears_(whisper, second, **config.ears_form)
    for ear in (whisper, second):
        if ear_precision and ear is not None:
            set_ear_precision_(ear, ear_precision)
    return whisper, second


def load_ear(kind: str, path: str, dtype: torch.dtype) -> nn.Module:
    """One encoder by name, frozen and in evaluation mode."""
    return load_encoder(kind, path, dtype=dtype).requires_grad_(False).eval()


def load_llm(path: str, dtype: torch.dtype, *, weights: bool = True) -> nn.Module:
    """A causal LM from a local folder or hub id; its code is transformers' own, never the repository's.

    Args:
        path: folder or hub id.
        dtype: the data type of the weights.
        weights: False gives the LLM on the meta device.

    Raises:
        FileNotFoundError: `path` is no folder here and cannot be had from the hub.
        ValueError: its weights are a pickle that would run code.
        ValueError: its weights are damaged, it is an adapter, or a model that only its repository's own code can run.
    """
    refuse_adapter(path)
    try:
        refuse_foreign(path)
        if weights:
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False):
            llm.generation_config = GenerationConfig.from_pretrained(path)  # its end ids are the LLM's, loaded or not
        return llm
    except SafetensorError as error:
        raise ValueError(f"llm is {path}, but its weights are damaged ({error}); download it again.") from error
    except OSError as error:
        raise FileNotFoundError(
            f"llm is {path}, but it is no folder of a causal LM here and the hub does not give it "
            f"({str(error).splitlines()[0]}); give a local path, or log in with `hf auth login`."
        ) from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"llm {path} has weights whose pickle runs code, but none is run here; get its safetensors files, or save "
            f"it again with transformers' save_pretrained."
        ) from error


def refuse_foreign(path: str) -> None:
    """Refuse a model that transformers would run with the repository's own code, and asks on the terminal whether to.

    Raises:
        ValueError: naming its kind.
        OSError: there is no such model.
    """
    config, _ = PretrainedConfig.get_config_dict(path)
    if "auto_map" in config and config["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"llm is {path}, a {config['model_type']}, which only code of its repository can run, but none is run "
            f"here; take a model that transformers {transformers.__version__} has itself, such as Llama, Qwen, Mixtral "
            f"or DeepSeek-V2."
        )


def refuse_adapter(folder: str) -> None:
    """Refuse a folder of an adapter: transformers would quietly load its base and put the adapter on it.

    Raises:
        ValueError: naming the base.
    """
    path = Path(folder) / "adapter_config.json"
    if path.is_file():
        base = read_json(path).get("base_model_name_or_path")
        raise ValueError(
            f"llm is {folder}, but that folder holds a PEFT adapter on {base}, no LLM; merge it (peft's "
            f"merge_and_unload), save the result with its tokenizer, and name that folder."
        )


def save_salmonn(model: Salmonn, folder: str | Path, *, settings: dict | None = None,
                 weights: Path | None = None) -> None:  # fmt: skip
    """Write the model's own (trainable) tensors, its config and its tokenizer, all of them or none.

    Args:
        model: the model.
        folder: is made if it is not there.
        settings: what is needed to build the model again beside its config, such as `{"lora": …}`.
        weights: the file it was loaded from, which is copied: of a model that only answers, whose own are changed.

    Raises:
        OSError: they cannot be written; the folder stays as it was.
        ValueError: it only answers, and there is no file of what was trained.
    """
    if model.only_answers and weights is None:
        raise ValueError(
            f"model was loaded to answer alone ({model.only_answers}), but what is saved must be what was trained; "
            f"load it without for_inference."
        )
    names = {name: getattr(model.config, name) for name in PARTS}
    places = {name: os.path.normpath(place) for name, place in names.items() if place.startswith("./")}
    config = {
        "model": dataclasses.asdict(model.config) | places,  # "./" is said of what lies in the folder itself
        "settings": settings or {},
        "frozen": hash_frozen_parts(model),
    }
    with staged(to_path(folder), last=CONFIG) as stage:
        if weights is None:
            save_file(own_tensors(model), stage / WEIGHTS)
        else:
            shutil.copyfile(weights, stage / WEIGHTS)
        model.tokenizer.save_pretrained(stage / TOKENIZER)
        (stage / CONFIG).write_text(json.dumps(config, indent=1))


def read_config(folder: str | Path) -> dict:
    """A saved folder's `config.json`, with `model` as a `SalmonnConfig`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of something else, such as a model of Hugging Face.
    """
    folder = expand_home(folder)
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"model folder {folder} holds no {CONFIG}, but a saved model does; check the path.")
    stored = read_json(path)
    try:
        parts, settings, frozen = SalmonnConfig(**stored["model"]), stored["settings"], stored["frozen"]
    except (KeyError, TypeError) as error:
        kind = f"of model_type {stored['model_type']}" if "model_type" in stored else f"not one of ours ({error})"
        raise ValueError(
            f"{path} is {kind}, but a folder that this library saved is needed, as runs/NAME/student is; name one, or "
            f"a SALMONN checkpoint (.pth) where a teacher is asked for."
        ) from error
    inside = {name: getattr(parts, name) for name in PARTS if getattr(parts, name).startswith("./")}
    if inside:  # it was exported with them, and may have been moved
        parts = dataclasses.replace(
            parts, **{name: os.path.abspath(Path(folder) / place) for name, place in inside.items()}
        )
    return {"model": parts, "settings": settings, "frozen": frozen}


def load_salmonn(folder: str | Path, *, dtype: torch.dtype = torch.float32, transform_llm_=None,
                 ear_precision: str = "", llm_weights: bool = True,
                 places: Mapping[str, str] | None = None) -> Salmonn:  # fmt: skip
    """Load a folder that `save_salmonn` wrote, in evaluation mode and frozen; arguments as `build_salmonn` takes them.

    Args:
        places: where frozen parts (llm, whisper, second) lie now, if not where they lay when the folder was saved.

    Raises:
        FileNotFoundError: no model there, or one of its parts is gone.
        ValueError: a frozen part is not the one that the model was trained with, or the tensors do not fit.
    """
    folder = expand_home(folder)
    config = read_config(folder)
    parts = dataclasses.replace(config["model"], **(places or {}))
    model = build_salmonn(parts, lora=lora_settings(config), dtype=dtype, transform_llm_=transform_llm_,
                          tokenizer_path=Path(folder) / TOKENIZER, ear_precision=ear_precision,
                          llm_weights=llm_weights)  # fmt: skip
    load_own_tensors_(model, Path(folder) / WEIGHTS)
    model.own_names = frozenset(read_names(Path(folder) / WEIGHTS))
    for part, found in hash_frozen_parts(model).items():
        expected = config["frozen"].get(part)
        if found != expected:
            raise ValueError(
                f"{part} of {folder} has hash {found[:16]} ({getattr(parts, part)}), but the model was trained with "
                f"{str(expected)[:16]}; put the original weights back under the path in {CONFIG}, or name where they "
                f"lie now."
            )
    return model.eval().requires_grad_(False)


def lora_settings(config: dict) -> Lora | None:
    """The LoRA that a saved folder's `config.json` names."""
    lora = config["settings"].get("lora")
    return Lora(**{**lora, "targets": tuple(lora["targets"])}) if lora else None


def own_tensors(model: Salmonn) -> dict[str, Tensor]:
    """The model's own tensors by name, on the CPU: those it was loaded with, or else all that are trainable.

    Inherited ones are among them: a teacher's ears that were trained lie in no checkpoint of an encoder.
    """
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if name in model.inherited_names
        or (name in model.own_names if model.own_names is not None else parameter.requires_grad)
    }


def read_names(path: Path) -> set[str]:
    """The names of the tensors of a safetensors file."""
    with open_safetensors(path) as file:
        return set(file.keys())


def load_own_tensors_(model: nn.Module, path: Path) -> None:
    """Copy a safetensors file into the model, in place, strictly.

    Raises:
        ValueError: the file is damaged, or names a tensor that the model does not have, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            tensor = file.get_tensor(name)
            if name not in parameters or parameters[name].shape != tensor.shape:
                found = tuple(parameters[name].shape) if name in parameters else "no such tensor"
                raise ValueError(
                    f"tensor {name} of {path} has shape {tuple(tensor.shape)}, but the model has {found}; "
                    f"the file belongs to a model of another config."
                )
            assign_parameter_(model, name, tensor)


def hash_frozen_parts(model: Salmonn, names: Sequence[str] = ("llm", "whisper", "second"),
                      how: Callable[[str], str] | None = None) -> dict[str, str]:  # fmt: skip
    """The hash of the checkpoint behind every part of these names that is not wholly the model's own.

    `how` gives it from a path; None: `hash_checkpoint`.
    """
    own, how = own_tensors(model), how or hash_checkpoint
    parts = {name.split(".", 1)[0] for name, _ in model.named_parameters() if name not in own}
    return {name: how(getattr(model.config, name)) for name in names if name in parts}


def hash_checkpoint(path: str) -> str:
    """sha256 over the weight files of a folder, of a hub id's local copy, or of one file."""
    place = find_place(path)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin"))
    return hash_files(files)


def identify_checkpoint(path: str) -> str:
    """As `hash_checkpoint`, with config and tokenizer beside the weights: all that answers come from."""
    place = find_place(path)
    beside = [] if place.is_file() else [*place.glob("config.json"), *place.glob("tokenizer*")]
    rest = hash_files(sorted(file for file in beside if file.is_file()))
    return hashlib.sha256(f"{hash_checkpoint(path)} {rest}".encode()).hexdigest()


def find_place(path: str) -> Path:
    """A local file or folder, or a hub id's local copy."""
    return Path(path) if Path(path).exists() else Path(cached_file(path, CONFIG)).parent


def hash_files(files: Sequence[Path]) -> str:
    """sha256 over the hashes of files, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(remember_hash(file)))
    return digest.hexdigest()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
