"""A teacher in a folder that this library saved: `config.json` says what it is made of."""

from pathlib import Path

from shards.status import print_status
from teachers.files.loading import load_salmonn, lora_settings, read_config
from teachers.kinds.settings import check_chat, check_settings, moved_parts
from teachers.lora import Lora
from teachers.salmonn import Salmonn, SalmonnConfig, describe_end

build_empty = None


def recognizes(path: Path) -> bool:
    """Any folder: one that is not ours is refused by what it lacks."""
    return path.is_dir()


def load(parts, path: Path, **how) -> Salmonn:
    """The model, its parts where the config says that they lie now."""
    saved = read_config(path)
    check_settings(parts, saved["model"], path)
    model = load_salmonn(path, places=moved_parts(parts, saved, path), **how)
    check_chat(parts, model, path)
    print_status(f"teacher {path}: {describe_end(model, 'its config.json')}")
    return model


def describe(parts, path: Path) -> tuple[SalmonnConfig, Lora | None]:
    """As its `config.json` says."""
    saved = read_config(path)
    return saved["model"], lora_settings(saved)
