"""The objective, the Distiller, the stages, metrics, config, command line and report."""

import sys
from pathlib import Path

# `accelerate launch distill/run.py` puts this folder first on the path, where its rooms would shadow packages
sys.path[:] = [place for place in sys.path if place != str(Path(__file__).parent)]

from shards.lazy_imports import lazy_exports  # noqa: E402

_EXPORTS = {
    "Callback": "distill.training.monitoring.callbacks",
    "CacheConfig": "distill.config",
    "Config": "distill.config",
    "Distiller": "distill.distiller",
    "EvalConfig": "distill.config",
    "FitResult": "distill.distiller",
    "LossConfig": "distill.config",
    "OnPolicyConfig": "distill.config",
    "Own": "distill.distiller",
    "OwnTerm": "distill.objective.terms.term",
    "Run": "distill.distiller",
    "StudentConfig": "distill.config",
    "TeacherConfig": "distill.config",
    "TrainConfig": "distill.config",
    "load_config": "distill.config",
}  # name: the module it comes from, imported when it is asked for

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
