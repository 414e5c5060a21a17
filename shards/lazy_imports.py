"""What is imported when it is asked for: a package's names, so that `import distill` costs no torch, or a library.

A library's seconds are then paid by who uses it, not by who asks for help or names a file that is not there.
"""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType


def lazy_exports(package: str, faces: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        package: its name.
        faces: name -> the module it comes from.
    """

    def find(name: str):
        if name not in faces:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(sorted(faces))}")
        return getattr(importlib.import_module(faces[name]), name)

    return find, lambda: sorted(faces)


def import_named(place: str) -> object:
    """What "module:name" stands for, as a dict of parts names each one."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def late(name: str) -> ModuleType:
    """A library that is imported with the first thing that is asked of it, as in `np = late("numpy")`.

    Annotations that name it need `from __future__ import annotations`.
    """
    library = ModuleType(name)

    def find(attribute: str):
        value = getattr(importlib.import_module(name), attribute)
        setattr(library, attribute, value)  # the next time it is there
        return value

    library.__getattr__ = find
    return library
