"""What an on-policy round brings a student on real spoken digits: WER, and its distance to the teacher as it answers.

Every student goes on from one of `benchmarks/fsdd.py`'s (CE + KL), for equal steps at a lower learning rate: with more
of the same, or with 40 % of the clips seen with its own answers, drawn at temperature 1 and scored by the teacher. Run
that benchmark first, whose teacher, cache and students are used:
`python benchmarks/digits/fsdd_rounds.py [key=value …]`.
"""

import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import torch
from digits.fsdd_students import CONFIG, LOADING, SEEDS, load_trained, score_wer
from record import write_result

from distill.answers import Answerer
from distill.caching.capture import Capturer
from distill.config import Config, load_config
from distill.pipeline import launch_stage
from distill.teacher import load_teacher, teach_online
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from teachers.salmonn import Salmonn

SETTINGS = ["loss.feature=0", "train.steps=200", "train.learning_rate=1e-3", "on_policy.max_new_tokens=12",
            "on_policy.clips=0.4"]  # fmt: skip
SHARE = "on_policy.share=1"
VARIANTS = {
    "start": ("before", None),
    "labels": ("more of the same", []),
    "forward_kl": ("a round, forward KL", [SHARE]),
    "jsd": ("a round, JSD, beta 0.5", [SHARE, "loss.kl_kind=jsd", "loss.kl_parameter=0.5"]),
    "reverse_kl": ("a round, reverse KL", [SHARE, "loss.kl_kind=reverse_kl"]),
}


def describe_run(seed: int, words: list[str]) -> list[str]:
    """What all runs of a seed say; each seed's student answers a round of its own."""
    scratch = load_config(CONFIG, words).run_folder / "scratch"
    own = [f"seed={seed}", f"on_policy.round={seed + 1}", "on_policy.temperature=1"]
    return [*own, f"teacher.path={scratch}/teacher", f"student.llm={scratch}/student-llm", *SETTINGS, *words]


def train_and_score(variant: str, seed: int, words: list[str]) -> tuple[float, float]:
    """The test WER of one student, and its KL on its own answers."""
    common, start = describe_run(seed, words), f"fsdd-ce_kl-{seed}"
    name = start if variant == "start" else f"fsdd-round-{variant}-{seed}"
    config = load_config(CONFIG, [*common, f"name={name}"])
    if variant != "start":
        started = f"student.start={config.runs}/{start}/student"
        launch_stage("distill.run", CONFIG, [*common, f"name={name}", started, *VARIANTS[variant][1]], None)
    student = load_trained(config)
    return score_wer(student, config), own_answers_kl(student, config)


@torch.no_grad()
def own_answers_kl(student: Salmonn, config: Config) -> float:
    """The KL of the teacher to a student on the answers it draws to the test split, nats a token."""
    with LOADING:
        teacher = load_teacher(config)
    ask = Answerer(student, Capturer(teach_online(config, teacher), config), config)
    total, count = 0.0, 0
    for samples in ShardStream(config.shards("test"), Order(batch_size=32, shuffle=False, epochs=1)):
        answered = ask.answer(samples)
        theirs, own = (model(model.collate(answered))[0].log_softmax(-1) for model in (teacher, student))
        total, count = total + float((theirs.exp() * (theirs - own)).sum()), count + len(own)
    return total / count


def main() -> None:
    """Let each seed's student answer, run every variant, two at a time, and write the table."""
    words = sys.argv[1:]
    launch_stage("distill.cache", CONFIG, words, None)
    for seed in SEEDS:
        launch_stage("distill.answers", CONFIG, [*describe_run(seed, words), f"name=fsdd-ce_kl-{seed}"], None)
    jobs = [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    with ThreadPoolExecutor(2) as pool:
        scores = dict(zip(jobs, pool.map(lambda job: train_and_score(*job, words), jobs)))
    students = {variant: [scores[variant, seed] for seed in SEEDS] for variant in VARIANTS}
    write_result("fsdd_rounds", {"wer_and_kl": students, "settings": SETTINGS}, make_table(students))


def make_table(students: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| student | WER % (mean ± sd, 3 seeds) | KL on its own answers, nats a token |", "|---|---|---|"]
    for variant, values in students.items():
        wer, kl = zip(*values)
        lines.append(
            f"| {VARIANTS[variant][0]} | {100 * statistics.mean(wer):.2f} ± {100 * statistics.stdev(wer):.2f} "
            f"| {statistics.mean(kl):.3f} ± {statistics.stdev(kl):.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
