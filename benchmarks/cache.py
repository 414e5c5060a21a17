"""Training from the target cache against training with the teacher in the loop: the same model, data, order and seed.

For every codec: seconds a step (median), how far its losses are from those of the teacher itself, and what the cache
takes. topk and adaptive are held against an online teacher that keeps the same k, the others against one that keeps
all ids: what remains is the codec's own rounding. The KL's value from draws is off by their entropy against the
teacher's, which no student changes: its gradient is right on average, its loss is no measure. Also with the frozen
encoders' frames in the cache, so that nobody runs the ears.

`python benchmarks/cache.py [--steps 60] [--config configs/demo.yaml] [key=value …]` uses the teacher that a config's
pipeline made, by default that of `configs/fsdd.yaml`; with `--toys` random weights and tones, whose figures say nothing
but that the script works.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from record import write_result

from distill.cache import cache
from distill.caching.job import FIGURES
from distill.config import Config, load_config
from distill.run import run
from shards.targets.store import read_done
from shards.tars.source import expand_shards

CONFIG = "configs/fsdd.yaml"
WARM_UP = 5  # steps that no time is taken of
# name: (what the cache is, whether the teacher is online, whose losses it is held against)
VARIANTS = {
    "online": (["cache.codec=dense"], True, None),
    "online, k=32": (["cache.codec=topk", "cache.k=32"], True, None),
    "topk k=32": (["cache.codec=topk", "cache.k=32"], False, "online, k=32"),
    "adaptive k<=32": (["cache.codec=adaptive", "cache.k=32"], False, "online, k=32"),
    "sampled, 50 draws": (["cache.codec=sampled"], False, "online"),
    "hidden": (["cache.codec=hidden"], False, "online"),
    "dense": (["cache.codec=dense"], False, "online"),
    "topk k=32, frames int8": (["cache.codec=topk", "cache.k=32", "cache.frames=int8"], False, "online, k=32"),
    "topk k=32, frames float16": (["cache.codec=topk", "cache.k=32", "cache.frames=float16"], False, "online, k=32"),
}


@dataclass(frozen=True)
class Trained:
    """One run."""

    losses: list[float]
    step_seconds: float  # median
    cache_seconds: float | None = None
    cache_bytes: int | None = None
    bytes_per_token: float | None = None  # of the distributions


def train(name: str, words: list[str], base: tuple[str, list[str]], folder: Path) -> Trained:
    """Cache what the variant needs, and train."""
    settings, is_online, _ = VARIANTS[name]
    slug = "".join(c if c.isalnum() else "-" for c in name)
    overrides = [*base[1], f"name={slug}", f"runs={folder}/runs", f"cache.folder={folder}/cache-{slug}",
                 f"teacher.online={str(is_online).lower()}", *settings, *words]  # fmt: skip
    config = load_config(base[0], overrides)
    took = None
    if not is_online:
        began = time.perf_counter()
        if cache(config):
            sys.exit(f"caching for {name} failed")
        took = time.perf_counter() - began
    if run(config):
        sys.exit(f"training of {name} failed")
    rows = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(row["seconds"] for row in rows[WARM_UP:] or rows)
    losses = [row["loss"] for row in rows]
    if is_online:
        return Trained(losses, seconds)
    return Trained(losses, seconds, took, *measure_cache(config))


def measure_cache(config: Config) -> tuple[int, float]:
    """Bytes of all targets, and of a token's distribution."""
    done = [read_done(config.cache_folder, shard) for shard in expand_shards(config.shards("train"))]
    total = {name: sum(d["figures"][name] for d in done) for name in FIGURES}
    return sum(d["bytes"] for d in done), total["payload_bytes"] / max(1, total["tokens"])


def compare(name: str, trained: dict[str, Trained]) -> dict:
    """A row of the table."""
    own, reference = trained[name], VARIANTS[name][2]
    row = {
        "variant": name,
        "step_seconds": own.step_seconds,
        "online_over_cached": trained["online"].step_seconds / own.step_seconds,
        "last_loss": own.losses[-1],
        "losses": own.losses,
    }
    if reference is None:
        return row
    differences = [abs(a - b) for a, b in zip(own.losses, trained[reference].losses)]
    return row | {
        "held_against": reference,
        "largest_loss_difference": max(differences),
        "mean_loss_difference": statistics.mean(differences),
        "cache_seconds": own.cache_seconds,
        "cache_bytes": own.cache_bytes,
        "bytes_per_token": own.bytes_per_token,
    }


def format_table(rows: list[dict], source: str) -> str:
    """The table for a reader."""
    seconds = {row["variant"]: row["step_seconds"] for row in rows}
    of_ears = 1 - seconds["topk k=32, frames float16"] / seconds["topk k=32"]
    lines = [
        f"Training on {source}.",
        f"Decoding and the ears are {of_ears:.0%} of a step from a cache without frames; online training runs the ears "
        "once for both, so that such a cache saves the teacher's small LLM alone.",
        "",
        "| targets | s a step | online ÷ this | last loss | largest (mean) loss difference | held against "
        "| cache MB | bytes a token | s to cache |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["variant"], f"{row['step_seconds']:.3f}", f"{row['online_over_cached']:.2f}×",
                 f"{row['last_loss']:.4f}"]  # fmt: skip
        if "held_against" in row:
            cells += [f"{row['largest_loss_difference']:.1e} ({row['mean_loss_difference']:.1e})", row["held_against"],
                      f"{row['cache_bytes'] / 1e6:.2f}", f"{row['bytes_per_token']:.1f}",
                      f"{row['cache_seconds']:.1f}"]  # fmt: skip
        else:
            cells += ["–"] * 5
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def use_pipeline(path: str, folder: Path) -> tuple[tuple[str, list[str]], str]:
    """A config's teacher and its first shard; all labels, so that online training generates nothing."""
    config = load_config(path)
    scratch = config.run_folder / "scratch"
    if not (scratch / "teacher" / "config.json").is_file():
        sys.exit(f"{scratch}/teacher is not there; make it with `distill pipeline {path}`, or give --toys")
    shard = Path(expand_shards(config.shards("train"))[0])
    (folder / "train").mkdir()
    (folder / "train" / shard.name).symlink_to(shard.resolve())
    words = [f"teacher.path={scratch}/teacher", f"student.llm={scratch}/student-llm", "data.labelled_share=1.0",
             f"data.folder={folder}", "cache.frames=none"]  # fmt: skip
    return (path, words), f"one shard of {config.name}, every label given"


def use_toys(folder: Path) -> tuple[tuple[str, list[str]], str]:
    """Random weights and tones, to try the script."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    tiny.make_parts(folder / "parts")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    tiny.make_shards(folder / "data")
    tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts")
    return (str(folder / "toy.yaml"), []), "toys with random weights: no figure here means anything"


def main() -> None:
    """Train every variant, one after the other, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--config", default=CONFIG, help="whose teacher and shards (%(default)s)")
    parser.add_argument("--toys", action="store_true", help="try the script on toys; nothing is written")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        base, source = use_toys(Path(name)) if args.toys else use_pipeline(args.config, Path(name))
        words = [f"train.steps={args.steps}", f"train.save_every={args.steps}", *args.overrides]
        trained = {variant: train(variant, words, base, Path(name)) for variant in VARIANTS}
    rows = [compare(variant, trained) for variant in VARIANTS]
    table = format_table(rows, f"{source}; {args.steps} steps")
    if args.toys:
        print(table)
    else:
        name = "cache" if args.config == CONFIG else f"cache_{Path(args.config).stem}"
        write_result(name, {"source": source, "steps": args.steps, "variants": rows}, table)


if __name__ == "__main__":
    main()
