"""The teacher a config names, loaded: a saved folder, the demo's own, a released SALMONN or Qwen2-Audio."""

import time
from pathlib import Path

import torch

from distill.config import Config, TeacherConfig
from distill.training.ranks import resolve_precision
from shards.sample import SAMPLE_RATE
from shards.telling import tell
from teachers.ears.hearing import WEIGHTS
from teachers.files.checkpoint import load_checkpoint
from teachers.files.loading import load_salmonn, read_config
from teachers.qwen2_audio import describe_qwen2_audio, is_qwen2_audio, load_qwen2_audio
from teachers.salmonn import Salmonn, SalmonnConfig, describe_end
from teachers.targets import HEAD_INPUT, OnlineTeacher


def teacher_path(config: Config) -> Path:
    """Where the teacher lies: `teacher.path`, or what `distill/teach.py` made.

    Raises:
        ValueError: the config names no teacher.
    """
    if config.teacher.path:
        return Path(config.teacher.path)
    if config.scratch.steps:
        return config.run_folder / "scratch" / "teacher"
    raise ValueError("teacher.path is empty, but a teacher is needed; give a saved folder or a SALMONN checkpoint.")


def precision_name(config: Config) -> str:
    """The run's precision as `teacher.ears` names it."""
    return {torch.bfloat16: "bf16", torch.float32: "float32"}[resolve_precision(config.precision)]


def resolve_ears(config: Config, *, is_kept: bool) -> str:
    """How the teacher's ears hear, one of `teachers.ears.hearing.WEIGHTS`; the one place that says so.

    Args:
        config: of the run.
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
        tell("teacher.ears is fp16, but without a GPU there is no fp16 autocast that pays; its ears hear in float32")
    model = load_teacher(config, ears=ears).to(device)
    if ears != own:
        tell(describe_cost(model, ears, own))
    return teach_online(config, model)


def describe_cost(model: Salmonn, ears: str, own: str) -> str:
    """One line on what ears of another precision than the run's cost: bytes of weights, and the time of a clip."""
    parts = [ear for ear in (model.whisper, model.second) if ear is not None]
    gigabytes = sum(p.numel() * p.element_size() for ear in parts for p in ear.parameters()) / 1e9
    factor = WEIGHTS[ears].itemsize / WEIGHTS[own].itemsize
    seconds = time_ears(model)
    try:
        for ear in parts:
            ear.precision = own
        with torch.autocast(model.device.type, WEIGHTS[own], enabled=own != "float32"):
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
        config: of the run.
        llm_weights: False leaves the LLM on the meta device: of a teacher whose targets are cached, ears, connector and
            names are all that a run needs. A Qwen2-Audio comes whole.
        ears: how they hear, see `teachers.ears.hearing`; empty: as for a teacher whose targets are not kept.

    Raises:
        FileNotFoundError: there is nothing at its path.
        ValueError: a checkpoint that does not fit its parts.
    """
    model = load_named(config, llm_weights, ears or resolve_ears(config, is_kept=False))
    model.ask_with(config.eval.prompts)
    return model


def load_named(config: Config, llm_weights: bool, ears: str) -> Salmonn:
    """The teacher that `config.teacher` names, see `load_teacher`."""
    path, dtype = teacher_path(config), resolve_precision(config.precision)
    if not path.exists():
        raise FileNotFoundError(
            f"teacher is {path}, but there is nothing; set teacher.path, or make the demo's with distill/teach.py."
        )
    parts = config.teacher
    if path.is_dir() and is_qwen2_audio(path):
        own = describe_qwen2_audio(path, parts.prompts)
        check_settings(parts, own, path)
        moved_parts(parts, {"model": own, "frozen": {}}, path)
        model = load_qwen2_audio(path, prompts=parts.prompts, dtype=dtype, ears=ears)
        tell(f"teacher {path}: {describe_end(model, 'its chat')}")
        return model
    if path.is_dir():
        saved = read_config(path)
        check_settings(parts, saved["model"], path)
        places = moved_parts(parts, saved, path)
        model = load_salmonn(path, dtype=dtype, hearing=ears, llm_weights=llm_weights, places=places)
        tell(f"teacher {path}: {describe_end(model, 'its config.json')}")
        return model
    return load_released(parts, path, dtype=dtype, hearing=ears, llm_weights=llm_weights)


def load_released(parts: TeacherConfig, path: Path, **how) -> Salmonn:
    """A released checkpoint with the parts that a config names; `how` as `load_checkpoint` takes it."""
    for name in ("llm", "whisper"):
        if not getattr(parts, name):
            raise ValueError(
                f"teacher.{name} is empty, but {path} is a checkpoint without its frozen parts; name the one that it "
                f"was trained on, a folder or a hub id."
            )
    settings = {"prompts": parts.prompts, "front_end": parts.front_end}
    settings |= {name: getattr(parts, name) for name in ("end_token", "bos_token") if getattr(parts, name)}
    model, report = load_checkpoint(
        path,
        llm=parts.llm,
        whisper=parts.whisper,
        second=parts.second,
        second_kind=parts.second_kind,
        **how,
        **settings,
    )
    tell(f"teacher {path}: {report}")
    if not parts.prompts:
        tell(
            f"teacher {path}: asked in the library's wordings, but trained with others; give teacher.prompts those, "
            f"prompts/train_prompt.json of its repository (and eval.prompts the test_prompt.json beside it)"
        )
    return model


def describe_wording(config: Config, model: Salmonn) -> str:
    """Whose wordings the teacher is asked in, in words; their hash is elsewhere."""
    if model.config.prompts:
        return "of a prompts file"
    is_released = bool(config.teacher.path) and Path(config.teacher.path).is_file()
    return "the library's, which this teacher was not trained with" if is_released else "the library's"


def check_settings(parts: TeacherConfig, saved: SalmonnConfig, path: Path) -> None:
    """Refuse what a config says of a teacher whose folder says otherwise: those settings are the folder's.

    Raises:
        ValueError: naming the setting and both values.
    """
    default = TeacherConfig()
    for name in ("front_end", "end_token", "bos_token", "prompts", "second_kind"):
        asked, there = getattr(parts, name), getattr(saved, name)
        if asked not in (getattr(default, name), there):
            raise ValueError(
                f"teacher.{name} is {asked!r}, but {path} was saved with {there!r} and such a folder's own settings "
                f"hold; leave teacher.{name} out."
            )


def moved_parts(parts: TeacherConfig, saved: dict, path: Path) -> dict[str, str]:
    """Where a config says that a saved teacher's parts lie now, by name; `load_salmonn` proves them by their hashes.

    Raises:
        ValueError: a part is named whose weights are the folder's own, so that no hash could prove it, or that the
            teacher does not have.
    """
    named = {name: getattr(parts, name) for name in ("llm", "whisper", "second") if getattr(parts, name)}
    places = {name: place for name, place in named.items() if place != getattr(saved["model"], name)}
    for name, place in places.items():
        there = getattr(saved["model"], name)
        if name not in saved["frozen"]:
            raise ValueError(
                f"teacher.{name} is {place!r}, but {path} was saved with {there!r} and holds those weights itself or "
                f"has none; leave teacher.{name} out."
            )
    return places


def teach_online(config: Config, model: Salmonn) -> OnlineTeacher:
    """The teacher as one that computes its targets, with the settings a cache of it would have."""
    cache = config.cache
    return OnlineTeacher(
        model,
        k=None if cache.codec in ("hidden", "dense") else cache.k,
        temperatures=tuple(cache.temperatures),
        answers=cache.answers,
        max_new_tokens=cache.max_new_tokens,
        num_beams=cache.num_beams,
        hidden_layers=[layer for layer in cache.hidden_layers if layer != HEAD_INPUT],
    )
