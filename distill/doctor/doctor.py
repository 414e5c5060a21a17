"""Prove a run right before it costs GPU hours: `distill doctor CONFIG [key=value …]`, under a minute.

A few clips of the config's own data go through its own student, teacher and cache, in float32; the memory of a whole
micro-batch is measured in the run's precision. Each line says pass, or what is wrong and what to do; the exit code is 1
when a line fails.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch

from distill.config import Config, OnPolicyConfig, TrainConfig
from distill.doctor.data import (
    check_agreement,
    check_alignment,
    check_cache,
    check_end,
    check_padding,
    check_rows,
)
from distill.doctor.memory import check_memory
from distill.doctor.objective import (
    Case,
    Fault,
    check_differences,
    check_gradients,
    check_plain,
    check_positions,
    check_splits,
    check_zero,
)
from distill.doctor.weights import check_answer, check_convolutions, check_share
from distill.objective.crossteacher import match_vocab
from distill.objective.module import Objective
from distill.objective.schedule import build_schedules
from distill.objective.terms import TERMS
from distill.objective.terms.needs import check_needs, check_student, held_by_cache
from distill.objective.weighing import active_terms
from distill.run import open_training_stream, wrap_teacher
from distill.student import make_student
from distill.teacher import load_teacher
from distill.training.microbatch import Collator, check_frames, split
from distill.training.ranks import build_accelerator, resolve_precision, say
from shards.sample import Sample
from shards.status import print_json, print_status

CHECKS: dict[str, Callable[[Case], str]] = {
    "rows": check_rows,
    "padding": check_padding,
    "end token": check_end,
    "cache": check_cache,
    "first choice": check_agreement,
    "alignment": check_alignment,
    "fused = plain": check_plain,
    "finite differences": check_differences,
    "positions": check_positions,
    "splits": check_splits,
    "KL(teacher‖teacher)": check_zero,
    "gradients": check_gradients,
    "after an answer": check_answer,
    "4 bits": check_share,
    "convolutions": check_convolutions,
    "memory": check_memory,
}
NUM_BATCHES = 4  # of the run that are read
OF_TARGETS = ("cache", "first choice", "KL(teacher‖teacher)")


def run_checks(case: Case, names: Iterable[str] = tuple(CHECKS)) -> Iterator[tuple[str, bool, str]]:
    """Run the checks that apply: the name, whether it passes, and what was found."""
    for name in names:
        if name == "alignment" and not case.collate.teacher.is_crossed:
            continue
        if name in OF_TARGETS and case.whole.targets is None:
            continue
        try:
            yield name, True, CHECKS[name](case)
        except (Fault, ValueError, RuntimeError, IndexError) as error:
            # a broken objective can also fall over; the other checks still say where
            yield name, False, str(error).splitlines()[0]
        if name == "cache":
            case.forget_teacher()  # no check after this one asks it


def build_case(config: Config) -> Case:
    """The config's own student, teacher and first samples, ready to be examined.

    Raises:
        ValueError, OSError: as a run of this config; a cache of another teacher among them.
    """
    accelerator = build_accelerator()
    model = load_teacher(config)
    student = make_student(config, model, torch.float32, lambda text: say(accelerator, text)).to(accelerator.device)
    randomize_lora_(student)
    own = wrap_teacher(config, model.to(accelerator.device))
    loss, schedules = config.loss, build_schedules(TERMS, config.loss, config.train.steps)
    check_frames(own.header, student)
    teacher, vocab_size = match_vocab(own, student, loss.cross_tokenizer, loss.temperature)
    objective = Objective(
        student,
        loss,
        torch.float32,
        active_terms(TERMS, schedules, teacher),
        vocab_size=vocab_size,
        widths=teacher.widths,
        seed=config.seed,
    ).eval()
    check_student(objective.terms, student)
    if own.header is not None:
        check_needs(objective.terms, loss, held_by_cache(own.header.identity))
    collate = Collator(teacher, student, accelerator.device, torch.float32, loss.task_weights)
    # the checks compare with labels, and run the ears on clips whose frames are cached
    labelled = replace(config, on_policy=OnPolicyConfig(), cache=replace(config.cache, frames="none"))
    stream = open_training_stream(labelled, accelerator, own, student)
    # the list is of the run that will be, whose folder may not be there yet
    stream.limits = replace(stream.limits, bad_samples=None)
    batches = list(islice(iter(stream), NUM_BATCHES))
    samples = choose(batches)
    weights = {name: schedule.weight(config.train.steps // 2) for name, schedule in schedules.items()}
    dtype = resolve_precision(config.precision)
    return Case(objective, collate, samples, collate(samples), weights, model, largest(batches, config.train), dtype)


def choose(batches: Sequence[list[Sample]], most: int = 4) -> list[Sample]:
    """A few samples whose answers differ in length, so that no mean of means can hide."""
    seen = {sample.key: sample for batch in batches for sample in batch}
    ordered = sorted(seen.values(), key=lambda sample: len(sample.text or ""))
    count = min(most, len(ordered))
    return [ordered[round(i * (len(ordered) - 1) / max(count - 1, 1))] for i in range(count)]


def largest(batches: Sequence[list[Sample]], options: TrainConfig) -> list[Sample]:
    """The micro-batch with the most audio, padding included, cut as one process's training cuts it."""
    parts = math.ceil(options.batch_size / options.micro_batch_size)
    cut = [part for batch in batches for part in split(batch, parts) if part]
    return list(max(cut, key=lambda part: len(part) * max(len(sample.waveform_N) for sample in part)))


def randomize_lora_(student) -> None:
    """Give LoRA's B matrices small random numbers, in place: at zero they hide the gradient of A."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)


def doctor(config: Config, *, as_json: bool = False) -> int:
    """Examine a config and print a line for each check, or one JSON object of all; returns the exit code."""
    began, found = time.monotonic(), []

    def report(name: str, is_right: bool, text: str) -> None:
        found.append({"name": name, "passed": is_right, "text": text})
        if not as_json:
            print(f"{'pass' if is_right else 'FAIL'}  {name:<20} {text}", flush=True)

    try:
        case = build_case(config)
    except (ValueError, OSError) as error:
        report("set up", False, str(error))
    else:
        report("set up", True, f"student, teacher, targets and {len(case.samples)} clips fit together")
        for name, is_right, text in run_checks(case):
            report(name, is_right, text)
        failed = sum(not check["passed"] for check in found)
        print_status(f"{failed or 'no'} fault{'s' * (failed != 1)} in {time.monotonic() - began:.0f} s")
    is_right = all(check["passed"] for check in found)
    if as_json:
        print_json({"passed": is_right, "checks": found})
    return 0 if is_right else 1


def main(args: argparse.Namespace) -> int:
    """Run `distill doctor`."""
    return doctor(args.config, as_json=args.json)
