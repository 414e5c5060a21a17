"""A step from a cache with int8 frames: records unpacked once, in the stream's workers, or as it was before.

Before, a record came to the trainer's process as bytes and was unpacked there to float32, an unlabelled clip's twice.
Both ways read the same cache in turns and give the same losses. Frames have the width of Whisper large's, clips last
5 s, every other one is unlabelled; the LLM is a toy, so that reading and unpacking weigh as much as they can.

`python benchmarks/storing/records.py [--steps 12] [--rounds 3] [--workers 1]`: seconds of a step, and the processor's
seconds of the trainer's process in it; medians of all rounds, and the ratio before ÷ now.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # first: rooms of the tests are named as packages are

import soundfile
import tiny
from record import write_result

from distill import Distiller, TrainConfig
from distill.cache import cache
from distill.config import load_config
from shards.packing.pack import pack
from shards.sample import SAMPLE_RATE
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.reader import Reader
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.record import Stored, TargetRecord
from students import build_student
from teachers import CachedTeacher, Lora, load_salmonn

WIDTH, SECONDS = 1280, 5.0  # of Whisper large's frames; of a clip, and what the ears take
NUM_CLIPS, BATCH_SIZE = 16, 8
WARM_UP = 3  # steps that no time is taken of


class Clock:
    """Notes each step's seconds, and the processor's seconds of this process."""

    def __init__(self):
        self.began, self.steps = time.process_time(), []

    def on_step(self, run, record):
        now = time.process_time()
        self.steps.append((record["seconds"], now - self.began))
        self.began = now


@contextmanager
def as_before():
    """While it is open, records come as bytes and are unpacked in this process whenever the teacher asks for one."""
    own = CachedTeacher._record, Reader._read_record

    def record_of(self, sample):
        record = TargetRecord.unpack(sample.targets)
        features = {name: Stored(values) for name, values in record.features.items()}
        return own[0](self, replace(sample, targets=replace(record, features=features)))

    CachedTeacher._record, Reader._read_record = record_of, Reader._read_member
    try:
        yield
    finally:
        CachedTeacher._record, Reader._read_record = own


def make_data(folder: Path):
    """A toy teacher with wide ears, clips, and their cache; returns the config."""
    tiny.SIZES = replace(tiny.SIZES, seconds=SECONDS, ear_width=WIDTH)
    tiny.make_parts(folder / "parts")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    (folder / "data" / "audio").mkdir(parents=True)
    rows = [{"path": f"audio/{n}.wav", "text": "one two", "task": "asr"} for n in range(NUM_CLIPS)]
    for number, row in enumerate(rows):
        soundfile.write(folder / "data" / row["path"], tiny.tone(number, SECONDS), SAMPLE_RATE, subtype="PCM_16")
    (folder / "data" / "train.json").write_text(json.dumps({"annotation": rows}))
    pack(folder / "data" / "train.json", folder / "data" / "train", name="train", workers=1)
    path = tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts")
    config = load_config(path, ["cache.frames=int8", "data.labelled_share=0.5", "precision=float32"])
    cache(config)
    return config


def train(config, run_folder: Path, steps: int, workers: int) -> tuple[list[float], list[tuple[float, float]]]:
    """Losses, and what the clock says of each step."""
    student = build_student(load_salmonn(config.teacher.path), config.student.llm, lora=Lora(rank=4),
                            quantization="none")  # fmt: skip
    stream = ShardStream(config.shards("train"), Order(batch_size=BATCH_SIZE),
                         Selection(targets=config.cache_folder, labelled_share=0.5), Limits(workers=workers),
                         decode=False, max_seconds=SECONDS)  # fmt: skip
    options = TrainConfig(steps=steps, batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE, trackers=(), save_every=1000)
    clock = Clock()
    run = Distiller(config.cache_folder, student, train=stream, options=options, run=run_folder,
                    callbacks=[clock])  # fmt: skip
    return run.fit().losses, clock.steps[WARM_UP:]


def main() -> None:
    """Train both ways in turns, compare losses, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    ways, noted, losses = {"before": as_before, "now": nullcontext}, {"before": [], "now": []}, []
    with tempfile.TemporaryDirectory() as name:
        config = make_data(Path(name))
        for number in range(args.rounds):
            for way, context in ways.items():
                with context():
                    found, steps = train(config, Path(name) / f"{way}-{number}", args.steps, args.workers)
                losses.append(found)
                noted[way] += steps
    if any(found != losses[0] for found in losses):
        sys.exit("the two ways give other losses")
    medians = {way: [statistics.median(column) for column in zip(*steps)] for way, steps in noted.items()}
    ratios = [before / now for before, now in zip(medians["before"], medians["now"])]
    rows = [f"| {way} | {1e3 * wall:.0f} | {1e3 * cpu:.0f} |" for way, (wall, cpu) in medians.items()]
    table = "\n".join([
        f"{BATCH_SIZE} clips of {SECONDS:g} s a step, int8 frames of width {WIDTH}, {args.workers} worker(s); "
        f"{args.rounds} rounds of {args.steps} steps, losses identical.",
        "", "| records | ms a step | ms of the trainer's processor |", "|---|---|---|", *rows,
        f"| before ÷ now | {ratios[0]:.2f} | {ratios[1]:.2f} |",
    ])  # fmt: skip
    write_result("records", {"medians": medians, "ratio_step": ratios[0], "ratio_processor": ratios[1],
                             "workers": args.workers, "steps": args.steps, "rounds": args.rounds}, table)  # fmt: skip


if __name__ == "__main__":
    main()
