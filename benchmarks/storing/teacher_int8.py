"""What a teacher's LLM in int8 (`teacher.quantization`) costs of what it says, beside the same one whole.

`python benchmarks/storing/teacher_int8.py CONFIG [key=value …]`: the config's teacher answers and predicts its test
split twice, in one process.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

from digits.fsdd_students import examine
from record import write_result

from distill.config import load_config
from distill.config.recipes import find_config
from distill.evaluation.agreement import compare_predictions
from distill.evaluation.metrics.scores import score
from distill.teacher import load_teacher
from teachers.fourbit import count_bytes


def main() -> None:
    """Ask both and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config, whole, rows = load_config(find_config(args.config), args.words), None, {}
    for bits in ("none", "int8"):
        teacher = load_teacher(replace(config, teacher=replace(config.teacher, quantization=bits)))
        answers, predictions = examine(teacher, config, whole)
        agreement = compare_predictions(whole, predictions) if whole else None
        rows[bits] = {
            "gb": count_bytes(teacher.llm) / 1e9,
            "scores": {task: found.value for task, found in score(answers, normalize=config.eval.normalize).items()},
            "same_next_token": agreement.top1 if agreement else 1.0,
            "kl": agreement.kl if agreement else 0.0,
        }
        whole = whole or predictions
    tasks = list(rows["none"]["scores"])
    lines = [f"| the teacher's LLM | GB | {' | '.join(tasks)} | same next token % | KL, nats a token |",
             "|---|" + "---:|" * (len(tasks) + 3)]  # fmt: skip
    for bits, row in rows.items():
        scores = " | ".join(f"{row['scores'][task]:.4f}" for task in tasks)
        title = "whole" if bits == "none" else bits
        lines.append(f"| {title} | {row['gb']:.3f} | {scores} | {100 * row['same_next_token']:.2f} | {row['kl']:.1e} |")
    write_result("teacher_int8", rows, "\n".join(lines))


if __name__ == "__main__":
    main()
