"""Making a small student: 4-bit, LoRA, saving and exporting it."""

from shards.lazy_imports import lazy_exports

_EXPORTS = {
    "Connector": "students.hearing",
    "Hearing": "students.hearing",
    "Student": "students.pretrained",
    "build_student": "students.student",
    "give_prefix_": "students.student",
    "load_student": "students.student",
    "save_student": "students.student",
}  # name: the module it comes from, imported when it is asked for

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
