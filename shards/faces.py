"""What a package offers by name, each imported when it is asked for, so that `import distill` costs no torch."""

import importlib
from collections.abc import Callable, Mapping


def offer(package: str, faces: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
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
