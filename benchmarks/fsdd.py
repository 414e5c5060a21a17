"""What each term of the objective is worth on real spoken digits: WER of the teacher and of students, three seeds, and
how far a student's predictions of the right answers agree with its teacher's.

The teacher learned from every clip; a student sees the text of 2 % of them, and the teacher's answers to the others.
Equal steps and batches; CE alone can only use the labelled clips. Run it where `../shared/data/fsdd` is:
`python benchmarks/fsdd.py [key=value …] [--more VARIANT … --record NAME]`. `--more` adds others to the four main ones,
`--more all` every divergence, feature loss and schedule. Stages and students that were made before are used again.
"""

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from digits.fsdd_students import CONFIG, SEEDS, describe_percents, describe_points, examine, load_trained
from record import write_result

from distill.config import load_config
from distill.evaluation.agreement import Agreement, Predictions, compare_predictions
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import Difference, paired_difference, score
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
    "ce_jsd_own": ("CE + JSD, a quarter of the clips answered by the student",
                   ["loss.kl_kind=jsd", "loss.kl_parameter=0.5", "loss.feature=0", "on_policy.step_share=0.25",
                    "on_policy.temperature=1", "on_policy.max_new_tokens=12"]),
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
    "ce_kl_prefix": ("CE + KL, a prefix of 16 tokens beside LoRA", ["loss.feature=0", "student.prefix_tokens=16"]),
    "ce_kl_falling": ("CE + KL, falling to 0.1 by a cosine", ["loss.feature=0", "loss.schedules.kl=cosine 0.1"]),
}  # fmt: skip


def train_and_examine(
    variant: str, seed: int, words: list[str], teacher: Predictions
) -> tuple[list[Prediction], Agreement]:
    """One student's answers to the test split, and its agreement with the teacher."""
    scratch = load_config(CONFIG).run_folder / "scratch"
    overrides = [f"name=fsdd-{variant}-{seed}", f"seed={seed}", f"teacher.path={scratch}/teacher",
                 f"student.llm={scratch}/student-llm", *VARIANTS[variant][1], *words]  # fmt: skip
    config = load_config(CONFIG, overrides)
    subprocess.run([sys.executable, "-m", "distill.run", CONFIG, *overrides], check=True)
    answers, predictions = examine(load_trained(config), config, teacher)
    return answers, compare_predictions(teacher, predictions)


def main() -> None:
    """Run every variant and seed, two at a time, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--more", nargs="+", default=[], choices=[*VARIANTS, "all"], help="beside the main students")
    parser.add_argument("--record", default="fsdd", help="name of the table (%(default)s)")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    words = args.words
    variants = [name for name in VARIANTS if name in (*MAIN, *args.more) or "all" in args.more]
    config = load_config(CONFIG, words)
    make_shards(config)
    launch_stage("distill.teach", CONFIG, words, None)
    launch_stage("distill.cache", CONFIG, words, None)
    answers, predictions = examine(load_teacher(config), config)
    teacher = error_rate(answers)
    jobs = [(variant, seed) for seed in SEEDS for variant in variants]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(lambda job: train_and_examine(*job, words, predictions), jobs)))
    answered = {variant: [found[variant, seed][0] for seed in SEEDS] for variant in variants}
    students = {variant: [error_rate(answers) for answers in answered[variant]] for variant in variants}
    agreement = {variant: [found[variant, seed][1] for seed in SEEDS] for variant in variants}
    means = {variant: statistics.mean(values) for variant, values in students.items()}
    gap_closed = (means["ce"] - min(means["ce_kl"], means["ce_kl_feature"])) / (means["ce"] - teacher)
    over_answers = {variant: paired_difference(answered[variant], answered["ce_pseudo"], normalize=False)["asr"]
                    for variant in variants if variant not in ("ce", "ce_pseudo")}  # fmt: skip
    figures = {
        "teacher": teacher,
        "students": students,
        "gap_closed": gap_closed,
        "agreement": {v: {"top1": [a.top1 for a in each], "kl": [a.kl for a in each],
                          "ece": [a.student_ece for a in each]} for v, each in agreement.items()},
        "teacher_ece": agreement["ce"][0].teacher_ece,
        "over_answers": {variant: asdict(difference) for variant, difference in over_answers.items()},
        "steps": config.train.steps,
    }  # fmt: skip
    write_result(args.record, figures, make_table(teacher, students, gap_closed, agreement, over_answers))


def error_rate(answers: list[Prediction]) -> float:
    """WER of answers that are digits in words."""
    return score(answers, normalize=False)["asr"].value


def make_table(
    teacher: float,
    students: dict[str, list[float]],
    gap_closed: float,
    agreement: dict[str, list[Agreement]],
    over_answers: dict[str, Difference],
) -> str:
    """Markdown: mean and standard deviation over the seeds, and of differences the interval over clips."""
    ece = agreement["ce"][0].teacher_ece
    lines = [
        "| model | WER % (mean ± sd, 3 seeds) | each | beside the teacher's answers alone, points of WER | "
        "same next token % | KL to teacher, nats | ECE % |",
        "|---|---|---|---|---|---|---|",
        f"| teacher | {100 * teacher:.2f} | | | | | {100 * ece:.2f} |",
    ]
    for variant, wers in students.items():
        means = {name: statistics.mean(getattr(a, name) for a in agreement[variant])
                 for name in ("top1", "kl", "student_ece")}  # fmt: skip
        paired = describe_points(over_answers[variant]) if variant in over_answers else ""
        lines.append(
            f"| student, {VARIANTS[variant][0]} | {describe_percents(wers)} | {paired} | {100 * means['top1']:.2f} | "
            f"{means['kl']:.4f} | {100 * means['student_ece']:.2f} |"
        )
    notes = (
        f"The better of the two distilled students closes {gap_closed:.0%} of the gap between CE alone and teacher.\n\n"
        "In brackets: the 95 % interval of a paired bootstrap over clips, seeds averaged. Token, KL and ECE are of "
        "the next tokens of the right answers."
    )
    return "\n".join([*lines, "", notes])


if __name__ == "__main__":
    main()
