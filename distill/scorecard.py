"""The last stage: teacher and student answer the test split, and what they keep and cost becomes the scorecard.

Run with `distill evaluate CONFIG [key=value …]`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from distill.card import ModelFigures, Scorecard, print_scorecard, write_scorecard
from distill.config import Config
from distill.evaluate import Cost, answer, measure_cost
from distill.metrics import Prediction, retained_quality, score
from distill.ranks import resolve_precision
from distill.report import read_metrics, write_report
from distill.run import student_llm
from distill.runlog import METRICS
from distill.teacher import load_teacher, teacher_path
from shards.stream import ShardStream
from students.student import load_student
from teachers.salmonn import Salmonn
from teachers.saving import write_atomically


def evaluate_run(config: Config) -> Scorecard:
    """Score both models on the test split, print the scorecard, and write it and every answer into the run's folder."""
    folder = config.run_folder / "student"
    student_name = f"student ({Path(student_llm(config)).name}, {config.student.quantization})"
    loaders = {
        "teacher": lambda: load_teacher(config),
        "student": lambda: load_student(folder, dtype=resolve_precision(config.precision)),
    }
    answers, costs = {}, {}
    for name, load in loaders.items():  # one after the other: a peak of memory is to be one model's
        answers[name], costs[name] = examine(load, name, config)
    write_answers(answers, config.run_folder / "answers.jsonl")
    card = Scorecard(
        name=config.name,
        teacher=figures("teacher", costs["teacher"], answers["teacher"], teacher_path(config), config),
        student=figures(student_name, costs["student"], answers["student"], folder, config),
        retained=retained_quality(answers["student"], answers["teacher"], normalise=config.eval.normalise),
        training=training_figures(config),
    )
    write_scorecard(card, config.run_folder)
    print_scorecard(card)
    print(f"report: {write_report(config.run_folder)}")
    return card


def examine(load: Callable[[], Salmonn], name: str, config: Config) -> tuple[list[Prediction], Cost]:
    """Load a model, let it answer the test split, measure what it costs, and let it go."""
    model = load().to("cuda" if torch.cuda.is_available() else "cpu")
    answers = answer(model, config.shards("test"), config.eval, title=name)
    stream = ShardStream(config.shards("test"), batch_size=1, shuffle=False, epochs=1)
    return answers, measure_cost(model, next(iter(stream))[0])


def figures(name: str, cost: Cost, answers: list[Prediction], path: Path, config: Config) -> ModelFigures:
    """One model's column."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]  # a Qwen2-Audio comes in several
    return ModelFigures(
        name=name,
        num_parameters=cost.num_parameters,
        scores=score(answers, normalise=config.eval.normalise),
        weights_mb=cost.weight_bytes / 1e6,
        peak_mb=None if cost.peak_bytes is None else cost.peak_bytes / 1e6,
        checkpoint_mb=sum(file.stat().st_size for file in files) / 1e6,
        first_token_ms=cost.first_token_ms,
        next_token_ms=cost.next_token_ms,
    )


def training_figures(config: Config) -> dict[str, float | str]:
    """How the student was trained, in a few figures."""
    records, _ = read_metrics(config.run_folder / METRICS)
    seconds, audio = (sum(r[name] for r in records if name in r) for name in ("seconds", "audio_seconds"))
    return {
        "steps": len(records),
        "minutes": round(seconds / 60, 2),
        "hours of audio": round(audio / 3600, 2),
        "targets": "online" if config.teacher.online else f"cached, {config.cache.codec} {config.cache.k}",
    }


def write_answers(answers: dict[str, list[Prediction]], path: Path) -> None:
    """Every answer beside its references, one JSON line a clip and model."""
    lines = [
        json.dumps({"model": name, "key": p.key, "task": p.task, "references": p.references, "answer": p.hypothesis})
        for name, predictions in answers.items()
        for p in predictions
    ]
    write_atomically(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


def main(args: argparse.Namespace) -> int:
    """Run `distill evaluate`."""
    evaluate_run(args.config)
    return 0
