"""What loss terms need of a teacher's targets, and what a config, a cache or a batch of targets holds of that.

Reads no file and imports no torch: a config's rules ask it before anything heavy is there.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shards.targets.codecs.codec import Codec
from shards.targets.codecs.table import codec_of, find_codec
from shards.targets.header import HEAD_INPUT


@dataclass(frozen=True)
class Held:
    """What targets hold.

    Attributes:
        codec: that they were written with; None: they were not, or it is not known.
        temperatures: at which their distributions can be had; None: at any.
        has_queries: whether the Q-Former's queries are among them.
        layers: the layers of the LLM whose hidden states are needed.
        has_frames: whether the teacher's encoders' frames are.
    """

    codec: Codec | None
    temperatures: Collection[float] | None
    has_queries: bool
    layers: Collection[int]
    has_frames: bool


def held_by_config(config) -> Held:
    """What the targets hold that a config has made, or computed in every step."""
    cache, is_online = config.cache, config.teacher.online
    codec = find_codec(cache.codec).of(cache)
    return Held(
        codec=None if is_online else codec,
        temperatures=None if codec.keeps_all else cache.temperatures,
        has_queries=True,  # a cache without them may be for another run; a run that needs them says so when it opens it
        layers={*cache.hidden_layers, *([HEAD_INPUT] if is_online or codec.needs_head else [])},
        has_frames=cache.frames != "none" or is_online,
    )


def held_by_cache(identity: Mapping) -> Held:
    """What a cache's targets hold, from its header's identity."""
    codec, features = codec_of(identity), identity["features"]
    return Held(
        codec=codec,
        temperatures=None if codec.keeps_all else identity["codec"].get("temperatures", [1.0]),
        has_queries=features["queries"] != "none",
        layers={*features["hidden_layers"], *([HEAD_INPUT] if codec.needs_head else [])},
        has_frames=features["frames"] != "none",
    )


def held_by_targets(targets) -> Held:
    """What the targets of a batch hold."""
    distribution, is_head_input_there = targets.distribution, targets.hidden is not None
    return Held(
        codec=None,
        temperatures=None if distribution is None or distribution.is_complete else distribution.log_partition_S,
        has_queries=targets.queries_BWQE is not None,
        layers={*targets.hidden_by_layer, *([HEAD_INPUT] if is_head_input_there else [])},
        has_frames=targets.frames is not None,
    )


def lacks_temperature(loss, held: Held) -> str | None:
    """Why distributions cannot be had at the temperature of the loss; None: they can."""
    if held.temperatures is None or loss.temperature in held.temperatures:
        return None
    return (
        f"loss.temperature is {loss.temperature:g}, but the teacher's targets are kept at "
        f"{', '.join(f'{t:g}' for t in held.temperatures)} alone; use one of those, or cache again with it among "
        f"cache.temperatures."
    )


def check_needs(terms: Mapping, loss, held: Held) -> None:
    """Refuse terms that targets cannot serve.

    Args:
        terms: by name.
        loss: the settings.
        held: what the targets hold.

    Raises:
        ValueError: naming what is missing, and what to do.
    """
    for term in terms.values():
        lack = term.lacks(loss, held)
        if lack is not None:
            raise ValueError(lack)


def check_student(terms: Mapping, student) -> None:
    """Refuse terms that nothing of a student could follow.

    Args:
        terms: by name.
        student: as it is trained, a `Salmonn`.

    Raises:
        ValueError: naming what it has not, and what to do.
    """
    for term in terms.values():
        lack = term.lacks_in(student)
        if lack is not None:
            raise ValueError(lack)
