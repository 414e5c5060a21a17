"""What models cost, as text: `distill stats model CONFIG … [key=value …]`.

One config: each part of its teacher and student. Several: a line for each teacher and student, as Markdown.
"""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from distill.config import Config
from distill.sizes.costs import (
    Blueprint,
    Part,
    Usage,
    describe_student,
    describe_teacher,
    ear_titles,
    frozen_dtype,
    is_of_given_parts,
    measure,
    measure_sizes,
)
from shards.status import print_json

LLM = ("LLM embeddings", "LLM body", "LLM head", "LoRA", "prefix")
HEADER = ("recipe", "LLM", "ears", "all (M)", "ears (M)", "trained (M)", "all (GB)", "ears (GB)", "LLM (GB)")


def format_table(title: str, parts: list[Part]) -> str:
    """A model's parts and their sum as text."""
    total = Part("all", *(sum(getattr(p, f) for p in parts) for f in ("parameters", "bytes", "flops")))
    rows = [(p.name, f"{p.parameters:,}", f"{p.bytes / 1e6:,.1f}", f"{p.flops / 1e9:,.1f}") for p in (*parts, total)]
    rows.insert(0, (title, "parameters", "MB", "GFLOP a sample"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(f"{r[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(r[1:], widths[1:])) for r in rows)


def make_table(configs: Mapping[str, Config]) -> str:
    """Parameters and gigabytes of each config's teacher and student, as Markdown.

    Args:
        configs: by the path of their file; a teacher that several have is listed once.
    """
    teachers, students = {}, []
    for path, config in configs.items():
        teacher, given = describe_teacher(config)
        if teacher not in teachers:
            teachers[teacher] = make_row("teacher", teacher, measure_sizes(teacher, given))
        if is_of_given_parts(config):
            continue
        student = describe_student(config, teacher)
        students.append(make_row(f"`{Path(path).stem}`", student, measure_sizes(student, given)))
    lines = [HEADER, ("---",) * 3 + ("---:",) * 6, *teachers.values(), *students]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_row(name: str, model: Blueprint, sizes: Mapping[str, tuple[int, float]]) -> tuple[str, ...]:
    """One model's line; `sizes` are the parameters and bytes of its parts. A teacher is not trained."""

    def add(column: int, unit: float, parts: Collection[str]) -> float:
        return sum(sizes[part][column] for part in parts if part in sizes) / unit

    ears = [Path(model.config.whisper).name, *(part for part in ear_titles()[1:] if part in sizes)]
    millions = [f"{add(0, 1e6, parts):,.0f}" for parts in (sizes, ear_titles(), model.trained)]
    gigabytes = [f"{add(1, 1e9, parts):.2f}" for parts in (sizes, ear_titles(), LLM)]
    if name == "teacher":
        millions[-1] = "–"
    llm = Path(model.config.llm).name + (", 4 bits" if model.is_4bit else ", 8 bits" if model.is_8bit else "")
    return name, llm, " + ".join(ears), *millions, *gigabytes


def print_costs(config: Config, usage: Usage) -> None:
    """Print what each part of a config's teacher and student costs."""
    teacher, given = describe_teacher(config)
    print(
        f"one sample: {usage.seconds:g} s of audio, {usage.prompt_tokens} tokens of prompt, {usage.answer_tokens} of "
        f"answer; forward; frozen weights in {str(frozen_dtype(config)).removeprefix('torch.')}"
    )
    print(f"\n{format_table(f'teacher ({teacher.config.llm})', measure(teacher, usage, given))}")
    if not is_of_given_parts(config):
        student = describe_student(config, teacher)
        print(f"\n{format_table(f'student ({student.config.llm})', measure(student, usage, given))}")


def describe_costs(path: str, config: Config, usage: Usage) -> dict:
    """What each part of a config's teacher and student costs, for a script; no student where a teacher is made."""
    teacher, given = describe_teacher(config)
    models = {"teacher": teacher}
    if not is_of_given_parts(config):
        models["student"] = describe_student(config, teacher)
    parts = {
        name: {"llm": model.config.llm, "parts": [asdict(part) for part in measure(model, usage, given)]}
        for name, model in models.items()
    }
    return {"config": path, **parts}


def main(args: argparse.Namespace) -> int:
    """Run `distill stats model`."""
    given = {name: value for name, value in vars(args).items() if name in Usage.__dataclass_fields__}
    if args.json:
        usage = Usage(**given)
        print_json({"usage": asdict(usage), "models": [describe_costs(*one, usage) for one in args.configs.items()]})
        return 0
    if len(args.configs) > 1:
        print(make_table(args.configs))
        return 0
    (config,) = args.configs.values()
    print_costs(config, Usage(**given))
    return 0
