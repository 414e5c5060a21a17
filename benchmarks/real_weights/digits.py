"""Regime A, spoken digits on real weights: Whisper base and SmolLM2-135M make a teacher, and students of it are scored.

Every stage goes on where it was stopped: packing, frames, training, caching and scoring use again what is there. Run
where `../shared/data/fsdd` is.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock

from parts import make_parts

from distill.config import Config, load_config
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import Difference, paired_difference
from distill.evaluation.scorecard import SCORECARD, Scorecard, read_scorecard
from distill.pipeline import launch_stage, make_shards
from shards.manifests.subset import subset
from students.prune import prune

HERE = Path(__file__).parent
TEACHER, STUDENT = str(HERE / "digits_teacher.yaml"), str(HERE / "digits_student.yaml")
DEPTHS = (30, 20, 15)  # layers of a student's LLM; the teacher's has 30
LABELS, ANSWERS = "ce", "ce_answers"  # of TERMS: the labels alone, and with them the teacher's answers
TERMS = {
    LABELS: ["loss.kl=0", "loss.feature=0", "data.labelled_only=true"],
    ANSWERS: ["loss.kl=0", "loss.feature=0"],
    "ce_answers_kl": ["loss.feature=0"],
    "ce_answers_kl_feature": [],
    "ce_answers_kl_t2": ["loss.feature=0", "loss.temperature=2"],
    "kl": ["loss.feature=0", "loss.ce=0"],
}
NUM_CLIPS = 1000  # of the 6,000, that students hear
SCORING = Lock()  # the first student's evaluation keeps the teacher's answers for the others


def run_digits(
    folder: Path,
    *,
    depths: Sequence[int],
    terms: Sequence[str],
    seeds: Sequence[int],
    words: list[str],
    launch: str | None = None,
) -> dict:
    """Make what is missing, and give the regime's figures.

    Args:
        folder: of the parts.
        depths, terms, seeds: of the students.
        words: `key=value` over both configs.
        launch: file of Accelerate for the teacher's training and its cache; None: one process.
    """
    llm, _ = make_parts(folder)
    config = load_config(TEACHER, words)
    make_shards(config)
    launch_stage("distill.teach", TEACHER, words, launch)
    make_shards(part_of_corpus(config, load_config(STUDENT, words)))
    launch_stage("distill.cache", STUDENT, words, launch)
    cut = {depth: llm if depth == max(DEPTHS) else cut_llm(llm, depth, config) for depth in depths}
    runs = {
        (depth, term, seed): [f"name=real-digits-{depth}-{term}-{seed}", f"seed={seed}", f"student.llm={cut[depth]}",
                              *TERMS[term], *words]
        for depth in depths for term in terms for seed in seeds
    }  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        cards = dict(zip(runs, pool.map(train_student, runs.values())))
    students = {f"{depth} layers, {term}": [cards[depth, term, seed] for seed in seeds] for depth, term, _ in runs}
    first = next(iter(cards.values()))
    teacher = first.teacher.scores["asr"].value
    wers = {name: [card.student.scores["asr"].value for card in each] for name, each in students.items()}
    return {
        "teacher": teacher,
        "teacher_ece": first.agreement.teacher_ece,
        "students": wers,
        "gap_closed": share_of_gap(teacher, wers, depths),
        "agreement": {name: agreements(each) for name, each in students.items()},
        "over_answers": {name: asdict(difference) for name, difference in over_answers(runs)},
        "steps": load_config(STUDENT, words).train.steps,
    }


def part_of_corpus(teacher: Config, student: Config) -> Config:
    """The student's config, whose manifest is written where it is not: some of the teacher's clips."""
    manifest = Path(student.corpus.train)
    if not manifest.is_file():
        manifest.parent.mkdir(parents=True, exist_ok=True)
        subset(Path(teacher.corpus.train), manifest, rows=NUM_CLIPS)
    return student


def cut_llm(llm: Path, depth: int, config: Config) -> Path:
    """The LLM with so many of its layers, those of the largest influence on the digits' texts."""
    folder = llm.with_name(f"{llm.name}-{depth}-layers")
    if not (folder / "config.json").is_file():
        print(prune(str(llm), folder, config.shards("train"), num_texts=128, layers=depth))
    return folder


def train_student(words: list[str]) -> Scorecard:
    """One student's scorecard; it is trained and scored where it was not."""
    folder = load_config(STUDENT, words).run_folder
    if not (folder / SCORECARD).is_file():
        subprocess.run([sys.executable, "-m", "distill.run", STUDENT, *words], check=True)
        with SCORING:
            subprocess.run([sys.executable, "-m", "distill", "evaluate", STUDENT, *words], check=True)
    return read_scorecard(folder)


def agreements(cards: Sequence[Scorecard]) -> dict[str, list[float]]:
    """How students predict the next tokens of the right answers: as their teacher does, and how well calibrated."""
    found = [card.agreement for card in cards]
    return {"top1": [a.top1 for a in found], "kl": [a.kl for a in found], "ece": [a.student_ece for a in found]}


def over_answers(runs: dict[tuple[int, str, int], list[str]]) -> Iterator[tuple[str, Difference]]:
    """By student: its WER beside the teacher's answers alone, clip by clip."""
    answered: dict[int, dict[str, list[list[Prediction]]]] = {}
    for (depth, term, _), words in runs.items():
        answered.setdefault(depth, {}).setdefault(term, []).append(read_answers(load_config(STUDENT, words)))
    for depth, by_term in answered.items():
        for term, answers in by_term.items():
            if term not in (LABELS, ANSWERS) and ANSWERS in by_term:
                yield f"{depth} layers, {term}", paired_difference(answers, by_term[ANSWERS], normalize=False)["asr"]


def read_answers(config: Config) -> list[Prediction]:
    """What a run's student answered to the test split."""
    rows = map(json.loads, (config.run_folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        Prediction(row["key"], row["task"], "", tuple(row["references"]), row["answer"])
        for row in rows
        if row["model"] == "student"
    ]


def share_of_gap(teacher: float, students: dict[str, list[float]], depths: Sequence[int]) -> dict[str, float]:
    """By depth: how much of the gap between labels alone and the teacher the best other term closes."""
    shares = {}
    for depth in depths:
        means = {name: statistics.mean(wers) for name, wers in students.items() if name.startswith(f"{depth} ")}
        labels = means.pop(f"{depth} layers, {LABELS}", None)
        if labels is not None and means and labels > teacher:
            shares[str(depth)] = (labels - min(means.values())) / (labels - teacher)
    return shares


def make_table(figures: dict) -> str:
    """Markdown: mean ± standard deviation over the seeds, each WER, and how far a student predicts as its teacher."""
    lines = [
        "| model | WER % | each | beside the teacher's answers alone, points of WER | same next token % | "
        "KL to teacher, nats | ECE % |",
        "|---|---|---|---|---|---|---|",
        f"| teacher, {max(DEPTHS)} layers | {100 * figures['teacher']:.2f} | | | | | "
        f"{100 * figures['teacher_ece']:.2f} |",
    ]
    for name, wers in figures["students"].items():
        spread = f" ± {100 * statistics.stdev(wers):.2f}" if len(wers) > 1 else ""
        paired = figures["over_answers"].get(name)
        beside = (
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * paired[k] for k in ("value", "low", "high"))) if paired else ""
        )
        found = {key: statistics.mean(values) for key, values in figures["agreement"][name].items()}
        lines.append(
            f"| {name} | {100 * statistics.mean(wers):.2f}{spread} | {', '.join(f'{100 * w:.2f}' for w in wers)} | "
            f"{beside} | {100 * found['top1']:.2f} | {found['kl']:.3f} | {100 * found['ece']:.2f} |"
        )
    closed = ", ".join(f"{share:.0%} at {depth} layers" for depth, share in figures["gap_closed"].items())
    notes = [
        f"{figures['steps']} steps. Of the gap between labels alone and the teacher, closed: {closed or 'not run'}.",
        "In brackets: the 95 % interval of a paired bootstrap over clips, seeds averaged. Token, KL and ECE are of the "
        "next tokens of the right answers.",
    ]
    return "\n".join([*lines, "", *notes])
