"""What a student with another tokenizer learns from the teacher's cache on real spoken digits: WER, three seeds.

The student's LLM is a small Qwen 2 with a byte-level tokenizer, the teacher's a Llama with a sentencepiece one. Both
students hear with the teacher's ears and see the text of 2 % of the clips. Run `benchmarks/fsdd.py` first, whose
teacher and cache are used: `python benchmarks/digits/fsdd_cross.py [key=value …]`.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import torch
from digits.fsdd_students import CONFIG, SEEDS, describe_percents, load_trained, score_wer
from record import write_result
from transformers import Qwen2Config, Qwen2ForCausalLM

from distill.config import Config, load_config
from distill.demo.scratch import corpus_texts, llm_fields, pretrain_on_text_
from distill.demo.tokenizer import train_byte_tokenizer
from distill.pipeline import launch_stage, make_shards
from teachers.salmonn import SalmonnConfig
from teachers.words.prompts import load_prompts

# a connector that has heard before, as a released SALMONN's has, and steps enough for a LLM that has not
SETTINGS = ["loss.cross_tokenizer=chunk", "student.connector=teacher", "train.steps=1000"]
NO_TEACHER = ["loss.kl=0", "loss.chunk=0", "loss.feature=0"]
VARIANTS = {
    "ce": ("CE on the labelled clips", [*NO_TEACHER, "data.labelled_only=true"]),
    "ce_pseudo": ("CE, the teacher's answers too", NO_TEACHER),
    "chunk": ("CE + chunk likelihood", ["loss.kl=0", "loss.feature=0"]),
    "chunk_kl": ("CE + chunk likelihood + matched KL", ["loss.feature=0"]),
    "chunk_kl_feature": ("CE + chunk likelihood + matched KL + feature", []),
}


def make_qwen(config: Config, folder: Path) -> Path:
    """A Qwen 2 of the student's size, pre-trained on the corpus' text as the teacher's LLM was; made once."""
    if (folder / "config.json").exists():
        return folder
    texts = corpus_texts(config.manifest("train"), load_prompts(None, SalmonnConfig("", "").template))
    pieces = [piece for text in texts for piece in text if piece]
    tokenizer = train_byte_tokenizer(pieces, folder, vocab_size=config.scratch.vocab_size)
    torch.manual_seed(config.seed)
    scratch = config.scratch
    fields = llm_fields(len(tokenizer), scratch.student_width, scratch.student_layers, tokenizer)
    llm = Qwen2ForCausalLM(Qwen2Config(**fields))
    pretrain_on_text_(llm, tokenizer, texts, scratch.text_steps, title="text qwen")
    llm.save_pretrained(folder)
    return folder


def train_and_score(variant: str, seed: int, llm: Path, words: list[str]) -> float:
    """The test WER of one student."""
    teacher = load_config(CONFIG).run_folder / "scratch" / "teacher"
    overrides = [f"name=fsdd-cross-{variant}-{seed}", f"seed={seed}", f"teacher.path={teacher}", f"student.llm={llm}",
                 *SETTINGS, *VARIANTS[variant][1], *words]  # fmt: skip
    config = load_config(CONFIG, overrides)
    subprocess.run([sys.executable, "-m", "distill.run", CONFIG, *overrides], check=True)
    return score_wer(load_trained(config), config)


def main() -> None:
    """Run every variant and seed, two at a time, and write the table."""
    words = sys.argv[1:]
    config = load_config(CONFIG, words)
    make_shards(config)
    launch_stage("distill.teach", CONFIG, words, None)
    launch_stage("distill.cache", CONFIG, words, None)
    llm = make_qwen(config, load_config(CONFIG).run_folder / "qwen-llm")
    jobs = [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    with ThreadPoolExecutor(2) as pool:
        wers = dict(zip(jobs, pool.map(lambda job: train_and_score(*job, llm, words), jobs)))
    students = {variant: [wers[variant, seed] for seed in SEEDS] for variant in VARIANTS}
    write_result("fsdd_cross", {"students": students, "settings": SETTINGS}, make_table(students))


def make_table(students: dict[str, list[float]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| student with its own tokenizer | WER % (mean ± sd, 3 seeds) | each |", "|---|---|---|"]
    lines += [f"| {VARIANTS[variant][0]} | {describe_percents(wers)} |" for variant, wers in students.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
