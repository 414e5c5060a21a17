"""What a run is told: fields, where they are read from, and the rules they keep. Knows no model."""

from distill.config.fields import (
    SPLITS,
    CacheConfig,
    Config,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    OnPolicyConfig,
    ScratchConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    fingerprint,
    list_fields,
    load_config,
    to_yaml,
)

__all__ = [
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
    "TeacherConfig",
    "TrainConfig",
    "fingerprint",
    "list_fields",
    "load_config",
    "to_yaml",
]
