"""A student that goes on from a saved one: what fits is copied, and what does not fit is refused. Knows no training."""

import dataclasses
import hashlib
import json
from pathlib import Path

from teachers.files.loading import (
    WEIGHTS,
    hash_frozen_parts,
    hash_tensors,
    load_own_tensors_,
    own_tensors,
    read_config,
    read_names,
)
from teachers.files.weights import open_safetensors
from teachers.lora import Lora
from teachers.salmonn import Salmonn

# names of places, and what no weight tells
MAY_DIFFER = ("llm", "whisper", "second", "prompts", "eval_prompts", "qformer_dropout")


def load_start_weights_(student: Salmonn, folder: str | Path, *, lora: Lora, quantization: str | None,
                        field: str = "student.start") -> None:  # fmt: skip
    """Give a new student, or a new teacher, the tensors of a saved one, in place.

    Args:
        student: as `build_student` makes it.
        folder: the folder of the saved one, from `save_student`.
        lora, quantization: the settings of the new one; a teacher has no quantization.
        field: the name of the configuration field that names the folder, for messages.

    Raises:
        FileNotFoundError: there is no saved student.
        ValueError: it has another shape, LoRA, quantization or frozen weights; both values are named.
    """
    saved, weights = read_config(folder), Path(folder) / WEIGHTS
    own_settings = {"lora": dataclasses.asdict(lora), "quantization": quantization}
    own = _describe(dataclasses.asdict(student.config), own_settings, hash_frozen_parts(student))
    theirs = _describe(dataclasses.asdict(saved["model"]), saved["settings"], saved["frozen"])
    for name in sorted(own | theirs):
        if own.get(name) != theirs.get(name):
            raise ValueError(
                f"{field} is {folder}, whose {name} is {theirs.get(name)!r}, but this run's is "
                f"{own.get(name)!r}; set it as it was, or start from another one."
            )
    missing = sorted(set(own_tensors(student)) - read_names(weights))
    if missing:
        raise ValueError(
            f"{field} is {folder}, which holds no tensor {missing[0]}, but this run trains it; start from one "
            f"that a run of this config saved."
        )
    load_own_tensors_(student, weights)


def identify_student(folder: str | Path) -> dict[str, str]:
    """What a saved student is: hashes of its own tensors, of its frozen parts, and of its settings.

    Raises:
        FileNotFoundError: there is no saved student.
    """
    config = read_config(folder)
    settings = hashlib.sha256(json.dumps(config["settings"], sort_keys=True).encode()).hexdigest()
    with open_safetensors(Path(folder) / WEIGHTS) as file:
        own = hash_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (it is no dict)
    return {"own": own, "settings": settings, **config["frozen"]}


def _describe(model: dict, settings: dict, frozen: dict[str, str]) -> dict[str, object]:
    """A student as flat names and plain values, without what may differ."""
    settings = json.loads(json.dumps(settings))  # as a saved one's: lists for tuples
    lora = {f"lora {name}": value for name, value in (settings.get("lora") or {}).items() if name != "dropout"}
    shape = {name: value for name, value in model.items() if name not in MAY_DIFFER}
    parts = {f"frozen {name}": found for name, found in frozen.items()}
    return shape | lora | {"quantization": settings.get("quantization")} | parts
