"""The codecs there are, and reading a payload of any of them. A new codec is one file and one line here.

Imports a codec when it is asked for, and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from shards.lazy_imports import import_named
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.payload import read_header

if TYPE_CHECKING:
    from shards.targets.distributions import Distribution, HiddenStates

CODECS = {  # by name: "module:class"
    "topk": "shards.targets.codecs.topk:TopK",
    "adaptive": "shards.targets.codecs.adaptive:Adaptive",
    "sampled": "shards.targets.codecs.sampled:Sampled",
    "hidden": "shards.targets.codecs.hidden:Hidden",
    "dense": "shards.targets.codecs.dense:Dense",
}


def find_codec(name: str) -> type[Codec]:
    """The class of a codec.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CODECS:
        raise ValueError(f"codec is {name!r}, but this program knows {', '.join(CODECS)}; cache this sample again.")
    return import_named(CODECS[name])


def describe_codec(codec: Codec) -> dict:
    """Name, version and parameters: the codec's part of a cache's identity."""
    return {"name": codec.name, "version": codec.version, **asdict(codec)}


def codec_of(identity: Mapping) -> Codec:
    """The codec that a cache's identity describes.

    Raises:
        ValueError: this program knows none of that name.
    """
    described = identity["codec"]
    kind = find_codec(described["name"])
    values = {field.name: described[field.name] for field in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def decode(*payloads: bytes) -> Distribution | HiddenStates:
    """Read payloads of any codec, one after the other's positions, into CPU tensors.

    Raises:
        ValueError: a payload is not one, is of an unknown codec or version, or is cut.
    """
    from shards.targets.codecs.bitpack import Reader  # which needs numpy

    headers = [read_header(payload) for payload in payloads]
    first = headers[0]
    kind = find_codec(first.name)
    if any(header.layout != first.layout for header in headers):
        decoded = [decode(payload) for payload in payloads]
        return type(decoded[0]).concatenate(decoded)
    if first.version != kind.version:
        raise ValueError(
            f"payload version of {first.name} is {first.version}, but this program reads {kind.version}; cache this "
            f"sample again."
        )
    reader = Reader(payloads, [header.size for header in headers])
    decoded = kind.read(reader, [header.num_positions for header in headers], first.vocab_size, first.parameters)
    reader.finish()
    return decoded
