"""What the student learns from: SALMONN and its ears, other teachers, online and cached targets."""

import importlib

_FACES = {
    "CachedTeacher": "teachers.targets",
    "Lora": "teachers.lora",
    "OnlineTeacher": "teachers.targets",
    "Salmonn": "teachers.salmonn",
    "Targets": "teachers.targets",
    "Vocabulary": "teachers.targets",
    "load_qwen2_audio": "teachers.qwen2_audio",
    "load_salmonn": "teachers.loading",
}  # name: the module it comes from, imported when it is asked for

__all__ = sorted(_FACES)


def __getattr__(name: str):
    if name not in _FACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_FACES[name]), name)


def __dir__() -> list[str]:
    return __all__
