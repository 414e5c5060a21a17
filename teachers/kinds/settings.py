"""What a config says of a teacher that brings its own settings: it may repeat them, or say where parts lie now."""

from pathlib import Path

from teachers.salmonn import Salmonn, SalmonnConfig
from teachers.words.templates import CHAT, read_chat

OWN = ("front_end", "end_token", "bos_token", "prompts", "second_kind", "template")  # what a folder says of itself
FROZEN = ("llm", "whisper", "second")  # parts that lie elsewhere


def check_settings(parts, saved: SalmonnConfig, path: Path) -> None:
    """Refuse what a config says of a teacher whose folder says otherwise: those settings are the folder's.

    Raises:
        ValueError: naming the setting and both values.
    """
    default = type(parts)()
    for name in OWN:
        asked, there = getattr(parts, name), getattr(saved, name)
        if asked not in (getattr(default, name), there, CHAT if name == "template" else there):
            raise ValueError(
                f"teacher.{name} is {asked!r}, but {path} was saved with {there!r} and such a folder's own settings "
                f"hold; leave teacher.{name} out."
            )


def check_chat(parts, model: Salmonn, path: Path) -> None:
    """Refuse to call a saved teacher's form the chat of its LLM where it is another.

    Raises:
        ValueError: naming both.
    """
    if parts.template == CHAT and model.config.template != (chat := read_chat(model.tokenizer)["template"]):
        raise ValueError(
            f"teacher.template is {CHAT!r}, here {chat!r}, but {path} was saved with {model.config.template!r} and "
            f"such a folder's own settings hold; leave teacher.template out."
        )


def moved_parts(parts, saved: dict, path: Path) -> dict[str, str]:
    """Where a config says that a saved teacher's parts lie now, by name; `load_salmonn` proves them by their hashes.

    Raises:
        ValueError: a part is named whose weights are the folder's own, so that no hash could prove it, or that the
            teacher does not have.
    """
    named = {name: getattr(parts, name) for name in FROZEN if getattr(parts, name)}
    places = {name: place for name, place in named.items() if place != getattr(saved["model"], name)}
    for name, place in places.items():
        there = getattr(saved["model"], name)
        if name not in saved["frozen"]:
            raise ValueError(
                f"teacher.{name} is {place!r}, but {path} was saved with {there!r} and holds those weights itself or "
                f"has none; leave teacher.{name} out."
            )
    return places
