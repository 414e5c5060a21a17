"""What a cache is known by: everything that its targets depend on. Two caches of one fingerprint hold the same."""

from dataclasses import asdict

from distill.caching.capture import frames_seconds
from distill.config import Config
from distill.teacher import describe_wording, resolve_ears
from distill.training.ranks import resolve_precision
from shards.targets.codecs.table import describe_codec, find_codec
from shards.targets.header import CacheHeader
from teachers.files.cacheparts import hash_head, hash_prompts, head_tensor
from teachers.files.loading import hash_frozen_parts, hash_tensors, own_tensors
from teachers.logits import logit_transform
from teachers.salmonn import Salmonn
from teachers.targets import Vocabulary

EARS = ("whisper.", "second.")  # whose tensors are hashed in the run's precision, whatever they are loaded in


def describe_teacher(teacher: Salmonn, config: Config, *, is_kept: bool = True) -> CacheHeader:
    """Everything the targets depend on; its hash is the cache's fingerprint.

    Args:
        teacher: the model.
        config: of the run.
        is_kept: whether the targets go to a disk, as `resolve_ears` takes it.
    """
    settings, cache, dtype = asdict(teacher.config), config.cache, resolve_precision(config.precision)
    own = {name: x.to(dtype) if name.startswith(EARS) else x for name, x in own_tensors(teacher).items()}
    for name in ("llm", "whisper", "second", "prompts", "eval_prompts"):  # places; hashes of their contents are below
        settings.pop(name)
    codec = find_codec(cache.codec).of(cache)
    head = {}
    if codec.needs_head:
        head = {"head": hash_head(head_tensor(teacher)), **logit_transform(teacher.llm.config.get_text_config())}
    return CacheHeader(
        {
            "teacher_weights": {"own": hash_tensors(own), **hash_frozen_parts(teacher)},
            "teacher_config": settings,
            "llm_width": teacher.project.out_features,
            "tokenizer": asdict(Vocabulary.of(teacher.tokenizer)) | {"name": "cached"},
            "prompts": hash_prompts(teacher.rows.prompts),
            "wording": describe_wording(config, teacher),
            "front_end": "teachers.frontend 2",  # 2: clips under 1 s are heard with silence up to it
            "dtype": str(dtype),
            "ears": resolve_ears(config, is_kept=is_kept),
            "codec": describe_codec(codec) | head,
            "features": {
                "queries": cache.features,
                "hidden_layers": list(cache.hidden_layers),
                "frames": cache.frames,
                "windows": config.student.windows if cache.frames != "none" else None,
                "ears_seconds": frames_seconds(config, teacher) if cache.frames != "none" else None,
            },
            "answers": {
                "of": cache.answers,
                "labelled_share": config.data.labelled_share,
                "max_new_tokens": cache.max_new_tokens,
                "num_beams": cache.num_beams,
                "transcripts": cache.transcripts,
            },
        }
    )
