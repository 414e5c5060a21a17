"""The objective, the Distiller, the stages, metrics, config, command line and report."""

from shards.faces import offer

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
__getattr__, __dir__ = offer(__name__, _FACES)
