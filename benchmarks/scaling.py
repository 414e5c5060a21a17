"""What bounds distillation from 2 to 1,024 GPUs and from 1,000 h to 1 M h of audio, by arithmetic.

FLOPs, bytes of weights and trained tensors are counted on the meta device for the config; what a processor streams is
`benchmarks/stream.py`'s measured rate; the cards' figures are published; the share of them that a step reaches is an
assumption until a card has been measured. `python benchmarks/scaling.py [--config salmonn_3b_to_1b] [--card H100]`.
"""

import argparse
import json

from record import RESULTS, write_result

from distill.config import load_config
from distill.sizes.cards import CARDS, SHARE, Card
from distill.sizes.costs import Usage
from distill.sizes.hours import FLAC_BYTES, Work, count_work

GPUS = (2, 8, 64, 256, 1024)
HOURS = (1_000, 10_000, 100_000, 1_000_000)
ROWS = 16  # clips a micro-batch and GPU, and rows that a teacher answers at once
NODE = 8  # GPUs that a fast link joins
TOKEN_BYTES = 90  # adaptive targets, benchmarks/storing/codecs.py
FRAME_BYTES, FRAMES = 1280 + 768, 50  # int8 of Whisper large and BEATs, and frames of each a second
LATENCY = 20e-6  # seconds that a message between nodes takes to start


def all_reduce_seconds(card: Card, gpus: int, size: float) -> float:
    """A ring in each node, then a tree between nodes of what one GPU of each has; none of it behind the backward."""
    inside, nodes = min(gpus, NODE), -(-gpus // NODE)
    seconds = 2 * (inside - 1) / inside * size / card.link
    if nodes > 1:
        seconds += 2 * (nodes - 1) / nodes * (size / inside) / card.network + 2 * LATENCY * (nodes - 1).bit_length()
    return seconds


def scale_gpus(work: Work, card: Card, share: float, usage: Usage, cpu_rate: float) -> list[dict]:
    """A step from cached frames on more and more GPUs, each with its own micro-batch."""
    rows = []
    for gpus in GPUS:
        compute = ROWS * work.student_flops / (card.flops * share)
        together = all_reduce_seconds(card, gpus, work.trained_bytes)
        hearing = ROWS * work.ear_flops / (card.flops * share)
        clips, heard = (gpus * ROWS / (compute + together + ears) for ears in (0.0, hearing))
        rows.append({
            "gpus": gpus,
            "step_ms": 1e3 * (compute + together),
            "all_reduce_ms": 1e3 * together,
            "efficiency": compute / (compute + together),
            "clips_a_second": clips,
            "read_gb_a_second": clips * clip_bytes(usage, with_frames=True) / 1e9,
            "clips_a_second_with_ears": heard,
            "cores_with_ears": heard / cpu_rate,
            "steps_of_1000_h": 1_000 * 3600 / usage.seconds / (gpus * ROWS),
        })  # fmt: skip
    return rows


def clip_bytes(usage: Usage, *, with_frames: bool) -> float:
    """What a cache keeps of a clip."""
    return usage.answer_tokens * TOKEN_BYTES + with_frames * usage.seconds * FRAMES * FRAME_BYTES


def scale_hours(work: Work, card: Card, share: float, usage: Usage) -> list[dict]:
    """Disk and GPU time of more and more audio."""
    rate, rows = card.flops * share, []
    for hours in HOURS:
        clips = hours * 3600 / usage.seconds
        decode = usage.answer_tokens * work.teacher_bytes / card.memory / ROWS  # bound by the weights' bytes
        rows.append({
            "hours": hours,
            "clips": clips,
            "shards_tb": hours * 3600 * FLAC_BYTES / 1e12,
            "targets_tb": clips * clip_bytes(usage, with_frames=False) / 1e12,
            "frames_tb": clips * usage.seconds * FRAMES * FRAME_BYTES / 1e12,
            "cache_gpu_hours": clips * work.teacher_flops / rate / 3600,
            "answers_gpu_hours": clips * decode / 3600,
            "epoch_gpu_hours": clips * work.student_flops / rate / 3600,
            "epoch_with_ears_gpu_hours": clips * (work.student_flops + work.ear_flops) / rate / 3600,
        })  # fmt: skip
    return rows


def make_table(figures: dict) -> str:
    """Both tables in Markdown."""
    lines = [
        f"{figures['config']} on {figures['card']}s at {figures['share']:.0%} of their published rate, clips of "
        f"{figures['seconds']:g} s, {ROWS} a GPU and step, targets and int8 frames cached; {NODE} GPUs a node. "
        "With ears: audio is decoded and they run.",
        "",
        "| GPUs | ms a step | of it all-reduce | efficiency | clips a s | cache read, GB a s | with ears: "
        "clips a s | processor cores | steps an epoch of 1,000 h |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in figures["gpus"]:
        lines.append(
            f"| {row['gpus']:,} | {row['step_ms']:.0f} | {row['all_reduce_ms']:.1f} | {row['efficiency']:.0%} | "
            f"{row['clips_a_second']:,.0f} | {row['read_gb_a_second']:.2f} | "
            f"{row['clips_a_second_with_ears']:,.0f} | {row['cores_with_ears']:,.0f} | "
            f"{row['steps_of_1000_h']:,.0f} |"
        )
    lines += [
        "",
        "| hours of audio | shards, TB | targets, TB | frames, TB | GPU hours: cache | the teacher's answers beside "
        "it | an epoch, frames cached | an epoch with ears |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in figures["hours"]:
        lines.append(
            f"| {row['hours']:,} | {row['shards_tb']:.2f} | {row['targets_tb']:.3f} | {row['frames_tb']:.2f} | "
            f"{row['cache_gpu_hours']:,.1f} | {row['answers_gpu_hours']:,.1f} | {row['epoch_gpu_hours']:,.1f} | "
            f"{row['epoch_with_ears_gpu_hours']:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Count, and write both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", default="salmonn_3b_to_1b")
    parser.add_argument("--card", default="H100", choices=CARDS)
    parser.add_argument("--share", type=float, default=SHARE, help="of the published FLOP/s that a step reaches")
    args = parser.parse_args()
    usage, card = Usage(), CARDS[args.card]
    measured = json.loads((RESULTS / "stream.json").read_text())["samples_per_cpu_second"]
    work = count_work(load_config(args.config), usage)
    figures = {
        "config": args.config,
        "card": args.card,
        "share": args.share,
        "seconds": usage.seconds,
        "trained_mb": work.trained_bytes / 1e6,
        "gflop_a_clip": {"student": work.student_flops / 1e9, "ears": work.ear_flops / 1e9,
                         "teacher": work.teacher_flops / 1e9},
        "gpus": scale_gpus(work, card, args.share, usage, measured["2 workers"]["front ends on the device"]),
        "hours": scale_hours(work, card, args.share, usage),
    }  # fmt: skip
    write_result("scaling", figures, make_table(figures))


if __name__ == "__main__":
    main()
