"""Time and memory of the distillation loss, forward and backward, against other libraries and the bare products.

One thread, float32, V = 128,256, 512 positions of which 115 are supervised. Processor seconds: the median over rounds
in which every method has its turn. Memory: each method alone in a process, the high-water mark of resident memory in
the call less what was resident before it. A call with a small vocabulary goes before, so that nothing is loaded in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peers.objective_methods import METHODS, MISSING, PEERS_OF_SAME_TERMS, PEERS_ON_SUPERVISED_ROWS, Inputs
from record import write_result

WIDTHS = (1024, 2048)
WARM_UP_VOCAB = 4096
CLOSE = ("matmul", "ours", "torch_top_64")  # within some percent of each other: three turns a round


def measure_seconds(width: int, rounds: int) -> dict[str, float]:
    """Median processor seconds of each method that can run."""
    inputs = Inputs.build(width)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS if name not in MISSING}
    for name in seconds:
        METHODS[name](Inputs.build(width, WARM_UP_VOCAB))
    for _ in range(rounds):
        for name in (*seconds, *CLOSE, *CLOSE):
            inputs.hidden_PD.grad = None
            start = time.process_time()
            METHODS[name](inputs)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def read_status(field: str) -> float:
    """A size of this process in MB (10⁶ bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024 / 1e6


def measure_peak(name: str, width: int) -> float:
    """Extra MB at the peak of one call, in this process."""
    inputs = Inputs.build(width)
    METHODS[name](Inputs.build(width, WARM_UP_VOCAB))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = read_status("VmRSS")
    METHODS[name](inputs)
    return read_status("VmHWM") - before


def measure_peaks(width: int) -> dict[str, float]:
    """Extra MB of each method, each in its own process, which gives freed blocks back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks = {}
    for name in METHODS:
        if name not in MISSING:
            command = [sys.executable, __file__, "--peak-of", name, "--width", str(width)]
            peaks[name] = float(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    return peaks


def compare(seconds: dict[str, float], peaks: dict[str, float]) -> dict[str, float]:
    """The ratios that are promised, as far as their peers are here."""
    ratios = {"time_over_matmul": seconds["ours"] / seconds["matmul"]}
    peers = [name for name in PEERS_ON_SUPERVISED_ROWS if name in seconds]
    if peers:
        ratios["times_faster_than_best_peer"] = min(seconds[name] for name in peers) / seconds["ours"]
        same_terms = [name for name in PEERS_OF_SAME_TERMS if name in seconds]
        ratios["times_faster_than_best_peer_of_same_terms"] = min(seconds[n] for n in same_terms) / seconds["ours"]
        ratios["memory_over_best_peer"] = peaks["ours"] / min(peaks[name] for name in peers)
    if "trl_gkd" in seconds:
        ratios["times_faster_than_trl_gkd"] = seconds["trl_gkd"] / seconds["ours"]
        ratios["times_faster_than_trl_gkd_with_teacher_head"] = seconds["trl_gkd_with_teacher_head"] / seconds["ours"]
        ratios["memory_over_trl_gkd"] = peaks["ours"] / peaks["trl_gkd"]
    return ratios


def as_table(by_width: dict[str, dict]) -> str:
    header = "| method | " + " | ".join(f"D = {width}: CPU s | peak MB" for width in by_width) + " |"
    lines = [header, "|---" * (1 + 2 * len(by_width)) + "|"]
    for name in METHODS:
        cells = [
            f"{figures['cpu_seconds'][name]:.2f} | {figures['peak_mb'][name]:.0f}"
            if name in figures["peak_mb"]
            else "– | –"
            for figures in by_width.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"\nNot measured: {name} ({reason})." for name, reason in MISSING.items()]
    for width, figures in by_width.items():
        ratios = ", ".join(f"{name} {value:.3f}" for name, value in figures["ratios"].items())
        lines.append(f"\nD = {width}: {ratios}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method that are counted")
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=WIDTHS[0], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        print(measure_peak(arguments.peak_of, arguments.width))
        return
    by_width = {}
    for width in WIDTHS:
        seconds, peaks = measure_seconds(width, arguments.rounds), measure_peaks(width)
        by_width[str(width)] = {"cpu_seconds": seconds, "peak_mb": peaks, "ratios": compare(seconds, peaks)}
    figures = {**by_width[str(WIDTHS[0])], "by_width": by_width, "missing": MISSING}
    write_result("objective", json.loads(json.dumps(figures)), as_table(by_width))


if __name__ == "__main__":
    main()
