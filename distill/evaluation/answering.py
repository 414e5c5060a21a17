"""Answers of a model to a split, counted: WER, exact match and caption scores by task, and what an answer costs.

Knows how to ask a model and whom to ask for scores; the scores themselves are in `metrics/`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.config import EvalConfig
from distill.evaluation.clips import find_clips
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import NO_METRICS, OwnMetric, TaskScore, score
from distill.training.monitoring.progress import Progress
from distill.training.ranks import gather
from shards.sample import Sample
from teachers.fourbit import count_bytes
from teachers.salmonn import Salmonn
from teachers.words.ending import has_ended


def answer(model: Salmonn, folder: str | Path, options: EvalConfig, accelerator: Accelerator | None = None,
           title: str = "evaluate", on_batch: Callable[[], None] = lambda: None) -> list[Prediction]:  # fmt: skip
    """Let the model answer every labelled clip of a folder of shards once, however many texts it has (`clips.py`).

    Every rank takes its part and gets all.

    Args:
        model: a SALMONN, teacher or student, or a `DeviceStudent`.
        folder: the split's shards.
        options: batch size, length and beams.
        accelerator: the processes; None: this one alone.
        title: the title of the progress line.
        on_batch: is called after each batch.
    """
    rank, size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    clips = find_clips(folder)
    stream = clips.stream(folder, options.batch_size, rank, size)
    predictions = []
    with Progress(title, stream.num_samples, accelerator=accelerator, unit="clips") as progress:
        for samples in stream:
            answered = predict(model, samples, options) if samples else []
            predictions += [replace(p, references=clips.references[p.key]) for p in answered]
            progress.advance(units=len(samples) * size)
            on_batch()
    return predictions if accelerator is None else gather(accelerator, predictions)


def predict(model: Salmonn, samples: list[Sample], options: EvalConfig) -> list[Prediction]:
    """One batch of answers beside their references."""
    rows = model.answer_ids(
        samples,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        repetition_penalty=options.repetition_penalty,
        length_penalty=options.length_penalty,
    )
    return [
        Prediction(
            key=sample.key,
            task=sample.task,
            source=sample.source,
            references=(sample.text,),
            hypothesis=model.read(row),
            ended=has_ended(row, model.ends),
        )
        for sample, row in zip(samples, rows)
    ]


def evaluate(model: Salmonn, folder: str | Path, options: EvalConfig, accelerator: Accelerator | None = None,
             title: str = "evaluate", on_batch: Callable[[], None] = lambda: None,
             own: Mapping[str, OwnMetric] = NO_METRICS) -> dict[str, TaskScore]:  # fmt: skip
    """Scores by task of a model on a split, whose clips are each answered once; `own` are metrics of one's own."""
    predictions = answer(model, folder, options, accelerator, title, on_batch)
    return score(predictions, normalize=options.normalize, own=own)


@dataclass(frozen=True)
class Cost:
    """What a model needs. Latency: one clip, greedy, median over runs."""

    num_parameters: int
    weight_bytes: int
    first_token_ms: float
    next_token_ms: float
    peak_bytes: int | None  # GPU memory at its peak; None on a CPU


@torch.no_grad()
def measure_cost(model: Salmonn, sample: Sample, runs: int = 5) -> Cost:
    """Memory of the weights and time to answer one clip, measured."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first, following = clock_tokens(model, sample, runs)
    return Cost(
        num_parameters=count_parameters(model),
        weight_bytes=count_bytes(model),
        first_token_ms=first,
        next_token_ms=following,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def clock_tokens(model: Salmonn, sample: Sample, runs: int = 5) -> tuple[float, float]:
    """Milliseconds to the first token of a clip's answer and to each one after it, medians over runs."""

    def clock(num_tokens: int) -> float:
        began = time.perf_counter()
        model.answer_ids([sample], max_new_tokens=num_tokens, min_new_tokens=num_tokens)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    clock(2)
    first = sorted(clock(1) for _ in range(runs))[runs // 2]
    many = sorted(clock(9) for _ in range(runs))[runs // 2]
    return first, max(0.0, (many - first) / 8)


def count_parameters(model: torch.nn.Module) -> int:
    """Weights, 4-bit ones counted by their number and not by their bytes."""
    return sum(
        p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel()
        for p in model.parameters()
    )
