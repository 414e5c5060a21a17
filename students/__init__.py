"""Making a small student: 4-bit, LoRA, saving and exporting it."""

import importlib

_FACES = {
    "Student": "students.pretrained",
    "build_student": "students.student",
    "load_student": "students.student",
    "save_student": "students.student",
}  # name: the module it comes from, imported when it is asked for

__all__ = sorted(_FACES)


def __getattr__(name: str):
    if name not in _FACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_FACES[name]), name)


def __dir__() -> list[str]:
    return __all__
