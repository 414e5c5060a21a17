"""What the teacher said about one sample, as the bytes of `KEY.targets.safetensors`. Knows no tar and no teacher.

S supervised positions of the sample, W windows, Q queries a window, E query width, D LLM width.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

ANSWER_SOURCES = ("label", "teacher", "student")
FEATURE_DTYPES = ("int8", "float16")
_DTYPES = {"U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}
_DTYPE_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
_INT8, _SCALE, _FLOAT16 = ".int8", ".scale", ".float16"
_FEATURE, _OTHER = "feature.", "other"


def pack_record(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content only.

    The safetensors library writes metadata in the order of a hash map, which differs from process to process; here
    names are sorted, so that a repeated job ends in the same bytes.
    """
    layout, pieces, offset = {"__metadata__": dict(sorted(metadata.items()))}, [], 0
    # widest first, as the library does, keeps every tensor aligned
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        array = np.ascontiguousarray(tensors[name])
        end = offset + array.nbytes
        layout[name] = {"dtype": _DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        pieces.append(array.tobytes())
        offset = end
    header = json.dumps(layout, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *pieces])


def unpack_record(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors, views into one copy of `data`, and metadata of a safetensors file.

    Raises:
        ValueError: the bytes are not a whole safetensors file.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        layout, own = json.loads(data[8:start]), memoryview(bytearray(data))  # which may be written to, as torch asks
        metadata = layout.pop("__metadata__", {})
        tensors, end = {}, 0
        for name, entry in layout.items():
            first, last = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            tensors[name] = np.frombuffer(own[start + first : start + last], dtype).reshape(entry["shape"])
            end = max(end, last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"record of {len(data)} bytes is not a safetensors file; cache this sample again.") from error
    if start + end != len(data):
        raise ValueError(
            f"record is {len(data)} bytes, but its header describes {start + end}; cache this sample again."
        )
    return tensors, metadata


def pack_features(name: str, values: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Tensors that hold a feature: float16, or int8 with a float32 scale for each row of the last dimension.

    int8 is off by at most half a step, `max|row| / 254`; float16 by 2**-11 of each value.

    Raises:
        ValueError: the feature is not finite, or `dtype` is neither of the two.
    """
    if dtype not in FEATURE_DTYPES:
        raise ValueError(f"dtype of {name} is {dtype!r}, but must be one of {', '.join(FEATURE_DTYPES)}; choose one.")
    if not np.isfinite(values).all():
        raise ValueError(f"feature {name} is not finite, but targets must be; check the teacher's dtype and weights.")
    if dtype == "float16":
        return {name + _FLOAT16: np.clip(values, -65504, 65504).astype(np.float16)}
    quantized, scale = quantize_rows(values)
    return {name + _INT8: quantized, name + _SCALE: scale}


class Stored(NamedTuple):
    """A feature as a record holds it, a quarter or half of its float32: for who has to carry it before it is used."""

    values: np.ndarray  # int8 or float16
    scale: np.ndarray | None = None  # float32, what each row of int8 is multiplied by

    def to_float32(self) -> np.ndarray:
        """The feature."""
        return self.values.astype(np.float32) if self.scale is None else dequantize_rows(self.values, self.scale)


def find_features(tensors: Mapping[str, np.ndarray]) -> dict[str, Stored]:
    """Every feature among a record's tensors, by name."""
    features = {}
    for key, values in tensors.items():
        if key.endswith(_FLOAT16):
            features[key.removesuffix(_FLOAT16)] = Stored(values)
        elif key.endswith(_INT8):
            name = key.removesuffix(_INT8)
            features[name] = Stored(values, tensors[name + _SCALE])
    return features


def quantize_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 of each row of the last dimension, and the float32 steps (`max|row| / 127`) to multiply the rows by."""
    values = values.astype(np.float32, copy=False)
    scale = np.abs(values).max(-1, initial=0) / np.float32(127)
    steps = np.where(scale > 0, scale, 1)[..., None]
    return np.rint(values / steps).astype(np.int8), scale


def dequantize_rows(quantized: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 rows of `quantize_rows`'s result."""
    return quantized.astype(np.float32) * scale[..., None]


def identify_sample(audio_sha256: str, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """What a target belongs to: three hashes, of the audio, the prompt and the answer, 128 bits each, joined by colons.

    Args:
        audio_sha256: the hash of the decoded samples, before augmentation (`Sample.sha256`).
        prompt_ids: token ids of the whole prompt, without the audio.
        answer_ids: token ids of the answer with its end token.
    """
    parts = [audio_sha256.encode(), np.asarray(prompt_ids, "<i8").tobytes(), np.asarray(answer_ids, "<i8").tobytes()]
    return ":".join(hashlib.sha256(part).hexdigest()[:32] for part in parts)


@dataclass(frozen=True)
class TargetRecord:
    """The targets of one sample.

    Attributes:
        payload: the distribution at S positions, of a codec (`shards.targets.codecs.table.decode` reads it).
        answer_ids_S: int32, the answer's tokens with the end token: what the positions predict.
        label_logprobs_S: float32, the teacher's natural log-probability of each.
        entropy_S: float32 (float16 on disk), nats, of the teacher's distribution at temperature 1.
        byte_ends_S: int32, where each token ends in the answer's UTF-8 bytes; the end token's is the answer's length.
            All are -1 where the tokens do not spell the answer, because the tokenizer normalizes it.
        answer: the text.
        answer_source: "label", "teacher" or "student": whose answer it is.
        identity: `identify_sample` of what the teacher was given.
        features: float32 by name, such as `queries_WQE` or `hidden_16_SD`; in a record of the stream `Stored` ones.
        notes: further text, such as the teacher's own transcript and its WER.
        other: targets of the teacher's own answer where both are kept; without what does not depend on the answer.
    """

    payload: bytes
    answer_ids_S: np.ndarray
    label_logprobs_S: np.ndarray
    entropy_S: np.ndarray
    byte_ends_S: np.ndarray
    answer: str
    answer_source: str
    identity: str
    features: dict[str, np.ndarray | Stored] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    other: "TargetRecord | None" = None

    @classmethod
    def of_features(cls, identity: str, features: dict[str, np.ndarray]) -> "TargetRecord":
        """A record of what was heard, without an answer: no position has a target."""
        nothing_S = np.zeros(0, np.float32)
        ids_S = nothing_S.astype(np.int32)
        return cls(b"", ids_S, nothing_S, nothing_S, ids_S, "", "label", identity, features)

    @property
    def teacher_ce(self) -> float:
        """The teacher's mean cross-entropy on the answer, nats a token."""
        return -float(self.label_logprobs_S.mean(dtype=np.float64))

    def pack(self, feature_dtype: str | Mapping[str, str] = "int8") -> bytes:
        """The record's bytes.

        Args:
            feature_dtype: how features are stored, one of FEATURE_DTYPES for all of them, or one by name.

        Raises:
            ValueError: the per-position fields differ in length, or a feature is not finite.
        """
        if self.answer_source not in ANSWER_SOURCES:
            raise ValueError(
                f"answer_source is {self.answer_source!r}, but must be one of {', '.join(ANSWER_SOURCES)}; choose one."
            )
        tensors = {
            "payload": np.frombuffer(self.payload, np.uint8),
            "answer_ids_S": np.asarray(self.answer_ids_S, np.int32),
            "label_logprobs_S": np.asarray(self.label_logprobs_S, np.float32),
            "entropy_S": np.asarray(self.entropy_S, np.float16),
            "byte_ends_S": np.asarray(self.byte_ends_S, np.int32),
        }
        lengths = {name: len(array) for name, array in tensors.items() if name.endswith("_S")}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"lengths are {lengths}, but every position has one of each; check the caller's alignment."
            )
        for name, values in self.features.items():
            dtype = feature_dtype if isinstance(feature_dtype, str) else feature_dtype[name]
            tensors |= pack_features(_FEATURE + name, values, dtype)
        if self.other is not None:
            tensors[_OTHER] = np.frombuffer(self.other.pack(feature_dtype), np.uint8)
        own = {"answer": self.answer, "answer_source": self.answer_source, "identity": self.identity}
        return pack_record(tensors, own | {f"note.{name}": text for name, text in self.notes.items()})

    @classmethod
    def unpack(cls, data: bytes, *, as_stored: bool = False) -> "TargetRecord":
        """Read `pack`'s bytes; `as_stored` leaves features as they are, to be carried and multiplied out elsewhere.

        Raises:
            ValueError: the bytes are cut, or lack a field.
        """
        tensors, metadata = unpack_record(data)
        features = {name.removeprefix(_FEATURE): stored for name, stored in find_features(tensors).items()}
        if not as_stored:
            features = {name: stored.to_float32() for name, stored in features.items()}
        try:
            return cls(
                payload=tensors["payload"].tobytes(),
                answer_ids_S=tensors["answer_ids_S"],
                label_logprobs_S=tensors["label_logprobs_S"],
                entropy_S=tensors["entropy_S"].astype(np.float32),
                byte_ends_S=tensors["byte_ends_S"],
                answer=metadata["answer"],
                answer_source=metadata["answer_source"],
                identity=metadata["identity"],
                features=features,
                notes={name.removeprefix("note."): text for name, text in metadata.items() if name.startswith("note.")},
                other=cls.unpack(tensors[_OTHER].tobytes(), as_stored=as_stored) if _OTHER in tensors else None,
            )
        except KeyError as error:
            raise ValueError(
                f"record has no field {error}, but every target has one; cache this sample again."
            ) from error

    def check(self, identity: str, name: str) -> None:
        """Refuse these targets for a sample that is not the one the teacher was given.

        Args:
            identity: `identify_sample` of the sample at hand.
            name: shard and key, for the message.

        Raises:
            ValueError: audio, prompt or answer differ; both values are named.
        """
        if identity == self.identity:
            return
        stored, given = self.identity.split(":"), identity.split(":")
        changed = [part for part, old, new in zip(("audio", "prompt", "answer"), stored, given) if old != new]
        raise ValueError(
            f"{name} was cached as {self.identity} (answer {self.answer!r}), but this sample is {identity}: another "
            f"{' and '.join(changed)}; cache this sample again."
        )
