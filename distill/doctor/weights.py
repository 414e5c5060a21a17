"""What `distill doctor` examines of the frozen weights: that they train on after an answer, and hear right."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.doctor.objective import Case, Fault, distance
from students.quantize import measure_share

REPEATED = 1e-4  # relative difference of a gradient computed twice: sums in another order on a GPU, none on a CPU
CONVOLVED = 2e-2  # relative error of a convolution that 16 bits explain


def check_answer(case: Case) -> str:
    """An answer leaves the student's gradient as it was."""
    before = case.gradients(case.compute(case.whole, case.weights))
    case.student.generate(case.samples[:2], max_new_tokens=2)
    after = case.gradients(case.compute(case.whole, case.weights))
    error = distance(after, before)
    if not error <= REPEATED:
        raise Fault(
            f"the gradient after an answer differs by {error:.1%} from that before, but must be the same; find what an "
            f"answer changes in the LLM, as bitsandbytes does on AVX512-BF16."
        )
    return f"the gradient is off by {error:.0e}"


def check_share(case: Case) -> str:
    """How much of the LLM is truly in 4 bits."""
    return str(measure_share(case.student.llm))


@torch.no_grad()
def check_convolutions(case: Case) -> str:
    """Every convolution of the ears, in the precision of the run and on a real clip, is the one in 64 bits."""
    worst, at = 0.0, "none"
    for name, convolution, input in hear_convolutions(case):
        own = copy.deepcopy(convolution).to(case.dtype)
        input = input.to(case.dtype)
        expected = copy.deepcopy(own).double()(input.double())
        error = float((own(input).double() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= worst:
            worst, at = error, name
    precision = str(case.dtype).removeprefix("torch.")
    if not worst <= CONVOLVED:
        raise Fault(
            f"{at} is off by {worst:.1%} in {precision}, but {CONVOLVED:.0%} is what rounding explains; run with "
            f"precision=float32, and report the device."
        )
    return f"the worst, {at}, is off by {worst:.0e} in {precision}"


def hear_convolutions(case: Case) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Each convolution of the student's ears with the input that the clips give it."""
    named = {f"{ear}.{name}": module for ear in ("whisper", "second") for name, module in ears(case, ear)}
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.setdefault(m, args[0])) for m in named.values()]
    batch = case.whole.batch
    case.student.frames(batch.waveforms_BN, batch.num_samples_B, batch.masks_B)
    for hook in hooks:
        hook.remove()
    yield from ((name, module, inputs[module]) for name, module in named.items())


def ears(case: Case, ear: str) -> list[tuple[str, nn.Module]]:
    """The convolutions of one ear, by name."""
    module = getattr(case.student, ear)
    return [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)] if module else []
