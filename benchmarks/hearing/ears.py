"""What small ears of its own cost a student, and what teaches them: WER on real spoken digits, three seeds.

Teacher and shards are those of `benchmarks/fsdd.py`, which comes first. The small ears have two thirds of the teacher's
width and layers and are pre-trained as its were, by CTC; some are trained with the student, whole or by LoRA, or are
layers of the teacher's: `python benchmarks/hearing/ears.py [key=value …] [--variants NAME …]`. Students made before are
used again.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import torch
from digits.fsdd_students import CONFIG, SEEDS, describe_percents, load_trained, score_wer
from record import write_result
from transformers import AutoTokenizer

from distill.config import Config, load_config
from distill.demo.scratch import build_whisper, pretrain_ears_
from distill.evaluation.answering import count_parameters
from distill.pipeline import launch_stage
from teachers.ears.whisper import WhisperEar

WIDTH, LAYERS = 64, 2
VARIANTS = {  # title, whether the ears are its own, words
    "shared": ("the teacher's ears", False, ["loss.feature=0"]),
    "shared_feature": ("the teacher's ears, feature loss", False, ["loss.feature=1"]),
    "new": ("own ears, new connector", True, ["student.connector=new", "loss.feature=0"]),
    "new_feature": ("own ears, new connector, feature loss", True, ["student.connector=new", "loss.feature=1"]),
    "inherited": ("own ears, the teacher's connector", True, ["student.connector=teacher", "loss.feature=0"]),
    "inherited_feature": ("own ears, the teacher's connector, feature loss", True,
                          ["student.connector=teacher", "loss.feature=1"]),
    "trained": ("own ears, trained, the teacher's connector, feature loss", True,
                ["student.connector=teacher", "loss.feature=1", "student.train_ears=true"]),
    "lora": ("own ears with LoRA of rank 8, the teacher's connector, feature loss", True,
             ["student.connector=teacher", "loss.feature=1", "student.ears_lora_rank=8"]),
    "trained_frames": ("own ears, trained, and frames pulled to the teacher's", True,
                       ["student.connector=teacher", "loss.feature=1", "student.train_ears=true", "loss.frames=1",
                        "teacher.online=true"]),
    "layers_frames": ("1 of 3 layers of the teacher's ears, trained, frames pulled", False,
                      ["student.connector=teacher", "loss.feature=1", "student.train_ears=true", "loss.frames=1",
                       "student.whisper_layers=1", "teacher.online=true"]),
}  # fmt: skip


def make_ears(config: Config, folder: Path) -> None:
    """Pre-train small ears on the training clips, unless they are there."""
    if (folder / "config.json").exists():
        return
    scratch = load_config(CONFIG).run_folder / "scratch"
    torch.manual_seed(0)
    whisper = build_whisper(replace(config.scratch, ear_width=WIDTH, ear_layers=LAYERS))
    pretrain_ears_(WhisperEar(whisper.encoder), AutoTokenizer.from_pretrained(scratch / "tokenizer"), config)
    whisper.save_pretrained(folder)


def train_and_score(variant: str, seed: int, ears: Path, common: list[str]) -> tuple[float, int]:
    """The test WER of one student, and the parameters of its ears."""
    _, is_own, words = VARIANTS[variant]
    own = [f"student.whisper={ears}"] if is_own else []
    overrides = [f"name=fsdd-ears-{variant}-{seed}", f"seed={seed}", *own, *words, *common]
    config = load_config(CONFIG, overrides)
    subprocess.run([sys.executable, "-m", "distill.run", CONFIG, *overrides], check=True)
    student = load_trained(config)
    return score_wer(student, config), count_parameters(student.whisper)


def main() -> None:
    """Make the ears and the cache, run every variant and seed, two at a time, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--record", default="ears", metavar="NAME", help="of what is written in results (%(default)s)")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    words = args.words
    base = load_config(CONFIG, words)
    scratch = load_config(CONFIG).run_folder / "scratch"
    common = [f"teacher.path={scratch}/teacher", f"student.llm={scratch}/student-llm", "cache.frames=none",
              "cache.hidden_layers=[]", f"cache.folder={base.data.folder}/cache-ears", *words]  # fmt: skip
    ears = Path(base.runs) / "fsdd-ears" / f"whisper-{base.scratch.ear_steps}"
    make_ears(base, ears)
    launch_stage("distill.cache", CONFIG, common, None)
    jobs = [(variant, seed) for seed in SEEDS for variant in args.variants]
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(jobs, pool.map(lambda job: train_and_score(*job, ears, common), jobs)))
    figures = {variant: {"wer": [results[variant, seed][0] for seed in SEEDS],
                         "parameters of the ears": results[variant, 0][1]} for variant in args.variants}  # fmt: skip
    write_result(args.record, {"students": figures, "steps": base.train.steps}, make_table(figures))


def make_table(figures: dict) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| student | parameters of its ears | WER % (mean ± sd, 3 seeds) | each |", "|---|---:|---:|---|"]
    for variant, found in figures.items():
        size = found["parameters of the ears"]
        lines.append(f"| {VARIANTS[variant][0]} | {size:,} | {describe_percents(found['wer'], digits=1)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
