"""What a checkpoint costs the run that waits for it, where as much is trained as in the recipes: 12 bytes an element.

Tensors of random numbers are written as a run does: weights and AdamW's moments, synced, each file hashed, renamed. The
medians of five, after one that is not counted.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import torch
from record import write_result

from distill.training.checkpoint import FILES, KINDS, save_checkpoint
from shards.files.hash import hash_file

MILLIONS = (9, 36)  # trained elements: the connector with LoRA of a small LLM; the recipe salmonn_3b_to_1b
TENSORS = 200
ROUNDS = 5
SAVE_EVERY, STEP_SECONDS = 1000, 1.0  # the recipes' steps between saves, and a fast step of a GPU


def measure(millions: int) -> dict[str, float]:
    """Seconds of a save, of the hashes in it, and of the copy that a save in the background would begin with."""
    weights = {f"layer{n}": torch.randn(millions * 1_000_000 // TENSORS) for n in range(TENSORS)}
    moments = {f"{name}.{kind}": torch.randn_like(x) for name, x in weights.items() for kind in KINDS}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rounds = [measure_once(Path(folder), step, weights, moments) for step in range(ROUNDS + 1)][1:]
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def measure_once(folder: Path, step: int, weights: dict, moments: dict) -> dict[str, float]:
    """The seconds of one save."""
    times = [time.perf_counter()]
    path = save_checkpoint(folder, step, {}, weights, moments)
    times.append(time.perf_counter())
    for file in FILES:
        hash_file(path / file)
    times.append(time.perf_counter())
    copies = [x.clone() for x in (*weights.values(), *moments.values())]
    times.append(time.perf_counter())
    assert len(copies) == TENSORS * (1 + len(KINDS))
    return {name: later - before for name, before, later in zip(("save", "hash", "copy"), times, times[1:])}


def main() -> None:
    """Measure both sizes and write the record."""
    found = {f"{millions} M": measure(millions) for millions in MILLIONS}
    lines = [f"| trained | a save (s) | of it hashes (s) | a copy (s) | of {SAVE_EVERY} steps of {STEP_SECONDS:g} s |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for size, seconds in found.items():
        share = seconds["save"] / (SAVE_EVERY * STEP_SECONDS)
        lines.append(
            f"| {size} | {seconds['save']:.2f} | {seconds['hash']:.2f} | {seconds['copy']:.2f} | {share:.2%} |"
        )
    write_result("saving", {"seconds": found, "shared_machine": True}, "\n".join(lines))


if __name__ == "__main__":
    main()
