"""The last check of `distill doctor`: what one of the run's own micro-batches takes at its peak.

Unlike the others it runs in the precision of the run, and it changes the case: the frozen weights of the student's LLM
are cast to that precision, and a teacher that training does without is freed.
"""

import os
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from distill.doctor.objective import Case, Fault
from shards.sample import Sample

FEW = 4  # clips that say how long a whole micro-batch takes
MOST_SECONDS = 20.0  # that it may take on a CPU; beyond, its memory is extrapolated from that of a few


def check_memory(case: Case) -> str:
    """The peak of the largest micro-batch at hand, with the optimizer's states, fits the device."""
    make_as_in_training_(case)
    states = 8 * sum(p.numel() for p in case.trainable.values())  # AdamW's two moments, float32
    samples = sorted(case.micro_batch, key=lambda sample: -len(sample.waveform_N))
    few, note = samples[:FEW], ""
    try:
        base, peak, seconds = measure(case, few)
        seconds *= len(samples) / len(few)
        if len(few) < len(samples) and (is_on_gpu(case) or seconds <= MOST_SECONDS):
            _, peak, _ = measure(case, samples)
        elif len(few) < len(samples):
            peak = base + (peak - base) * len(samples) / len(few)
            note = f" (extrapolated from {len(few)}: all of them would take {seconds:.0f} s here)"
    except torch.OutOfMemoryError as error:
        raise Fault(
            f"memory does not hold {len(samples)} clips a micro-batch ({str(error).splitlines()[0]}), but it must; "
            f"lower train.micro_batch_size, the step stays the same."
        ) from error
    total, peak = device_bytes(case), peak + states
    precision = str(case.dtype).removeprefix("torch.")
    text = f"{peak / 1e9:.2f} GB at {len(samples)} clips a micro-batch in {precision}{note}, of {total / 1e9:.1f} GB"
    if peak > 0.95 * total:
        raise Fault(f"memory is {text}, but more is needed; lower train.micro_batch_size, the step stays the same.")
    return text


def measure(case: Case, samples: Sequence[Sample]) -> tuple[int, int, float]:
    """Bytes before a micro-batch and at its peak, and its seconds."""
    began, base = time.monotonic(), reset_peak(case)
    m = case.collate(list(samples))
    case.compute(m, case.weights).backward()
    case.objective.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated(case.student.device) if is_on_gpu(case) else peak_resident()
    return base, peak, time.monotonic() - began


def make_as_in_training_(case: Case) -> None:
    """Give student and products the precision of the run, in place, and free an idle teacher."""
    case.objective.dtype = case.collate.dtype = case.dtype
    for module in case.student.llm.modules():
        if hasattr(module, "compute_dtype"):  # a 4-bit layer's
            module.compute_dtype = case.dtype
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(case.dtype)
    case.forget_teacher()


def is_on_gpu(case: Case) -> bool:
    """Whether the student is on a GPU."""
    return case.student.device.type == "cuda"


def device_bytes(case: Case) -> int:
    """What the device has."""
    if is_on_gpu(case):
        return torch.cuda.get_device_properties(case.student.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def reset_peak(case: Case) -> int:
    """Begin to look for a new peak; returns the bytes in use. Where the system keeps the old peak, that is the base."""
    if is_on_gpu(case):
        torch.cuda.reset_peak_memory_stats(case.student.device)
        return torch.cuda.memory_allocated(case.student.device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def peak_resident() -> int:
    """Bytes of this process in memory, at their peak."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
