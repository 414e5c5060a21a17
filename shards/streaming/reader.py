"""One sample from its shard: `pread` by the catalog's offsets, crc32, JSON fields, audio. Runs in the workers.

What is wrong with one sample comes back as a `BadSample`; what is wrong with a shard raises. Nothing is replaced.
"""

import io
import json
import os
import weakref
import zlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import soundfile

from shards.audio.augment import augment_sample, sample_seed
from shards.audio.augmentation import Augmentation
from shards.audio.decode import AudioError, decode_audio, hash_waveform
from shards.sample import SAMPLE_RATE, Sample
from shards.streaming.catalog import Catalog
from shards.targets.record import TargetRecord
from shards.tars.archive import ShardError
from shards.tars.localcopy import ShardCache

MAX_OPEN = 64  # shards a process keeps open
_FIELDS = {
    "text": (str, type(None)),
    "task": str,
    "Q": (str, type(None)),
    "source": str,
    "duration": (int, float),
    "sha256": str,
}


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out: a line of bad_samples.jsonl."""

    key: str
    shard: str
    epoch: int
    reason: str  # checksum, json, changed, or a reason of AudioError
    message: str


class Reader:
    """Reads samples of a catalog by row; each process has its own open files."""

    def __init__(
        self, catalog: Catalog, cache: ShardCache, augmentation: Augmentation | None, seed: int, max_seconds: float,
        decode: bool = True, student_share: float = 0.0,
    ):  # fmt: skip
        self.catalog, self.cache, self.decode, self.student_share = catalog, cache, decode, student_share
        self.augmentation, self.seed, self.max_seconds = augmentation, seed, max_seconds
        self._files: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._files)  # a run opens a stream for every validation

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Sample | BadSample] | Exception:
        """The samples at rows of (epoch, row); a shard's or the disk's error comes back as a value.

        A worker's exception would reach the user as a traceback in a string.
        """
        try:
            return [self.read(row, epoch) for epoch, row in places]
        except (ShardError, OSError) as error:
            return error

    def read(self, row: int, epoch: int) -> Sample | BadSample:
        """One sample, or why there is none.

        Raises:
            ShardError: its shard is missing or has another size than when it was indexed.
        """
        catalog = self.catalog
        shard, key = catalog.shards[row], catalog.key(row)
        name = catalog.names[shard]
        try:
            fields = _parse_fields(self._read_member(name, row, "json"), f"{name}: {key}")
            waveform_N = self._read_audio(name, row, fields)
            targets = self._read_record(catalog.target_names[shard], row, "targets") if catalog.target_names else None
            is_answered = self._is_answered(row, epoch)
            answer = self._read_record(catalog.answer_names[shard], row, "answers") if is_answered else None
        except AudioError as error:
            return BadSample(key, name, epoch, error.reason, str(error))
        sample = Sample(
            key=key,
            waveform_N=waveform_N,
            text=fields["text"],
            task=fields["task"],
            question=fields["Q"],
            source=fields["source"],
            sha256=fields["sha256"],
            epoch=epoch,
            targets=targets,
            student_answer=answer,
        )
        if self.augmentation is None:
            return sample
        return augment_sample(sample, self.augmentation, seed=self.seed, max_seconds=self.max_seconds)

    def read_fields(self, row: int) -> dict | None:
        """What the JSON of a sample says, without its audio; None where `read` gives a `BadSample` for it.

        Raises:
            ShardError: as `read`.
        """
        name = self.catalog.names[self.catalog.shards[row]]
        try:
            return _parse_fields(self._read_member(name, row, "json"), f"{name}: {self.catalog.key(row)}")
        except AudioError:
            return None

    def _is_answered(self, row: int, epoch: int) -> bool:
        """Whether a sample comes with the student's answer: a draw from (seed, epoch, key) where there is one."""
        if not self.catalog.answer_names or self.catalog.members["answers"][row, 0] < 0:
            return False
        # no key holds a dot, so this is the draw of nothing else
        return sample_seed(self.seed, epoch, f"{self.catalog.key(row)}.answer") < self.student_share * 2**128

    def _read_audio(self, name: str, row: int, fields: dict) -> np.ndarray:
        key, data = self.catalog.key(row), self._read_member(name, row, "audio")
        if self.decode:
            waveform_N = decode_audio(data, name=f"{name}: {key}")
        else:
            waveform_N = np.zeros(soundfile.info(io.BytesIO(data)).frames, np.float32)
        _check_length(waveform_N, fields["duration"], f"{name}: {key}")
        if not self.decode:
            return waveform_N
        if not self.catalog.attested[self.catalog.shards[row]] and hash_waveform(waveform_N) != fields["sha256"]:
            raise AudioError("changed", f"{name}: {key} decodes to other audio than was packed; pack it again.")
        return waveform_N

    def _read_record(self, name: str, row: int, kind: str) -> TargetRecord:
        """Targets, unpacked here, where no step waits for it, but for what would make them larger to carry."""
        data = self._read_member(name, row, kind)
        try:
            return TargetRecord.unpack(data, as_stored=True)
        except ValueError as error:
            raise ShardError(f"{name}: {self.catalog.key(row)}: {error}") from error

    def _read_member(self, name: str, row: int, kind: str) -> bytes:
        offset, size, crc32 = self.catalog.members[kind][row].tolist()
        key = self.catalog.key(row)
        data = os.pread(self._open(name), size, offset)
        if len(data) < size:
            raise AudioError(
                "truncated", f"{name}: {key} has {len(data)} of {size} bytes of {kind}; copy the shard again."
            )
        if zlib.crc32(data) != crc32:
            raise AudioError("checksum", f"{name}: the {kind} of {key} is not what was indexed; copy the shard again.")
        return data

    def _open(self, name: str) -> int:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        file = self.cache.open(name)
        size, expected = os.fstat(file).st_size, self.catalog.sizes[name]
        if size != expected:
            os.close(file)
            raise ShardError(
                f"{name} has {size} bytes, but its index says {expected}; copy it again, or delete the index."
            )
        self._files[name] = file
        if len(self._files) > MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return file

    def close(self) -> None:
        """Close the shards."""
        _close_all(self._files)


def _parse_fields(data: bytes, name: str) -> dict:
    """The checked fields of a sample's JSON."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AudioError("json", f"{name} has JSON that cannot be read: {error}; pack it again.") from error
    if not isinstance(fields, dict):
        raise AudioError("json", f"{name} has a {type(fields).__name__} as JSON, but it is an object; pack it again.")
    fields = {"Q": None} | fields
    for field, types in _FIELDS.items():
        if field not in fields or not isinstance(fields[field], types):
            raise AudioError(
                "json", f"{name} has {field} {fields.get(field)!r} in its JSON, which cannot be; pack it again."
            )
    if fields["text"] is not None and not fields["text"].strip():
        raise AudioError("json", f"{name} has an empty text, but an answer says something; drop it.")
    return fields


def _check_length(waveform_N: np.ndarray, seconds: float, name: str) -> None:
    """A decoder may give less than there was without a word; NaN fails too."""
    if not abs(len(waveform_N) - seconds * SAMPLE_RATE) <= 1:
        raise AudioError(
            "truncated",
            f"{name} has {len(waveform_N) / SAMPLE_RATE:.4f} s, but was packed with {seconds}; pack it again.",
        )


def _close_all(files: OrderedDict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])
