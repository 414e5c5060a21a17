"""The last stage: teacher and student answer the test split, and what they keep and cost becomes the scorecard.

Run with `distill evaluate CONFIG [key=value …]`; with `--efficiency` it measures what answering costs instead.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from distill.config import SPLITS, Config
from distill.config.places import check_student
from distill.evaluation.agreement import Predictions, compare_predictions, predict_answers
from distill.evaluation.answer_cache import Examined, find_answer_cache, read_answer_cache, write_answer_cache
from distill.evaluation.answering import Cost, answer, clock_tokens, measure_cost
from distill.evaluation.efficiency import SECONDS, TOKENS, make_rows, measure_all
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import retained_quality, score
from distill.evaluation.report import read_metrics, write_report
from distill.evaluation.scorecard import (
    SCORECARD,
    ModelFigures,
    Scorecard,
    print_scorecard,
    read_scorecard,
    write_scorecard,
)
from distill.student import student_llm
from distill.teacher import load_teacher, teacher_path
from distill.training.monitoring.runlog import METRICS
from distill.training.ranks import resolve_precision
from distill.training.runlock import RunLock
from shards.files.write import write_atomically
from shards.sample import Sample
from shards.status import print_json, print_status
from shards.streaming.catalog import check_channels
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from students.answering import AS_TRAINED
from students.device.folder import MANIFEST
from students.student import load_student
from teachers.files.loading import CONFIG
from teachers.fourbit import packed_for_answers
from teachers.salmonn import Salmonn

DEVICE = "device"  # in a run's folder: its student, exported for devices


def evaluate_run(config: Config, *, as_json: bool = False) -> Scorecard:
    """Score both models on the test split, print the scorecard, and write it and every answer into the run's folder."""
    folder = check_student(config)
    check_channels(config.shards(split) for split in SPLITS)
    with RunLock(config.run_folder):
        return score_models(config, folder, as_json=as_json)


def score_models(config: Config, folder: Path, *, as_json: bool) -> Scorecard:
    """As `evaluate_run`, in a folder that nobody else writes into, of the student saved in `folder`."""
    ears = config.student.ears_quantization
    narrow = f", ears {ears}" if ears != "none" else ""
    student_name = f"student ({Path(student_llm(config)).name}, {config.student.quantization}{narrow})"
    teacher = evaluate_teacher(config)  # one model after the other: a peak of memory is to be one model's
    loader = partial(load_student, folder, dtype=resolve_precision(config.precision), for_inference=is_fast(config))
    student = evaluate_model(loader, "student", config, teacher.predictions)
    answers, device = {"teacher": teacher.answers, "student": student.answers}, None
    if (config.run_folder / DEVICE / MANIFEST).is_file():
        answers["device"], device = examine_device(config, student.cost.num_parameters)
    write_answers(answers, config.run_folder / "answers.jsonl")
    card = Scorecard(
        name=config.name,
        teacher=figures(name_teacher(config), teacher.cost, teacher.answers, teacher_path(config), config),
        student=figures(student_name, student.cost, student.answers, folder, config),
        retained=retained_quality(student.answers, teacher.answers, normalize=config.eval.normalize),
        agreement=compare_predictions(teacher.predictions, student.predictions),
        training=training_figures(config),
        device=device,
    )
    write_scorecard(card, config.run_folder)
    report = write_report(config.run_folder)
    if as_json:
        print_json(asdict(card))
    else:
        print_scorecard(card)
        print(f"report: {report}")
    return card


def name_teacher(config: Config) -> str:
    """As the scorecard calls it."""
    bits = config.teacher.quantization
    return "teacher" if bits == "none" else f"teacher ({bits})"


def evaluate_teacher(config: Config) -> Examined:
    """What the teacher answers, predicts and costs, kept of an evaluation of another student, or made now and kept."""
    path = find_answer_cache(config)
    kept = read_answer_cache(path)
    if kept is not None:
        print_status(f"teacher: its answers are in {path}, used again")
        return kept
    examined = evaluate_model(lambda: load_teacher(config), "teacher", config)
    write_answer_cache(path, examined)
    return examined


def evaluate_model(
    load: Callable[[], Salmonn], name: str, config: Config, teacher: Predictions | None = None
) -> Examined:
    """Load a model, let it answer and predict the test split, measure what it costs, and let it go.

    Args:
        load: gives the model.
        name: the name of its progress lines.
        config: the configuration of the run.
        teacher: what its teacher predicted, for a student.
    """
    model = load().to("cuda" if torch.cuda.is_available() else "cpu")
    if model.only_answers not in ("", AS_TRAINED):
        print_status(f"{name} answers with {model.only_answers}; precision=float32 has it as it was trained")
    model.set_eval_prompts(config.eval.prompts)
    with packed_for_answers(model.llm) if is_fast(config) else nullcontext():
        answers = answer(model, config.shards("test"), config.eval, title=name)
        predictions = predict_answers(model, config.shards("test"), config.eval, teacher, title=f"{name} predicts")
        return Examined(answers, measure_cost(model, find_readable(config)), predictions)


def examine_device(config: Config, num_parameters: int) -> tuple[list[Prediction], ModelFigures]:
    """What the run's folder for devices answers and costs."""
    from students.device.student import DeviceStudent  # OpenVINO is an extra

    folder = config.run_folder / DEVICE
    student = DeviceStudent(folder)
    answers = answer(student, config.shards("test"), config.eval, title="device")
    first, following = clock_tokens(student, find_readable(config))
    size = sum(student.device.sizes.values())
    return answers, ModelFigures(
        name=f"device ({folder}: {', '.join(f'{key} {value}' for key, value in student.device.precision.items())})",
        num_parameters=num_parameters,
        scores=score(answers, normalize=config.eval.normalize),
        checkpoint_mb=size,
        first_token_ms=first,
        next_token_ms=following,
    )


def is_fast(config: Config) -> bool:
    """Whether models answer as fast as this processor can, as a user's do, and less exactly (`students.answering`)."""
    return config.precision != "float32" and not torch.cuda.is_available()


def find_readable(config: Config) -> Sample:
    """The first clip of the test split that can be read.

    Raises:
        ValueError: there is none.
    """
    stream = ShardStream(config.shards("test"), Order(batch_size=1, shuffle=False, epochs=1))
    readable = next((samples[0] for samples in stream if samples), None)  # one that cannot be read is left out
    if readable is None:
        raise ValueError(
            f"{config.shards('test')} has no clip that can be read, but a model is to answer some; pack it."
        )
    return readable


def figures(name: str, cost: Cost, answers: list[Prediction], path: Path, config: Config) -> ModelFigures:
    """One model's column."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]  # a Qwen2-Audio comes in several
    return ModelFigures(
        name=name,
        num_parameters=cost.num_parameters,
        scores=score(answers, normalize=config.eval.normalize),
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
    write_atomically(path, "\n".join(lines) + "\n")


def measure_efficiency(config: Config, exports: Sequence[Path], *, as_json: bool) -> None:
    """Measure what answering costs of teacher, student and exports, print it, and write it into the run's report.

    Raises:
        FileNotFoundError: the run has no student, or a folder is no export.
    """
    places = list_models(config, exports)
    with RunLock(config.run_folder):
        found = measure_all(config, places, known_wers(config))
        if (config.run_folder / METRICS).is_file():
            write_report(config.run_folder)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    table = Table(title=f"Answering about {SECONDS:g} s of audio: {TOKENS} tokens, batch 1", title_justify="left")
    heading, *rows = make_rows(found)
    for name in heading:
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def list_models(config: Config, exports: Sequence[Path]) -> dict[str, Path]:
    """What there is to measure of a run, by name: teacher, student, the folder that the pipeline exported, and others.

    Raises:
        FileNotFoundError: the run has no student, or a folder is no export.
    """
    for folder in exports:
        if not any((folder / name).is_file() for name in (MANIFEST, CONFIG)):
            raise FileNotFoundError(f"--export is {folder}, but that is no folder of `distill export`; name one.")
    own = config.run_folder / DEVICE
    folders = [*([own] if (own / MANIFEST).is_file() else []), *exports]
    named = {"teacher": Path(teacher_path(config)), "student": check_student(config)}
    return named | {str(folder): folder for folder in folders}


def known_wers(config: Config) -> dict[str, float]:
    """Word error rates of the run's scorecard by the names that `measure_all` has for models."""
    if not (config.run_folder / SCORECARD).is_file():
        return {}
    card = read_scorecard(config.run_folder)
    models = {"teacher": card.teacher, "student": card.student, str(config.run_folder / DEVICE): card.device}
    found = {}
    for name, model in models.items():
        rates = [score.value for score in model.scores.values() if score.metric == "wer"] if model else []
        if rates:
            found[name] = sum(rates) / len(rates)
    return found


def main(args: argparse.Namespace) -> int:
    """Run `distill evaluate`."""
    if args.efficiency:
        measure_efficiency(args.config, args.export, as_json=args.json)
    else:
        evaluate_run(args.config, as_json=args.json)
    return 0
