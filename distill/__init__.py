"""The objective, the Distiller, the stages, metrics, config, command line and report."""

import importlib

_FACES = {
    "Callback": "distill.callbacks",
    "CacheConfig": "distill.config",
    "Config": "distill.config",
    "Distiller": "distill.distiller",
    "EvalConfig": "distill.config",
    "FitResult": "distill.distiller",
    "LossConfig": "distill.config",
    "OwnTerm": "distill.terms",
    "StudentConfig": "distill.config",
    "TeacherConfig": "distill.config",
    "TrainConfig": "distill.config",
    "load_config": "distill.config",
}  # name: the module it comes from, imported when it is asked for

__all__ = sorted(_FACES)


def __getattr__(name: str):
    if name not in _FACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_FACES[name]), name)


def __dir__() -> list[str]:
    return __all__
