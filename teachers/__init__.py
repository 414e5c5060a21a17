"""What the student learns from: SALMONN and its ears, other teachers, online and cached targets."""

from shards.lazy_imports import lazy_exports

_EXPORTS = {
    "CachedTeacher": "teachers.cached",
    "Lora": "teachers.lora",
    "OnlineTeacher": "teachers.online",
    "Salmonn": "teachers.salmonn",
    "Targets": "teachers.targets",
    "Teacher": "teachers.teacher",
    "Vocabulary": "teachers.words.vocabulary",
    "load_qwen2_audio": "teachers.qwen2_audio",
    "load_salmonn": "teachers.files.loading",
}  # name: the module it comes from, imported when it is asked for

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
