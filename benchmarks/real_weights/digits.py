"""Regime A, spoken digits on real weights: Whisper base and SmolLM2-135M make a teacher, and students of it are scored.

Every stage goes on where it was stopped: packing, frames, training, caching and scoring use again what is there, and a
score is kept beside its student. Run where `../shared/data/fsdd` is.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from parts import make_parts

from distill.config import Config, load_config
from distill.evaluation.answering import evaluate
from distill.pipeline import launch_stage, make_shards
from shards.files.write import write_atomically
from students.prune import prune
from students.student import load_student
from teachers.files.loading import load_salmonn
from teachers.salmonn import Salmonn

HERE = Path(__file__).parent
TEACHER, STUDENT = str(HERE / "digits_teacher.yaml"), str(HERE / "digits_student.yaml")
DEPTHS = (30, 20, 15)  # layers of a student's LLM; the teacher's has 30
TERMS = {
    "ce": ["loss.kl=0", "loss.feature=0", "data.labelled_only=true"],
    "ce_answers": ["loss.kl=0", "loss.feature=0"],
    "ce_answers_kl": ["loss.feature=0"],
    "ce_answers_kl_feature": [],
}
SCORE = "wer.json"


def run_digits(folder: Path, *, depths: Sequence[int], terms: Sequence[str], seeds: Sequence[int], words: list[str]):
    """Make what is missing, and give the regime's figures.

    Args:
        folder: of the parts.
        depths, terms, seeds: of the students.
        words: `key=value` over both configs.
    """
    llm, _ = make_parts(folder)
    teacher = load_config(TEACHER, words)
    make_shards(teacher)
    launch_stage("distill.teach", TEACHER, words, None)
    launch_stage("distill.cache", STUDENT, words, None)
    students = {}
    for depth in depths:
        path = llm if depth == max(DEPTHS) else cut_llm(llm, depth, teacher)
        for term in terms:
            names = [f"{depth} layers, {term}", [f"student.llm={path}", *TERMS[term], *words]]
            students[names[0]] = [train_student(f"real-digits-{depth}-{term}-{s}", s, names[1]) for s in seeds]
    wer = keep_score(teacher, lambda: load_salmonn(teacher.run_folder / "teacher"))
    figures = {"teacher": wer, "students": students, "steps": load_config(STUDENT, words).train.steps}
    return figures | {"gap_closed": share_of_gap(wer, students, depths)}


def cut_llm(llm: Path, depth: int, config: Config) -> Path:
    """The LLM with so many of its layers, those of the largest influence on the digits' texts."""
    folder = llm.with_name(f"{llm.name}-{depth}-layers")
    if not (folder / "config.json").is_file():
        print(prune(str(llm), folder, config.shards("train"), num_texts=128, layers=depth))
    return folder


def train_student(name: str, seed: int, words: list[str]) -> float:
    """The test WER of one student."""
    words = [f"name={name}", f"seed={seed}", *words]
    config = load_config(STUDENT, words)
    launch_stage("distill.run", STUDENT, words, None)
    return keep_score(config, lambda: load_student(config.run_folder / "student"))


@torch.no_grad()
def keep_score(config: Config, load) -> float:
    """The WER of what `load` gives on the test split; read where it was scored before."""
    path = config.run_folder / SCORE
    if not path.is_file():
        model: Salmonn = load()
        write_atomically(path, json.dumps(evaluate(model, config.shards("test"), config.eval)["asr"].value))
    return json.loads(path.read_text())


def share_of_gap(teacher: float, students: dict[str, list[float]], depths: Sequence[int]) -> dict[str, float]:
    """By depth: how much of the gap between labels alone and the teacher the best other term closes."""
    shares = {}
    for depth in depths:
        means = {name: statistics.mean(wers) for name, wers in students.items() if name.startswith(f"{depth} ")}
        labels = means.pop(f"{depth} layers, ce", None)
        if labels is not None and means and labels > teacher:
            shares[str(depth)] = (labels - min(means.values())) / (labels - teacher)
    return shares


def make_table(figures: dict) -> str:
    """Markdown: the WER of each, mean over its seeds and each."""
    rows = [("teacher, 30 layers", [figures["teacher"]]), *figures["students"].items()]
    lines = ["| model | WER % | each |", "|---|---|---|"]
    lines += [
        f"| {name} | {100 * statistics.mean(wers):.2f} | {', '.join(f'{100 * w:.2f}' for w in wers)} |"
        for name, wers in rows
    ]
    closed = ", ".join(f"{share:.0%} at {depth} layers" for depth, share in figures["gap_closed"].items())
    return "\n".join([*lines, "", f"Of the gap between labels alone and the teacher, closed: {closed or 'not run'}."])
