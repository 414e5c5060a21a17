"""What it costs and what it spares to cut Whisper to the clip: WER on real spoken digits, and the encoder's time.

One student for each length, trained on the labels of every clip behind the same frozen ears, whose pre-training heard
clips padded to 4.3 s; so only the connector and LoRA can learn what a cut ear gives. Times are of Whisper base and
large-v2 with random weights, one clip at a time. The parts are those that `benchmarks/fsdd.py` makes first:
`python benchmarks/hearing/ears_seconds.py [--seconds 10] [key=value …]`. Students made before are used again.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import torch
from digits.fsdd_students import CONFIG, score_wer
from record import write_result
from transformers import WhisperConfig

from distill.config import Config, LossConfig, load_config
from distill.demo.scratch import teacher_config
from distill.distiller import Distiller, Run
from distill.sizes.costs import model_config
from shards.sample import SAMPLE_RATE
from students.hearing import Connector, Hearing
from students.student import build_student
from teachers.ears.frontend import FRAME_SAMPLES
from teachers.ears.whisper import WhisperEar
from teachers.files.loading import build_salmonn

LENGTHS = ("30", "clip", "clip+1", "clip+3")
MODELS = ("openai/whisper-base", "openai/whisper-large-v2")
RUNS = 3  # of a timed encoder, the fastest of which counts


def train_and_score(ears_seconds: str, config: Config, scratch: Path) -> float:
    """The test WER of a student whose ears are cut so."""
    torch.manual_seed(0)
    base = build_salmonn(teacher_config(config.scratch, scratch))
    student = build_student(base, str(scratch / "student-llm"), hearing=Hearing(ears_seconds=ears_seconds),
                            connector=Connector("new"), quantization="none", seed=config.seed)  # fmt: skip
    loss = LossConfig(kl=0.0, feature=0.0)
    name = ears_seconds.replace("+", "-plus-")
    run = Run(Path(config.runs) / f"fsdd-seconds-{name}-{config.train.steps}", config.seed, config.precision)
    Distiller(None, student, train=config.shards("train"), loss=loss, options=config.train, answers=config.eval,
              run=run).fit()  # fmt: skip
    return score_wer(student.eval(), config)


@torch.no_grad()
def time_encoder(name: str, seconds: float, padding: float | None) -> float:
    """Processor seconds that a Whisper of this size takes for one clip; `padding` behind it, or None: up to 30 s.

    They are this process's own, so that other work on the machine counts little.
    """
    sizes = model_config(name).to_dict()
    ear = WhisperEar.from_config(WhisperConfig(**sizes)).requires_grad_(False)
    mel_BMX = torch.randn(1, ear.log_mel.num_mels, ear.log_mel.num_frames)
    frames = None if padding is None else [min(1500, round((seconds + padding) * SAMPLE_RATE) // FRAME_SAMPLES)]
    found = []
    for _ in range(RUNS):
        began = time.process_time()
        ear.encode(mel_BMX, frames)
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    """Train and score a student for each length, time both encoders, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of the clip that encoders are timed on")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="that are timed")
    parser.add_argument("--lengths", nargs="*", default=list(LENGTHS), help="that students are trained with")
    parser.add_argument("--note", default="", help="said beside the table, such as what else the machine did")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(CONFIG, args.words)
    scratch = load_config(CONFIG).run_folder / "scratch"
    wers = {}
    for length in args.lengths:
        wers[length] = train_and_score(length, config, scratch)
        print(f"{length}: WER {wers[length]:.4f}", flush=True)
    paddings = {"30": None, "clip": 0.0, "clip+1": 1.0, "clip+3": 3.0}
    times = {name: {length: time_encoder(name, args.seconds, padding) for length, padding in paddings.items()}
             for name in args.models}  # fmt: skip
    figures = {"wer": wers, "encoder_seconds": times, "clip_seconds": args.seconds, "threads": torch.get_num_threads(),
               "steps": config.train.steps, "note": args.note}  # fmt: skip
    write_result("ears_seconds", figures, make_table(figures))


def make_table(figures: dict) -> str:
    """Markdown: a row a length."""
    times = figures["encoder_seconds"]
    names = [name.rpartition("/")[2] for name in times]
    lines = ["| Whisper hears | WER % on fsdd | " + " | ".join(f"{name}, processor s a clip" for name in names) + " |",
             "|---" * (2 + len(names)) + "|"]  # fmt: skip
    for length in LENGTHS:
        cells = " | ".join(f"{found[length]:.2f}" for found in times.values())
        title = "all it takes" if length == "30" else length
        wer = f"{100 * figures['wer'][length]:.1f}" if length in figures["wer"] else "not trained"
        lines.append(f"| {title} | {wer} | {cells} |")
    threads = f"{figures['threads']} thread{'s' * (figures['threads'] != 1)}"
    note = f" {figures['note']}" if figures["note"] else ""
    return "\n".join([*lines, "", f"{figures['steps']} steps, one seed; the encoders' clip lasts "
                      f"{figures['clip_seconds']:g} s, {threads}.{note}"])  # fmt: skip


if __name__ == "__main__":
    main()
