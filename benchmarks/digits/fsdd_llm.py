"""What a student owes to the LLM that it starts from, on real spoken digits: WER of students of five small Llamas
that read more or less text before, with and without biases in their attention, of which Qwen 2 has some.

All learn with CE + KL and hear with the same ears for equal steps. Run `benchmarks/fsdd.py` first, whose teacher and
cache are used: `python benchmarks/digits/fsdd_llm.py [key=value …] [--seeds 0 1 2] [--llms …]`.
"""

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import torch
from digits.fsdd_students import CONFIG, SEEDS, load_trained, score_wer
from record import write_result
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill.config import Config, load_config
from distill.demo.scratch import corpus_texts, llm_fields, pretrain_on_text_
from distill.pipeline import launch_stage, make_shards
from teachers.salmonn import SalmonnConfig
from teachers.words.prompts import load_prompts

LLMS = {  # steps on text, and fields beside `llm_fields`
    "150": (150, {}),
    "150_bias": (150, {"attention_bias": True}),
    "600": (600, {}),
    "600_bias": (600, {"attention_bias": True}),
    "2400": (2400, {}),
}


def make_llm(name: str, config: Config, folder: Path) -> Path:
    """A Llama of the student's size that has read the corpus' text for so many steps; made once."""
    if (folder / "config.json").exists():
        return folder
    steps, changes = LLMS[name]
    scratch = config.scratch
    tokenizer = AutoTokenizer.from_pretrained(config.run_folder / "scratch" / "tokenizer")
    texts = corpus_texts(config.manifest("train"), load_prompts(None, SalmonnConfig("", "").template))
    torch.manual_seed(config.seed)
    fields = llm_fields(len(tokenizer), scratch.student_width, scratch.student_layers, tokenizer)
    llm = LlamaForCausalLM(LlamaConfig(**fields | changes))
    pretrain_on_text_(llm, tokenizer, texts, steps, title=f"text {name}")
    tokenizer.save_pretrained(folder)
    llm.save_pretrained(folder)
    return folder


def train_and_score(name: str, seed: int, llm: Path, words: list[str]) -> float:
    """The test WER of one student."""
    teacher = load_config(CONFIG).run_folder / "scratch" / "teacher"
    overrides = [f"name=fsdd-llm-{name}-{seed}", f"seed={seed}", f"teacher.path={teacher}", f"student.llm={llm}",
                 "loss.feature=0", *words]  # fmt: skip
    config = load_config(CONFIG, overrides)
    subprocess.run([sys.executable, "-m", "distill.run", CONFIG, *overrides], check=True)
    return score_wer(load_trained(config), config)


def main() -> None:
    """Train every student, two at a time, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--llms", nargs="+", default=list(LLMS), choices=LLMS)
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(CONFIG, args.words)
    make_shards(config)
    launch_stage("distill.teach", CONFIG, args.words, None)
    launch_stage("distill.cache", CONFIG, args.words, None)
    llms = {name: make_llm(name, config, config.run_folder / f"llm-{name}") for name in args.llms}
    jobs = [(name, seed) for seed in args.seeds for name in args.llms]
    with ThreadPoolExecutor(2) as pool:
        wers = dict(zip(jobs, pool.map(lambda job: train_and_score(*job, llms[job[0]], args.words), jobs)))
    students = {name: [wers[name, seed] for seed in args.seeds] for name in args.llms}
    write_result("fsdd_llm", {"students": students, "steps": config.train.steps}, make_table(students))


def make_table(students: dict[str, list[float]]) -> str:
    """Markdown: mean over the seeds, and each."""
    lines = ["| the LLM's steps on text | biases | WER % | each |", "|---|---|---|---|"]
    for name, wers in students.items():
        steps, changes = LLMS[name]
        each = ", ".join(f"{100 * wer:.2f}" for wer in wers)
        lines.append(f"| {steps} | {'yes' if changes else 'no'} | {100 * statistics.mean(wers):.2f} | {each} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
