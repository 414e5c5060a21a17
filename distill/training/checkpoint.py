"""Checkpoints of a run: trainable tensors, AdamW's moments and where the stream stands, whole or not at all.

The moments are written by parameter name, the same file under DDP and ZeRO, so that a run can go on with another number
of ranks; those in 8 bits as they are, codes and scales. Nothing is pickled.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.training.ranks import is_deepspeed
from shards.files.hash import hash_file
from shards.files.write import as_system_errors, folder_atomically, remove_leftovers
from shards.jsonfile import ShapeError, is_a, read_object, show

PREFIX, STATE, WEIGHTS, MOMENTS, MANIFEST = (
    "step-", "state.json", "trainable.safetensors", "moments.safetensors", "manifest.json",
)  # fmt: skip
FILES = (STATE, WEIGHTS, MOMENTS)  # that a manifest names, all of them
STATE_FIELDS = {"step": int, "identity": dict, "stream": dict, "best": dict}
OUR_NAME = re.compile(rf"{PREFIX}(\d{{6,}})")
KINDS = ("exp_avg", "exp_avg_sq")
KINDS_8BIT = ("state1", "state2", "absmax1", "absmax2")  # bitsandbytes' names; small tensors have no scales


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found whole."""

    folder: Path
    step: int
    state: dict


def save_checkpoint(
    folder: Path, step: int, state: dict, weights: dict[str, Tensor], moments: dict[str, Tensor]
) -> Path:
    """Write `folder/step-NNNNNN`: to a temporary name, synced, with a hash of each file, then renamed.

    A whole one of that step stays as it is: the same run wrote it.
    """
    final = checkpoint_folder(folder, step)
    if damage(final) is None:
        return final
    remove_leftovers(folder, f"{PREFIX}*")  # of a process that was killed: a run has one writer
    try:
        with folder_atomically(final) as new:
            with as_system_errors():
                save_file(weights, new / WEIGHTS)
                save_file(moments, new / MOMENTS)
            (new / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
            manifest = {f.name: [f.stat().st_size, hash_file(f)] for f in sorted(new.iterdir())}
            (new / MANIFEST).write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(final, ignore_errors=True)  # it is damaged, if it is there at all
    except OSError as error:
        raise OSError(
            f"checkpoint {final} cannot be written ({error.strerror or error}), but a run must go on from it; "
            f"free space or change runs=, then start again: the checkpoints before it are whole."
        ) from error
    return final


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return folder / f"{PREFIX}{step:06d}"


def find_resumable(run_folder: Path, resume: str, say) -> Saved | None:
    """The checkpoint that a run goes on from; None where it starts anew.

    Args:
        run_folder: the folder of the run; its checkpoints are in `checkpoints`.
        resume: "auto", "must" (refuse where there is none) or "never" (refuse where there is one).
        say: is told of damaged checkpoints that are passed over, and of a start anew.

    Raises:
        FileNotFoundError, FileExistsError: `resume` forbids it.
    """
    saved = find_checkpoint(run_folder / "checkpoints", say)
    if saved is None:
        if resume == "must":
            raise FileNotFoundError(
                f"train.resume is 'must', but {run_folder}/checkpoints holds no whole checkpoint; "
                f"use train.resume=auto to start anew."
            )
        say(f"{run_folder} holds no checkpoint to go on from: step 1 is next")
        return None
    if resume == "never":
        raise FileExistsError(
            f"train.resume is 'never', but {saved.folder} is a checkpoint; choose another name= or remove it."
        )
    return saved


def find_checkpoint(folder: Path, say, is_wanted: Callable[[dict], bool] = lambda state: True) -> Saved | None:
    """The newest whole checkpoint whose state is wanted; damaged ones are named through `say` and passed over."""
    for step, path in reversed(list_checkpoints(folder)):
        problem = damage(path)
        if problem is not None:
            say(f"{path} is passed over: {problem}")
        elif is_wanted(state := read_object(path / STATE, STATE_FIELDS)):
            return Saved(path, step, state)
    return None


def remove_later(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps than one that a run goes back to: they will be others."""
    for number, path in reversed(list_checkpoints(folder)):
        if number > step and not path.is_symlink():
            shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of a run's checkpoints, whole or not, in the order of the steps; what others put there is not.

    Names of up to six digits sort as text, but step 1,000,000 does not.
    """
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        match = OUR_NAME.fullmatch(path.name)
        if match is not None and path == checkpoint_folder(folder, int(match[1])) and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: all files are there, all hashes are right, the state is of its step."""
    try:
        manifest = _read(path / MANIFEST, dict.fromkeys(FILES, list))
        for name in FILES:
            problem = _file_damage(path / name, manifest[name])
            if problem is not None:
                return problem
        step = _read(path / STATE, STATE_FIELDS)["step"]
    except ShapeError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror or error})"
    return None if path.name == checkpoint_folder(path.parent, step).name else f"{STATE} is of step {step}"


def _read(file: Path, fields: dict[str, type]) -> dict:
    try:
        return read_object(file, fields)
    except ShapeError as error:
        raise ShapeError(f"{file.name} {error}") from error


def _file_damage(file: Path, entry: list) -> str | None:
    """What is wrong with a file that the manifest lists as `[bytes, sha256]`."""
    if len(entry) != 2 or not is_a(entry[0], int) or not is_a(entry[1], str):
        return f"{MANIFEST} has {show(entry)} for {file.name}, but must have its bytes and its sha256"
    size, sha256 = entry
    if not file.is_file() or file.stat().st_size != size:
        return f"{file.name} is not there with {size} bytes"
    if hash_file(file) != sha256:
        return f"{file.name} has another sha256 than {sha256[:16]}"
    return None


def prune(folder: Path, step: int, keep: int, best_step: int) -> None:
    """Remove the checkpoints before a step that was just saved, but for the newest `keep` and that of the best step.

    Those of later steps were passed over as damaged, so they neither count nor go, and links lead elsewhere.
    """
    older = [(number, path) for number, path in list_checkpoints(folder) if number <= step]
    for number, path in older[:-keep]:
        if number != best_step and not path.is_symlink():
            shutil.rmtree(path)


def load_weights_(parameters: dict[str, nn.Parameter], file: Path) -> None:
    """Copy a checkpoint's tensors into the parameters of their names, in place.

    Raises:
        ValueError: the file names a tensor that is not there, or one of another shape.
    """
    for name, tensor in load_file(file).items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such tensor"
            raise ValueError(
                f"tensor {name} of {file} has shape {tuple(tensor.shape)}, but this run has {found}; "
                f"choose another name= for a new run, or put the config back."
            )
        parameters[name].data.copy_(tensor)


def gather_moments(accelerator: Accelerator, optimizer, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's moments by `NAME.exp_avg` and `NAME.exp_avg_sq`, float32 on the CPU. Every rank must call it."""
    moments: dict[str, Tensor] = {}
    if is_deepspeed(accelerator):
        from deepspeed.utils import safe_get_full_optimizer_state

        link_states_(optimizer)
        for name, parameter in named.items():
            for kind in KINDS:
                moments[f"{name}.{kind}"] = safe_get_full_optimizer_state(parameter, kind).float().cpu().clone()
        return moments
    state = inner_optimizer(optimizer).state
    if is_8bit(optimizer):
        kept = [(name, kind, state[p][kind]) for name, p in named.items() for kind in KINDS_8BIT if kind in state[p]]
        return {f"{name}.{kind}": tensor.cpu() for name, kind, tensor in kept}
    for name, parameter in named.items():
        for kind in KINDS:
            is_new = parameter not in state  # no step has changed it yet
            moments[f"{name}.{kind}"] = (
                torch.zeros_like(parameter, device="cpu") if is_new else state[parameter][kind].float().cpu()
            )
    return moments


def restore_moments_(
    accelerator: Accelerator, optimizer, named: dict[str, nn.Parameter], file: Path, step: int
) -> None:
    """Put AdamW's moments and step count back, in place; every rank must call it."""
    moments = load_file(file)
    state = inner_optimizer(optimizer).state
    if is_8bit(optimizer):
        return _restore_8bit_(inner_optimizer(optimizer), named, moments, step)
    if not is_deepspeed(accelerator):
        for name, parameter in named.items():
            state[parameter] = {kind: moments[f"{name}.{kind}"].to(parameter.device) for kind in KINDS}
            state[parameter]["step"] = torch.tensor(float(step))
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    for group in inner_optimizer(optimizer).param_groups:
        for flat in group["params"]:
            state[flat] = {kind: torch.zeros_like(flat) for kind in KINDS} | {"step": torch.tensor(float(step))}
    link_states_(optimizer)
    for name, parameter in named.items():
        for kind in KINDS:
            safe_set_full_optimizer_state(parameter, moments[f"{name}.{kind}"].to(parameter.device), kind)


def is_8bit(optimizer) -> bool:
    """Whether its moments are bitsandbytes' codes."""
    return hasattr(inner_optimizer(optimizer), "name2qmap")


def _restore_8bit_(optimizer, named: dict[str, nn.Parameter], moments: dict[str, Tensor], step: int) -> None:
    names = {id(parameter): name for name, parameter in named.items()}
    for g, group in enumerate(optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, g, p)
            state = optimizer.state[parameter]
            state["step"] = step
            for kind in KINDS_8BIT:
                if kind in state:
                    state[kind].copy_(moments[f"{names[id(parameter)]}.{kind}"])


def link_states_(optimizer) -> None:
    """Let ZeRO-1 and 2 find each parameter's moments.

    DeepSpeed links them once, after the first parameter group's first step, when the other groups' are not there yet.
    """
    zero = optimizer.optimizer  # DeepSpeed's, inside accelerate's wrapper
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def inner_optimizer(optimizer) -> torch.optim.Optimizer:
    """torch's own optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
