"""What answering costs: `distill evaluate RUN --efficiency`, teacher, student and every export side by side.

Each is measured in a process of its own, so that a peak of memory is that model's with all that it imports: 10 s of
audio, batch 1, greedy, after a warm-up; the time to the first token and one further, as in the procedure that this
project compares itself with, and to each further one. Knows how to ask a model and no more of it; imports torch only
where the model needs it.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from distill.config import Config, load_config
from shards.files.write import write_atomically
from shards.jsonfile import ShapeError, read_object
from shards.sample import SAMPLE_RATE, Sample

EFFICIENCY = "efficiency.json"  # in the run's folder
SECONDS, TOKENS, RUNS = 10.0, 32, 5  # of audio; of the answer whose speed is said; of each, for a median
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")  # the processor's own meter, where it may be read


@dataclass(frozen=True)
class Efficiency:
    """What one model costs. A figure that this machine cannot give is None."""

    name: str
    gb: float  # 10^9 bytes at the peak: of the process, or allocated on the GPU
    disk_gb: float | None  # of an export's files
    first_ms: float  # audio to first token
    second_ms: float  # audio to the one after it
    next_ms: float  # each further token
    tokens_per_second: float  # of the whole answer, hearing included
    rtf: float  # seconds an answer of TOKENS takes, by those of audio
    joules: float | None  # of such an answer
    wer: float | None = None  # of the run's scorecard


COLUMNS = {
    "GB": lambda e: e.gb, "first (ms)": lambda e: e.first_ms, "+1 (ms)": lambda e: e.second_ms,
    "next (ms)": lambda e: e.next_ms, "tokens/s": lambda e: e.tokens_per_second, "RTF": lambda e: e.rtf,
    "J": lambda e: e.joules, "WER": lambda e: e.wer,
}  # fmt: skip


def measure_all(config: Config, places: Mapping[str, Path], wers: Mapping[str, float]) -> list[Efficiency]:
    """Measure models of a run, one after the other, and write the figures down.

    Args:
        config: the configuration of the run.
        places: folder of each model by its name; "teacher" is the run's.
        wers: word error rates that are known, by name.
    """
    found = []
    for name, place in places.items():
        figures = measure_apart(config.run_folder / "config.yaml", name, place)
        found.append(Efficiency(**figures | ({"wer": wers[name]} if name in wers else {})))
    record = {"models": [asdict(one) for one in found]}
    write_atomically(config.run_folder / EFFICIENCY, json.dumps(record, indent=1))
    return found


def measure_apart(config: Path, name: str, place: Path) -> dict:
    """The figures of one model, from a process of its own.

    Raises:
        RuntimeError: the process failed; it said why.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(config), name, str(place)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} could not be measured, but its process says why above; mend it, or leave it out.")
    return json.loads(done.stdout.splitlines()[-1])


def read_efficiency(run_folder: Path) -> list[Efficiency]:
    """What was measured of a run; nothing where nothing was.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_folder / EFFICIENCY
    if not path.is_file():
        return []
    try:
        return [Efficiency(**one) for one in read_object(path, {"models": list})["models"]]
    except (ShapeError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read (it {error}), but must be whole; run `distill evaluate … --efficiency` again."
        ) from error


def make_rows(found: Sequence[Efficiency]) -> list[tuple[str, ...]]:
    """A heading, and a row a model."""
    rows = [("", *COLUMNS)]
    for one in found:
        figures = (figure(one) for figure in COLUMNS.values())
        rows.append((one.name, *("–" if value is None else f"{value:.4g}" for value in figures)))
    return rows


# In the process of one model


def main(words: Sequence[str]) -> None:
    """Print the figures of one model."""
    config, name, place = load_config(words[0]), words[1], words[2]
    model, read_peak = load_subject(config, name, Path(place))
    sample = make_sample(config, model.max_samples)
    model.answer_ids([sample], max_new_tokens=2, min_new_tokens=2)
    first, second = (clock(model, sample, number) for number in (1, 2))
    joules = Meter()
    whole = clock(model, sample, TOKENS)
    energy = joules.read()
    is_device = (Path(place) / "device.json").is_file()
    files = [file for file in Path(place).rglob("*") if file.is_file()] if is_device else []
    print(json.dumps(asdict(Efficiency(
        name=name, gb=read_peak() / 1e9, disk_gb=sum(file.stat().st_size for file in files) / 1e9 or None,
        first_ms=1000 * first, second_ms=1000 * second, next_ms=1000 * max(0.0, whole - first) / (TOKENS - 1),
        tokens_per_second=TOKENS / whole, rtf=whole / (len(sample.waveform_N) / SAMPLE_RATE),
        joules=None if energy is None else energy / RUNS,
    ))))  # fmt: skip


def load_subject(config: Config, name: str, place: Path) -> tuple[object, Callable[[], float]]:
    """A model that answers, and what reads its peak of memory in bytes."""
    if (place / "device.json").is_file():
        from students.device.student import DeviceStudent

        return DeviceStudent(place), read_peak_of_process
    import torch

    from distill.teacher import load_teacher
    from students.student import load_student

    on_gpu = torch.cuda.is_available()
    model = load_teacher(config) if name == "teacher" else load_student(place, for_inference=not on_gpu)
    peak = torch.cuda.max_memory_allocated if on_gpu else read_peak_of_process
    return model.to("cuda" if on_gpu else "cpu"), peak


def read_peak_of_process() -> float:
    """Bytes that this process had resident at most; `getrusage` would count what started it too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def make_sample(config: Config, max_samples: int) -> Sample:
    """The first clip of the run's test split, repeated to 10 s or to what the ears take."""
    from shards.streaming.order import Order
    from shards.streaming.stream import ShardStream

    stream = ShardStream(config.shards("test"), Order(batch_size=1, shuffle=False, epochs=1))
    sample = next(samples[0] for samples in stream if samples)
    waveform_N = np.resize(sample.waveform_N, min(round(SECONDS * SAMPLE_RATE), max_samples))
    return Sample(sample.key, waveform_N, None, sample.task, sample.question, sample.source, sample.sha256)


def clock(model, sample: Sample, num_tokens: int) -> float:
    """Seconds of an answer of so many tokens, the median."""
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        model.answer_ids([sample], max_new_tokens=num_tokens, min_new_tokens=num_tokens)  # ids: it has waited for a GPU
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[RUNS // 2]


class Meter:
    """Joules since it was made, of the GPU where there is one, else of the processor; None where no meter is read."""

    def __init__(self):
        self.began = self._now()

    def read(self) -> float | None:
        """Joules so far."""
        now = self._now()
        return None if now is None or self.began is None or now < self.began else now - self.began

    @staticmethod
    def _now() -> float | None:
        with suppress(ImportError, OSError, ValueError):
            if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
                import pynvml

                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByIndex(sys.modules["torch"].cuda.current_device())
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            return int(RAPL.read_text()) / 1e6
        return None


if __name__ == "__main__":
    main(sys.argv[1:])
