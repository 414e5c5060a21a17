"""From shards to model-ready batches against the path of SALMONN's and Nota's `dataset.py`, same clips; and resume.

Theirs: a file a clip, what `librosa.load(path, sr=16000)` does (soundfile, mono, soxr), `WhisperFeatureExtractor`, and
torchaudio's Kaldi fbank, clip after clip. Ours: `ShardStream`, length buckets, and our batched front ends in the same
worker; or none of them, where the device computes them. Each worker is a process on one thread that takes its share
of the clips up to finished tensors; carrying these to the trainer is left out on both sides. Paths are taken in turn,
medians.

Resume: an index of a million samples, stopped at three places of an epoch; from the call that opens the stream to the
first batch.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import soundfile
import soxr
import torch
import torchaudio.compliance.kaldi as kaldi
from record import write_result
from scipy.signal import lfilter
from transformers import WhisperFeatureExtractor

from shards.audio.decode import encode_flac, hash_waveform, to_int16
from shards.sample import SAMPLE_RATE, Sample
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from shards.tars.index import build_index, pack_sidecar, sidecar_path
from shards.tars.tarwriter import TarWriter
from teachers.ears.beats import BEATS_FBANK
from teachers.ears.frontend import WhisperLogMel
from teachers.ears.one_frontend import OneFrontEnd
from teachers.words.batch import pad_waveforms

NUM_MELS = 128  # Whisper large-v3
BATCH_SIZE = 8
BUCKET_BATCHES = 16


def synthesize_clips(num_clips: int) -> list[np.ndarray]:
    """Speech-like noise of 2 to 18 s, 10 s on average: FLAC takes about half of its 16 bits, as of speech."""
    rng = np.random.default_rng(0)
    clips = []
    for seconds in rng.uniform(2, 18, num_clips):
        num_samples = int(seconds * SAMPLE_RATE)
        syllables_N = np.square(np.sin(2 * np.pi * 2 * np.arange(num_samples) / SAMPLE_RATE))
        clip_N = lfilter([1], [1, -1.6, 0.75], rng.standard_normal(num_samples)) * syllables_N
        clips.append((to_int16(clip_N / np.abs(clip_N).max() * 0.3) / 32768).astype(np.float32))
    return clips


def write_data(folder: Path, clips: Sequence[np.ndarray], num_shards: int = 4) -> None:
    """The same FLAC bytes twice: as shards in `folder/shards`, and as a file a clip in `folder/files`."""
    (folder / "shards").mkdir()
    (folder / "files").mkdir()
    listed = []
    for shard in range(num_shards):
        writer = TarWriter(folder / f"shards/train-{shard:06d}.tar")
        numbers = range(shard, len(clips), num_shards)
        for number in numbers:
            flac = encode_flac(clips[number])
            (folder / f"files/{number:05d}.flac").write_bytes(flac)
            writer.add(f"clip-{number:05d}.flac", flac)
            writer.add(f"clip-{number:05d}.json", describe(clips[number]))
        sha256 = writer.close()
        listed.append({"name": writer.path.name, "samples": len(numbers), "bytes": writer.size, "sha256": sha256})
    (folder / "shards/index.json").write_text(json.dumps({"shards": listed}))


def describe(clip_N: np.ndarray) -> bytes:
    """A sample's JSON."""
    fields = {"text": "what was said", "task": "asr", "Q": None, "source": "noise"}
    return json.dumps(fields | {"duration": len(clip_N) / SAMPLE_RATE, "sha256": hash_waveform(clip_N)}).encode()


def run_original(folder: Path, worker: int, num_workers: int) -> int:
    """Nota's data set: decode, log-mel and fbank, clip after clip."""
    extractor = WhisperFeatureExtractor(NUM_MELS)
    paths = sorted((folder / "files").iterdir())[worker::num_workers]
    for path in paths:
        samples_N, rate = soundfile.read(path, dtype="float32")
        samples_N = samples_N if samples_N.ndim == 1 else samples_N.mean(1)
        waveform_N = samples_N if rate == SAMPLE_RATE else soxr.resample(samples_N, rate, SAMPLE_RATE, quality="HQ")
        extractor(waveform_N[: 30 * SAMPLE_RATE], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        fbank_XM = kaldi.fbank(torch.from_numpy(waveform_N)[None] * 2**15, num_mel_bins=128)
        (fbank_XM - BEATS_FBANK.mean) / BEATS_FBANK.std
    return len(paths)


def open_stream(folder: Path, worker: int, num_workers: int) -> ShardStream:
    """This worker's share of one epoch."""
    return ShardStream(
        folder / "shards",
        Order(batch_size=BATCH_SIZE * num_workers, epochs=1, bucket_batches=BUCKET_BATCHES),
        rank=worker,
        world_size=num_workers,
    )


def run_decoding(folder: Path, worker: int, num_workers: int) -> int:
    """Ours where the device computes the front ends: padded waveforms."""
    return sum(len(pad(samples)[0]) for samples in open_stream(folder, worker, num_workers) if samples)


def run_front_ends(folder: Path, worker: int, num_workers: int) -> int:
    """Ours with both front ends in the worker."""
    front_end = OneFrontEnd(WhisperLogMel(NUM_MELS, 3000))
    batches = [samples for samples in open_stream(folder, worker, num_workers) if samples]
    return sum(len(front_end(*pad(samples))[0]) for samples in batches)


def pad(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """waveforms_BN, zeros behind each, and num_samples_B."""
    return pad_waveforms([sample.waveform_N for sample in samples])


PATHS = {"original": run_original, "front ends in the worker": run_front_ends, "front ends on the device": run_decoding}


def time_path(path: Callable, folder: Path, num_workers: int) -> tuple[float, float]:
    """Wall seconds and CPU seconds of all workers together."""
    context = multiprocessing.get_context("fork")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    workers = [context.Process(target=path, args=(folder, worker, num_workers)) for worker in range(num_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a worker of {path.__name__} ended with {worker.exitcode}; see its traceback.")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_throughput(folder: Path, num_clips: int, repetitions: int) -> dict:
    """Samples a second and a CPU second of each path, by one and by two workers."""
    for path in PATHS.values():
        path(folder, 0, 8)  # builds the index, the filter banks and windows before any clock runs
    times = {(name, num_workers): [] for num_workers in (1, 2) for name in PATHS}
    for _ in range(repetitions):
        for name, num_workers in times:
            times[name, num_workers].append(time_path(PATHS[name], folder, num_workers))
    median = {place: [statistics.median(column) for column in zip(*values)] for place, values in times.items()}
    figures = {
        field: {
            f"{num_workers} worker{'s' * (num_workers > 1)}": {
                name: num_clips / median[name, num_workers][column] for name in PATHS
            }
            for num_workers in (1, 2)
        }
        for column, field in enumerate(("samples_per_second", "samples_per_cpu_second"))
    }
    for field, name in (("ratio", "front ends in the worker"), ("device_frontends_ratio", "front ends on the device")):
        # Of runs that came right after each other: other work on the machine slows both.
        figures[f"{field}_by_workers"] = {
            f"{num_workers}": statistics.median(
                original[1] / ours[1]
                for original, ours in zip(times["original", num_workers], times[name, num_workers])
            )
            for num_workers in (1, 2)
        }
        figures[field] = min(figures[f"{field}_by_workers"].values())
    return figures


def write_long_epoch(folder: Path, num_shards: int, shard_samples: int) -> None:
    """Shards of a million samples that share their bytes on the disk; only keys differ."""
    clip_N = synthesize_clips(1)[0][: SAMPLE_RATE // 2]
    flac, fields = encode_flac(clip_N), describe(clip_N)
    writer = TarWriter(folder / "first.tar")
    for number in range(shard_samples):
        writer.add(f"clip-{number:08d}.flac", flac)
        writer.add(f"clip-{number:08d}.json", fields)
    writer.close()
    index = build_index(folder / "first.tar")
    for shard in range(num_shards):
        path = folder / f"train-{shard:06d}.tar"
        os.link(folder / "first.tar", path)
        keys = [f"clip-{shard * shard_samples + number:08d}" for number in range(shard_samples)]
        times = path.stat().st_mtime_ns
        own = replace(index, name=path.name, keys=keys, mtime_ns=times, sha256=f"{shard:064x}")
        sidecar_path(path).write_bytes(pack_sidecar(own))
    (folder / "first.tar").unlink()


def measure_resume(folder: Path, repetitions: int) -> dict:
    """Seconds from opening the stream to the first batch, after stopping at some share of the epoch."""
    order = Order(32, bucket_batches=BUCKET_BATCHES)
    stream = ShardStream(folder, order)
    seconds = {share: [] for share in (0.0, 0.1, 0.5, 0.9)}
    for _ in range(repetitions):
        for share, values in seconds.items():
            batches = int(share * stream.batches_per_epoch)
            state = stream.state_dict() | {"offset": batches * order.batch_size}
            start = time.monotonic()
            resumed = ShardStream(folder, order)
            resumed.load_state_dict(state)
            next(iter(resumed))
            values.append(time.monotonic() - start)
    by_place = {f"{share:.0%}": statistics.median(values) for share, values in seconds.items()}
    state_bytes = len(json.dumps(stream.state_dict()))
    return {
        "resume_seconds": by_place["90%"],
        "resume_seconds_by_place": by_place,
        "resume_samples": stream.num_samples,
        "state_bytes": state_bytes,
    }


def make_table(figures: dict) -> str:
    """Markdown."""
    lines = ["| samples | " + " | ".join(PATHS) + " |", "|---" * (len(PATHS) + 1) + "|"]
    for field, unit in (("samples_per_second", "a second"), ("samples_per_cpu_second", "a CPU second")):
        for workers, values in figures[field].items():
            lines.append(f"| {unit}, {workers} | " + " | ".join(f"{values[name]:.1f}" for name in PATHS) + " |")
    places = ", ".join(f"{seconds:.2f} s at {place}" for place, seconds in figures["resume_seconds_by_place"].items())
    return "\n".join(
        [
            f"{figures['clips']} clips of 2 to 18 s as 16 kHz FLAC, Whisper's {NUM_MELS}-bin log-mel and BEATs' fbank.",
            "",
            *lines,
            "",
            "A CPU second, ours to the original, the lower of one and two workers: "
            f"**{figures['ratio']:.2f}×** with the front ends in the worker, "
            f"**{figures['device_frontends_ratio']:.2f}×** with them on the device.",
            "",
            f"First batch after a crash, {figures['resume_samples']:,} samples an epoch, "
            f"{figures['state_bytes']} bytes of state: {places} of the epoch.",
        ]
    )


def main() -> None:
    """Measure and write benchmarks/results/stream.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--shards", type=int, default=500, help="of 2,000 samples each, of the long epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), synthesize_clips(arguments.clips))
        figures = measure_throughput(Path(folder), arguments.clips, arguments.repetitions)
    with tempfile.TemporaryDirectory() as folder:
        write_long_epoch(Path(folder), arguments.shards, 2000)
        figures |= measure_resume(Path(folder), 3)
    figures |= {"clips": arguments.clips, "repetitions": arguments.repetitions}
    write_result("stream", figures, make_table(figures))


if __name__ == "__main__":
    main()
