"""Reading weights from files that others made: tensors only, never code, and every tensor accounted for.

Knows nothing of any architecture.
"""

import argparse
import json
import pickle
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

# What fairseq's trainer leaves beside the tensors: its options and the numbers of its meters. None of them runs code.
HARMLESS_TYPES = [
    argparse.Namespace,
    types.SimpleNamespace,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
]


def read_torch_file(path: str | Path, device: str = "cpu") -> dict:
    """Load a `torch.save` file without running what it may hold; on the "meta" device no tensor is read.

    Raises:
        ValueError: the file is cut short, is no `torch.save` file, holds code, or holds no dictionary.
    """
    with open(path, "rb") as file, torch.serialization.safe_globals(HARMLESS_TYPES):
        try:
            content = torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds Python objects or is no torch.save file, but only tensors and plain values are loaded "
                f"({_first_line(error)}); take the file from its authors, or save its tensors alone."
            ) from error
        except Exception as error:  # what begins like a pickle and is none can fail anywhere in its reader
            raise ValueError(
                f"{path} is {Path(path).stat().st_size} bytes, but they are no whole torch.save file "
                f"({_first_line(error)}); download it again."
            ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but a dictionary is needed; name a checkpoint.")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_json(path: str | Path, *keys: str) -> dict:
    """A JSON object from a file.

    Raises:
        ValueError: the file is not JSON, holds no object, or one without these keys.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({_first_line(error)}), but must be whole; restore it, or download or save it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but an object is needed; name another file.")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}, but {', '.join(keys)} are needed; name another file.")
    return content


def read_model_config(path: str | Path, model_type: str, *also: str) -> dict:
    """The `config.json` of a Hugging Face folder or hub id.

    Raises:
        ValueError: it describes a model neither of `model_type` nor of the types that do as well.
    """
    file = cached_file(path, "config.json")
    config = read_json(file)
    if "model_type" not in config or config["model_type"] not in (model_type, *also):
        found = f"model_type {config['model_type']}" if "model_type" in config else "no model_type"
        raise ValueError(f"{file} has {found}, but {model_type} is needed; name a folder of such a model.")
    return config


def find_safetensors(path: str | Path) -> list[str]:
    """The safetensors files of a Hugging Face folder or hub id: the only one, or those that its index names.

    Raises:
        ValueError: there is none.
    """
    single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [single]
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise ValueError(
            f"{path} has no model.safetensors, but weights are read from safetensors only; "
            f"convert it with transformers' save_pretrained."
        )
    return [cached_file(path, file) for file in sorted(set(read_json(index, "weight_map")["weight_map"].values()))]


@contextmanager
def open_safetensors(file: str | Path) -> Iterator:
    """A handle that reads tensors one by one, see `safetensors.safe_open`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise ValueError(f"{file} is not there, but the weights are in it; restore it.") from error
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged ({error}), but whole safetensors are needed; download it again."
        ) from error


def read_safetensors(file: str | Path, prefixes: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors whose names begin with one of `prefixes`, named without it; the others are not read.

    Raises:
        ValueError: the file is damaged.
    """
    weights = {}
    with open_safetensors(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is not None:
                weights[name.removeprefix(prefix)] = tensors.get_tensor(name).to(dtype)
    return weights


def load_strictly_(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Give a module on the meta device its weights.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names the first of each.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(faults.values()):
        report = "; ".join(f"{len(names)} {fault} ({names[0]})" for fault, names in faults.items() if names)
        raise ValueError(
            f"{path} holds {len(weights)} tensors, but this {type(module).__name__} has {len(expected)} of other names "
            f"or shapes: {report}; use the weights and the config of one model of this architecture."
        )
    module.load_state_dict(weights, assign=True)


def assign_parameter_(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Give one parameter its value, in place, in its own precision; one on the meta device gets memory, tied or not."""
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        parameter.data.copy_(tensor)
        return
    real = nn.Parameter(tensor.to(parameter.dtype, copy=True), requires_grad=parameter.requires_grad)
    for module in model.modules():
        for key, held in list(module.named_parameters(recurse=False)):
            if held is parameter:
                setattr(module, key, real)
