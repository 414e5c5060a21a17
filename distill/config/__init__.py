"""What a run is told: fields, where they are read from, and the rules they keep. Knows no model."""

from shards.lazy_imports import lazy_exports

_EXPORTS = dict.fromkeys(
    (
        "SPLITS",
        "CacheConfig",
        "Config",
        "CorpusConfig",
        "DataConfig",
        "EvalConfig",
        "LossConfig",
        "OnPolicyConfig",
        "ScratchConfig",
        "StudentConfig",
        "TeachConfig",
        "TeacherConfig",
        "TrainConfig",
        "fingerprint",
        "list_fields",
        "load_config",
        "to_yaml",
    ),
    "distill.config.fields",
)  # a name's module is imported when it is asked for: help needs none

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
