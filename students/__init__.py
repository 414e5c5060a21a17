"""Making a small student: 4-bit, LoRA, saving and exporting it."""

from shards.faces import offer

_FACES = {
    "Student": "students.pretrained",
    "build_student": "students.student",
    "load_student": "students.student",
    "save_student": "students.student",
}  # name: the module it comes from, imported when it is asked for

__all__ = sorted(_FACES)
__getattr__, __dir__ = offer(__name__, _FACES)
