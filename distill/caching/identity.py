"""What a cache is known by: everything that its targets depend on. Two caches of one fingerprint hold the same."""

from distill.caching.capture import frames_seconds
from distill.config import Config
from distill.teacher import describe_wording, resolve_ears
from distill.training.ranks import resolve_precision
from shards.targets.codecs.table import describe_codec, find_codec
from shards.targets.header import CacheHeader
from teachers.files.cacheparts import hash_head, head_tensor
from teachers.files.identity import describe_model
from teachers.logits import logit_transform
from teachers.salmonn import Salmonn
from teachers.words.generation import ANSWERS


def describe_teacher(teacher: Salmonn, config: Config, *, is_kept: bool = True) -> CacheHeader:
    """Everything the targets depend on; its hash is the cache's fingerprint.

    Args:
        teacher: the model.
        config: the configuration of the run.
        is_kept: whether the targets go to a disk, as `resolve_ears` takes it.
    """
    cache = config.cache
    codec = find_codec(cache.codec).of(cache)
    head = {}
    if codec.needs_head:
        head = {"head": hash_head(head_tensor(teacher)), **logit_transform(teacher.llm.config.get_text_config())}
    return CacheHeader(
        {
            **describe_model(teacher, resolve_precision(config.precision)),
            "wording": describe_wording(config, teacher),
            "ears": resolve_ears(config, is_kept=is_kept),
            "codec": describe_codec(codec) | head,
            "features": {
                "queries": cache.features,
                "hidden_layers": list(cache.hidden_layers),
                "frames": cache.frames,
                **describe_frames(config, teacher),
            },
            "answers": {
                "of": cache.answers,
                "labelled_share": config.data.labelled_share,
                "max_new_tokens": cache.max_new_tokens,
                "num_beams": cache.num_beams,
                "transcripts": cache.transcripts,
                "version": ANSWERS,
            },
        }
    )


def describe_frames(config: Config, teacher: Salmonn) -> dict[str, object]:
    """Which frames are kept and how wide they are; of none there is nothing to say."""
    if config.cache.frames == "none":
        return {"windows": None, "ears_seconds": None}
    return {
        "windows": config.student.windows,
        "ears_seconds": frames_seconds(config, teacher),
        "frames_width": teacher.whisper.width,
    }
