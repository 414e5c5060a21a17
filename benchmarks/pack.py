"""How many clips a second are packed, audited and verified: real spoken digits, joined and resampled from 8 kHz."""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median

from record import write_result

from shards.manifests.manifest import read_manifest, write_manifest
from shards.packing.audit import audit
from shards.packing.pack import pack
from shards.packing.verify import verify

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def cpu_seconds() -> float:
    """Processor time of this process and of the workers that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(paths: dict[str, Callable], repeats: int) -> dict[str, dict[str, float]]:
    """Median wall and processor seconds of each path, the repetitions interleaved."""
    times = {name: [] for name in paths}
    for _ in range(repeats):
        for name, run in paths.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            run()
            times[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return {
        name: {"wall": median(wall for wall, _ in pairs), "cpu": median(cpu for _, cpu in pairs)}
        for name, pairs in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        manifest, numbers = folder / "train.json", iter(range(1000))
        rows = write_manifest(manifest, islice(read_manifest(SHARED / "data/fsdd/train.json"), args.rows))
        report = pack(manifest, folder / "packed", workers=1)
        times = measure(
            {
                "pack, 1 worker": lambda: pack(manifest, folder / f"{next(numbers)}", workers=1),
                "pack, 2 workers": lambda: pack(manifest, folder / f"{next(numbers)}", workers=2),
                "audit, 1 worker": lambda: audit([manifest], folder / f"{next(numbers)}", workers=1),
                "audit, 2 workers": lambda: audit([manifest], folder / f"{next(numbers)}", workers=2),
                "verify, 1 worker": lambda: verify(folder / "packed", workers=1),
                "resume a finished pack": lambda: pack(manifest, folder / "packed", workers=1),
            },
            args.repeats,
        )
    figures = {
        name: {
            "samples_per_second": round(rows / taken["wall"], 1),
            "samples_per_cpu_second": round(rows / taken["cpu"], 1),
            "audio_seconds_per_cpu_second": round(report.seconds / taken["cpu"], 1),
        }
        for name, taken in times.items()
    }
    lines = [f"| {name} | " + " | ".join(str(value) for value in row.values()) + " |" for name, row in figures.items()]
    table = "\n".join(["| path | samples/s | samples/CPU s | audio s/CPU s |", "|---|---|---|---|", *lines])
    summary = {"samples": rows, "audio_seconds": report.seconds, "bytes": report.num_bytes, "paths": figures}
    write_result("pack", summary, f"{rows} samples of fsdd, {report.seconds / 60:.0f} min of audio.\n\n{table}")


if __name__ == "__main__":
    main()
