"""The teacher a config names, loaded: a saved folder, the demo's own, a released SALMONN or Qwen2-Audio."""

from pathlib import Path

from distill.config import Config, TeacherConfig
from distill.ranks import resolve_precision
from shards.telling import tell
from teachers.checkpoint import load_checkpoint
from teachers.loading import load_salmonn, read_config
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


def load_teacher(config: Config, *, llm_weights: bool = True) -> Salmonn:
    """The frozen teacher, in evaluation mode, on the CPU.

    Args:
        config: of the run.
        llm_weights: False leaves the LLM on the meta device: of a teacher whose targets are cached, ears, connector and
            names are all that a run needs. A Qwen2-Audio comes whole.

    Raises:
        FileNotFoundError: there is nothing at its path.
        ValueError: a checkpoint that does not fit its parts.
    """
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
        model = load_qwen2_audio(path, prompts=parts.prompts, dtype=dtype)
        tell(f"teacher {path}: {describe_end(model, 'its chat')}")
        return model
    if path.is_dir():
        saved = read_config(path)
        check_settings(parts, saved["model"], path)
        places = moved_parts(parts, saved, path)
        model = load_salmonn(path, dtype=dtype, llm_weights=llm_weights, places=places)
        tell(f"teacher {path}: {describe_end(model, 'its config.json')}")
        return model
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
        dtype=dtype,
        llm_weights=llm_weights,
        **settings,
    )
    tell(f"teacher {path}: {report}")
    return model


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
