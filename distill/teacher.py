"""The teacher a config names, loaded: a saved folder, the demo's own, a released SALMONN or Qwen2-Audio."""

import time
from pathlib import Path

import torch

from distill.config import Config
from distill.training.ranks import resolve_precision
from shards.sample import SAMPLE_RATE
from shards.status import print_status
from shards.targets.codecs.table import find_codec
from shards.targets.header import HEAD_INPUT
from teachers.ears.precision import WEIGHTS
from teachers.fourbit import count_bytes
from teachers.int8 import narrow_llm_
from teachers.kinds import KINDS, find_kind
from teachers.online import OnlineTeacher
from teachers.salmonn import Salmonn


def teacher_path(config: Config) -> Path:
    """Where the teacher lies: `teacher.path`, or what `distill teach` made from nothing.

    Raises:
        ValueError: the config names no teacher.
    """
    if config.teacher.path:
        return Path(config.teacher.path)
    if config.scratch.steps:
        return config.run_folder / "scratch" / "teacher"
    raise ValueError(
        "teacher.path is empty, but a teacher is needed; give a saved folder or a SALMONN checkpoint, or make one with "
        "`distill teach`."
    )


def precision_name(config: Config) -> str:
    """The run's precision as `teacher.ears` names it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float32"}[
        resolve_precision(config.precision)
    ]


def resolve_ears(config: Config, *, is_kept: bool) -> str:
    """How the teacher's ears hear, one of `teachers.ears.precision.WEIGHTS`; the one place that says so.

    Args:
        config: the configuration of the run.
        is_kept: what they hear goes to a disk, where it outlives the run, and no step waits for it.
    """
    asked = config.teacher.ears
    if asked == "auto":
        return "float32" if is_kept else precision_name(config)
    if asked == "fp16" and not torch.cuda.is_available():
        return "float32"
    return asked


def load_to_keep(config: Config, device: torch.device | str) -> OnlineTeacher:
    """The teacher whose targets go to a disk, on a device; what its ears cost beyond the run's precision is said."""
    ears, own = resolve_ears(config, is_kept=True), precision_name(config)
    if config.teacher.ears == "fp16" != ears:
        print_status(
            "teacher.ears is fp16, but without a GPU there is no fp16 autocast that pays; its ears hear in float32"
        )
    model = load_teacher(config, ears=ears).to(device)
    if ears != own:
        print_status(describe_cost(model, ears, own))
    return teach_online(config, model)


def describe_cost(model: Salmonn, ears: str, own: str) -> str:
    """One line on what ears of another precision than the run's cost: bytes of weights, and the time of a clip."""
    parts = [ear for ear in (model.whisper, model.second) if ear is not None]
    gigabytes = sum(map(count_bytes, parts)) / 1e9
    factor = WEIGHTS[ears].itemsize / WEIGHTS[own].itemsize
    seconds = time_ears(model)
    try:
        for ear in parts:
            ear.precision = own
        with torch.autocast(model.device.type, resolve_precision(own), enabled=own != "float32"):
            others = time_ears(model)
    finally:
        for ear in parts:
            ear.precision = ears
    return (
        f"the teacher's ears hear in {ears} (teacher.ears): {gigabytes:.3g} GB of weights where {own} has "
        f"{gigabytes / factor:.3g}, {1e3 * seconds:.3g} ms a clip where {own} products take {1e3 * others:.3g}"
    )


@torch.no_grad()
def time_ears(model: Salmonn) -> float:
    """Seconds that the ears take for one second of noise, padded as they pad it; the second of two calls."""
    waveforms_BN, num_samples_B = torch.randn(1, SAMPLE_RATE, device=model.device) / 10, torch.tensor([SAMPLE_RATE])
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        frames = model.frames(waveforms_BN, num_samples_B.to(model.device))
        frames[0].sum().item()  # waits for the GPU
        seconds = time.perf_counter() - began
    return seconds


def load_teacher(config: Config, *, llm_weights: bool = True, ears: str = "") -> Salmonn:
    """The frozen teacher, in evaluation mode, on the CPU; evaluation asks it with `eval.prompts`.

    Args:
        config: the configuration of the run.
        llm_weights: False leaves the LLM on the meta device: of a teacher whose targets are cached, ears, connector and
            names are all that a run needs. A Qwen2-Audio comes whole.
        ears: how they hear, see `teachers.ears.precision`; empty: as for a teacher whose targets are not kept.

    Raises:
        FileNotFoundError: there is nothing at its path.
        ValueError: a checkpoint that does not fit its parts.
    """
    model = load_named(config, llm_weights, ears or resolve_ears(config, is_kept=False))
    model.set_eval_prompts(config.eval.prompts)
    model.llm_bits = config.teacher.quantization
    if llm_weights and model.llm_bits != "none":
        print_status(narrow_teacher_(model))
    return model


def narrow_teacher_(model: Salmonn) -> str:
    """Put a teacher's LLM in the bits that were asked for, in place; one line on what that saves."""
    before = count_bytes(model.llm)
    narrow_llm_(model.llm, model.llm_bits)
    return (
        f"the teacher's LLM is in {model.llm_bits} (teacher.quantization): {count_bytes(model.llm) / 1e9:.3g} GB of "
        f"weights where there were {before / 1e9:.3g}; its targets are another teacher's, and their cache says so"
    )


def load_named(config: Config, llm_weights: bool, ears: str) -> Salmonn:
    """The teacher that `config.teacher` names, see `load_teacher`."""
    path, dtype = teacher_path(config), resolve_precision(config.precision)
    if not path.exists():
        raise FileNotFoundError(
            f"teacher is {path}, but there is nothing; set teacher.path, or make one with `distill teach`."
        )
    kind = KINDS[find_kind(path)]
    return kind.load(config.teacher, path, dtype=dtype, ear_precision=ears, llm_weights=llm_weights)


def describe_wording(config: Config, model: Salmonn) -> str:
    """Whose wordings the teacher is asked in, in words; their hash is elsewhere."""
    if model.config.prompts:
        return "of a prompts file"
    is_released = bool(config.teacher.path) and Path(config.teacher.path).is_file()
    return "the library's, which this teacher was not trained with" if is_released else "the library's"


def teach_online(config: Config, model: Salmonn) -> OnlineTeacher:
    """The teacher as one that computes its targets, with the settings a cache of it would have."""
    cache = config.cache
    return OnlineTeacher(
        model,
        k=cache.k if "k" in find_codec(cache.codec).settings else None,
        temperatures=tuple(cache.temperatures),
        answers=cache.answers,
        max_new_tokens=cache.max_new_tokens,
        num_beams=cache.num_beams,
        hidden_layers=[layer for layer in cache.hidden_layers if layer != HEAD_INPUT],
    )
