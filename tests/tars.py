"""Tiny shards for tests: real FLAC, real JSON, a few milliseconds a sample to write."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from shards.audio.decode import encode_flac, hash_waveform
from shards.sample import SAMPLE_RATE
from shards.tars.tarwriter import TarWriter

TASKS = ("asr", "audiocaption", "QA")
SIZES = [5, 1, 9, 3, 7]  # of the shards of a folder: 25 samples


def make_waveform(number: int, seconds: float = 0.12) -> np.ndarray:
    """A noise that no other number has, exact in 16 bits."""
    rng = np.random.default_rng(number)
    return (rng.integers(-9000, 9000, int(seconds * SAMPLE_RATE)) / 32768).astype(np.float32)


def make_members(number: int, **changes) -> dict[str, bytes]:
    """Suffix -> bytes of one sample; `changes` replace fields of its JSON."""
    waveform_N = make_waveform(number, 0.12 + 0.02 * (number * 7 % 11))
    fields = {
        "text": f"answer {number}",
        "task": TASKS[number % len(TASKS)],
        "Q": None,
        "source": "noise",
        "duration": len(waveform_N) / SAMPLE_RATE,
        "sha256": hash_waveform(waveform_N),
    }
    return {"flac": encode_flac(waveform_N), "json": json.dumps(fields | changes).encode()}


def make_key(number: int) -> str:
    """The key of a sample."""
    return f"clip-{number:05d}"


def write_shard(path: Path, numbers) -> Path:
    """A shard of these samples."""
    writer = TarWriter(path)
    for number in numbers:
        for suffix, data in make_members(number).items():
            writer.add(f"{make_key(number)}.{suffix}", data)
    writer.close()
    return path


def write_shards(folder: Path, sizes) -> list[str]:
    """Shards of so many samples each, in a folder; returns their keys in order."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        write_shard(folder / f"train-{shard:06d}.tar", range(first, first + size))
        first += size
    return [make_key(number) for number in range(first)]


def write_catalog(folder: Path) -> None:
    """The index.json that pack leaves, for a folder that is in order."""
    from shards.tars.index import build_index

    shards = []
    for path in sorted(folder.glob("*.tar")):
        data, index = path.read_bytes(), build_index(path)
        digest = hashlib.sha256(data).hexdigest()
        shards.append({"name": path.name, "samples": len(index), "bytes": len(data), "sha256": digest})
    (folder / "index.json").write_text(json.dumps({"shards": shards}))


def keys_of(stream, num_batches=None):
    """(key, epoch) of every sample, batch by batch."""
    return [[(s.key, s.epoch) for s in batch] for batch in itertools.islice(stream, num_batches)]
