"""What made a target cache, as `cache.json`: identity, fingerprint, and the refusal of another. Reads no target."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shards.files.write import create_once
from shards.jsonfile import ShapeError, read_object

HEADER = "cache.json"
FIELDS = {"fingerprint": str, "identity": dict}  # of it
HEAD_INPUT = -1  # number of the layer that enters the head, among those of hidden states
FORMAT = 1  # of the cache's files; part of every fingerprint
# a cache that does not name all of these could be taken for another teacher's
IDENTITY_FIELDS = (
    "teacher_weights",
    "teacher_config",
    "tokenizer",
    "prompts",
    "front_end",
    "dtype",
    "codec",
    "features",
    "answers",
)
# fields that came later: what a cache without them had; None: it does not know, and its records are checked one by one
LATER = {
    "answers.version": 1,
    "ends.own": None,
    "ends.stops": None,
    "features.ears_seconds": "30",
    "teacher_config.ears_seconds": "30",
    "teacher_config.ears_quantization": "none",
    "teacher_config.ears_lora_rank": 0,
    "teacher_config.prefix_tokens": 0,
    "teacher_config.whisper_layers": 0,
}


@dataclass(frozen=True)
class CacheHeader:
    """What made a cache.

    Attributes:
        identity: JSON values by name, at least IDENTITY_FIELDS: hashes of weights, tokenizer, prompts and so on.
    """

    identity: dict

    def __post_init__(self):
        missing = [name for name in IDENTITY_FIELDS if name not in self.identity]
        if missing:
            raise ValueError(f"identity is without {', '.join(missing)}, but a cache must name them all; add them.")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of the identity and the file format."""
        text = json.dumps([FORMAT, self.identity], sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def section(self, name: str) -> dict:
        """A part of the identity; where it lacks a later field, with what a cache then had."""
        later = {field.removeprefix(f"{name}."): had for field, had in LATER.items() if field.startswith(f"{name}.")}
        return {field: had for field, had in later.items() if had is not None} | self.identity[name]

    def check(self, expected: "CacheHeader", path: Path) -> None:
        """Refuse a cache that something else made.

        Raises:
            ValueError: naming every field that differs, with both values.
        """
        if self.fingerprint == expected.fingerprint:
            return
        # through JSON, as the fingerprint: a tuple is a list there
        stored, asked = (json.loads(json.dumps(header.identity)) for header in (self, expected))
        stored, asked = _flatten(add_later_fields(stored, asked)), _flatten(add_later_fields(asked, stored))
        names = [name for name in sorted(stored | asked) if stored.get(name) != asked.get(name)]
        if not names:
            return
        changes = "".join(f"\n  {name}: cached {_show(stored, name)}, this run {_show(asked, name)}" for name in names)
        raise ValueError(
            f"{path} was cached as {self.fingerprint[:16]}, but this run's teacher is {expected.fingerprint[:16]}; run "
            f"`distill cache` again or point cache.folder at a cache of this teacher. What differs:{changes}"
        )


def read_header(folder: Path) -> CacheHeader:
    """The header of the cache in a folder.

    Raises:
        ValueError: there is none, or it was edited.
    """
    path = Path(folder) / HEADER
    try:
        stored = read_object(path, FIELDS)
        header, fingerprint = CacheHeader(stored["identity"]), stored["fingerprint"]
    except FileNotFoundError as error:
        if not path.parent.parent.is_dir():
            raise ValueError(
                f"{folder} is to hold the cache, but {path.parent.parent} is not there; correct data.folder or "
                f"cache.folder."
            ) from error
        raise ValueError(f"{folder} holds no {HEADER}, but a cache has one; run `distill cache` first.") from error
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read (it {error}), but must be whole; restore it, or run `distill cache` again."
        ) from error
    if header.fingerprint != fingerprint:
        raise ValueError(
            f"{path} says {fingerprint[:16]}, but its fields hash to {header.fingerprint[:16]}; restore it."
        )
    return header


def write_header(folder: Path, header: CacheHeader) -> CacheHeader:
    """Leave the header in a folder, or find there that it is the same; returns the one that is there.

    Raises:
        ValueError: the folder holds a cache of something else; the message names what differs.
    """
    path = Path(folder) / HEADER
    try:
        read_object(path, FIELDS)
    except FileNotFoundError:
        _create(path, header)
    except ShapeError:  # damaged: what its shards are of, their done records say
        path.unlink(missing_ok=True)
        _create(path, header)
    stored = read_header(folder)
    stored.check(header, path)
    return stored


def add_later_fields(identity: Mapping, other: Mapping) -> dict:
    """An identity with those fields of LATER that only the other has, as they were then; one not known then agrees."""
    filled = dict(identity)
    for field, had in LATER.items():
        section, name = field.split(".")
        theirs, own = other.get(section) or {}, filled.get(section) or {}
        if name in theirs and name not in own:
            filled[section] = own | {name: theirs[name] if None in (had, theirs[name]) else had}
    return filled


def _create(path: Path, header: CacheHeader) -> None:
    create_once(path, json.dumps({"fingerprint": header.fingerprint, "identity": header.identity}, indent=1) + "\n")


def _flatten(value: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested dicts as dotted names."""
    flat = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            flat |= _flatten(inner, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = inner
    return flat


def _show(values: dict[str, object], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "nothing"
