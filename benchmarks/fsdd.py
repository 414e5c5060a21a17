"""What each term of the objective is worth on real spoken digits: WER of the teacher and of students, three seeds.

The teacher learned from every clip; a student sees the text of 2 % of them, and the teacher's answers to the others.
Equal steps and batches; CE alone can only use the labelled clips. Run it where `../shared/data/fsdd` is:
`python benchmarks/fsdd.py [--all] [key=value …]`. `--all` adds every divergence, feature loss and schedule to the four
main students. Stages and students that were made before are used again.
"""

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from fsdd_students import CONFIG, SEEDS, describe_percents, load_trained, score_wer
from record import write_result

from distill.config import load_config
from distill.pipeline import launch_stage, make_shards
from distill.teacher import load_teacher

MAIN = ("ce", "ce_pseudo", "ce_kl", "ce_kl_feature")
VARIANTS = {
    "ce": ("CE on the labelled clips", ["loss.kl=0", "loss.feature=0", "data.labelled_only=true"]),
    "ce_pseudo": ("CE, the teacher's answers too", ["loss.kl=0", "loss.feature=0"]),
    "ce_kl": ("CE + KL", ["loss.feature=0"]),
    "ce_kl_feature": ("CE + KL + feature", []),
    "kl": ("KL alone", ["loss.ce=0", "loss.feature=0"]),
    "ce_kl_t2": ("CE + KL at temperature 2", ["loss.temperature=2", "loss.feature=0"]),
    "ce_reverse_kl": ("CE + reverse KL", ["loss.kl_kind=reverse_kl", "loss.feature=0"]),
    "ce_jsd": ("CE + JSD, beta 0.5", ["loss.kl_kind=jsd", "loss.kl_parameter=0.5", "loss.feature=0"]),
    "ce_skewed_kl": ("CE + skewed KL, alpha 0.1", ["loss.kl_kind=skewed_kl", "loss.kl_parameter=0.1",
                                                   "loss.feature=0"]),
    "ce_skewed_reverse_kl": ("CE + skewed reverse KL, alpha 0.1",
                             ["loss.kl_kind=skewed_reverse_kl", "loss.kl_parameter=0.1", "loss.feature=0"]),
    "ce_tv": ("CE + total variation", ["loss.kl_kind=total_variation", "loss.feature=0"]),
    "ce_kl_feature_tenth": ("CE + KL + feature, weight 0.1", ["loss.feature=0.1"]),
    "ce_kl_feature_falling": ("CE + KL + feature, falling to 0 by a cosine", ["loss.schedules.feature=cosine 0"]),
    "ce_kl_cosine": ("CE + KL + feature, cosine", ["loss.feature_kind=cosine"]),
    "ce_kl_smooth_l1": ("CE + KL + feature, smooth L1", ["loss.feature_kind=smooth_l1"]),
    "ce_kl_relation": ("CE + KL + feature, relation", ["loss.feature_kind=relation"]),
    "ce_kl_hidden": ("CE + KL + hidden states, projected", ["loss.feature=0", "loss.hidden=1"]),
    "ce_kl_falling": ("CE + KL, falling to 0.1 by a cosine", ["loss.feature=0", "loss.schedules.kl=cosine 0.1"]),
}  # fmt: skip


def train_and_score(variant: str, seed: int, words: list[str]) -> float:
    """The test WER of one student."""
    scratch = load_config(CONFIG).run_folder / "scratch"
    overrides = [f"name=fsdd-{variant}-{seed}", f"seed={seed}", f"teacher.path={scratch}/teacher",
                 f"student.llm={scratch}/student-llm", *VARIANTS[variant][1], *words]  # fmt: skip
    config = load_config(CONFIG, overrides)
    subprocess.run([sys.executable, "-m", "distill.run", CONFIG, *overrides], check=True)
    return score_wer(load_trained(config), config)


def main() -> None:
    """Run every variant and seed, two at a time, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every term, not only the four main students")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    words, variants = args.words, list(VARIANTS) if args.all else list(MAIN)
    config = load_config(CONFIG, words)
    make_shards(config)
    launch_stage("distill.teach", CONFIG, words, None)
    launch_stage("distill.cache", CONFIG, words, None)
    teacher = score_wer(load_teacher(config), config)
    jobs = [(variant, seed) for seed in SEEDS for variant in variants]
    with ThreadPoolExecutor(2) as pool:
        wers = dict(zip(jobs, pool.map(lambda job: train_and_score(*job, words), jobs)))
    students = {variant: [wers[variant, seed] for seed in SEEDS] for variant in variants}
    means = {variant: statistics.mean(values) for variant, values in students.items()}
    gap_closed = (means["ce"] - min(means["ce_kl"], means["ce_kl_feature"])) / (means["ce"] - teacher)
    figures = {"teacher": teacher, "students": students, "gap_closed": gap_closed, "steps": config.train.steps}
    write_result("fsdd", figures, make_table(teacher, students, gap_closed))


def make_table(teacher: float, students: dict[str, list[float]], gap_closed: float) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| model | WER % (mean ± sd, 3 seeds) | each |", "|---|---|---|", f"| teacher | {100 * teacher:.2f} | |"]
    lines += [f"| student, {VARIANTS[variant][0]} | {describe_percents(wers)} |" for variant, wers in students.items()]
    closed = (
        f"The better of the two distilled students closes {gap_closed:.0%} of the gap between CE alone and teacher."
    )
    return "\n".join([*lines, "", closed])


if __name__ == "__main__":
    main()
