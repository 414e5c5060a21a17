"""The processes of a run: one, or several under DDP, DeepSpeed ZeRO or FSDP2; on GPUs or CPUs. Knows no model."""

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import gather_object as gather_list
from torch import nn

from distill.training.stopping import handle_signals
from shards.status import print_status

# DeepSpeed looks for an accelerator when it is imported; without a GPU it must be told
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that CUDA_HOME is of no use here


USES_FSDP = "ACCELERATE_USE_FSDP"  # what the launch file of an FSDP says, as the launcher's variable
PARALLELISM = "a parallelism_config"
OTHER_SPLITS = {  # what else a launch file of Accelerate may say, by the variable that it becomes
    USES_FSDP: "FSDP 1",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": PARALLELISM,
}


def splits_frozen() -> bool:
    """Whether the launch is FSDP2's, under which frozen weights are split, see `distill.training.sharding`."""
    return says_yes(USES_FSDP) and os.environ.get("FSDP_VERSION") == "2"


def says_yes(variable: str) -> bool:
    """Whether a variable of the launcher is set."""
    return os.environ.get(variable, "").lower() == "true"


def refuse_other_splits(accelerator: Accelerator | None = None) -> None:
    """Refuse to split a model in a way of which no checkpoint, average or clipping here knows.

    Args:
        accelerator: a user's own, which may say so too; None: what the launch says alone.

    Raises:
        ValueError: naming the way and the files that can be had.
    """
    splits = [split for name, split in OTHER_SPLITS.items() if says_yes(name)]
    if splits_frozen():
        splits.remove(OTHER_SPLITS[USES_FSDP])
    if accelerator is not None and getattr(accelerator.state, "fsdp_plugin", None) is not None:
        splits.append("FSDP")  # accelerate's own, of what is trained too
    if accelerator is not None and accelerator.parallelism_config is not None:  # Megatron-LM leaves its variable
        splits.append(PARALLELISM)
    if splits:
        raise ValueError(
            f"this launch splits models by {splits[0]}, but runs are split by DDP, DeepSpeed ZeRO 1 to 3 or FSDP 2 "
            f"alone; launch with a file of configs/accelerate."
        )


def build_accelerator(*, takes_deepspeed: bool = True) -> Accelerator:
    """The accelerator of this process, from the environment that `accelerate launch` or torchrun sets.

    Args:
        takes_deepspeed: False: DDP where the launcher says DeepSpeed, for a model so small that to split its optimizer
            only takes time.

    Products run in the precision that the run's own autocast says, so accelerate's stays "no": trainable tensors and
    optimizer states are float32 under DDP and ZeRO alike.

    Raises:
        ValueError: the launch splits models in another way.
    """
    refuse_other_splits()
    if not takes_deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    has_others = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not torch.cuda.is_available():
        if has_others:
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
            os.environ["ACCELERATE_USE_CPU"] = "true"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        forbid_compiling()
    # it waits for them in C, where no handler of Python's runs, and one may be stopped already; nothing has begun yet
    with handle_signals(signal.SIG_DFL) if has_others else nullcontext(), hidden(USES_FSDP):
        accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    if is_deepspeed(accelerator):
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # under ZeRO-3 transformers would load empty weights, also the teacher's
    return accelerator


@contextmanager
def hidden(variable: str) -> Iterator[None]:
    """A block in which a variable of the launcher is not there: accelerate would split what is trained too."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def forbid_compiling() -> None:
    """Let CPU ranks exchange through gloo under DeepSpeed too, as they do under DDP.

    It would compile an exchange of its own at the first start, for minutes, where it finds a compiler, and use it
    where the processor has AVX2. Source: `build_shm_op` in deepspeed/comm/torch.py.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # what can be compiled here; nothing else of DeepSpeed asks


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains."""
    return accelerator.state.deepspeed_plugin is not None


def unwrap(model: nn.Module) -> nn.Module:
    """The module in DDP's or DeepSpeed's wrapping; accelerate's own `unwrap_model` imports DeepSpeed to look for it."""
    return getattr(model, "module", model)


def sum_over_ranks(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    """Each value summed over all ranks, in float64; every rank must call it, with the same names."""
    if accelerator.num_processes == 1:
        return values
    device = accelerator.device if accelerator.device.type == "cuda" else "cpu"
    names = sorted(values)
    summed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(summed)
    found = dict(zip(names, summed.tolist()))
    return {name: found[name] for name in values}


def average_gradients_over_ranks_(accelerator: Accelerator | None, parameters: Sequence[nn.Parameter]) -> None:
    """Give every rank the mean of its gradients and the others', in place and in one exchange; none counts as zero."""
    if accelerator is None or accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).to(accelerator.device)
    parts = accelerator.reduce(flat, "mean").split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts):
        parameter.grad = part.view_as(parameter).to(parameter.device)


def gather(accelerator: Accelerator, values: list) -> list:
    """Every rank's list, joined in the order of the ranks."""
    return values if accelerator.num_processes == 1 else gather_list(values)


def say(accelerator: Accelerator | None, text: str) -> None:
    """A line for the user, from the main process alone."""
    if accelerator is None or accelerator.is_main_process:
        print_status(text)


def resolve_precision(precision: str) -> torch.dtype:
    """The type of the products: "auto" is bf16 on a GPU that has it, else fp16, and float32, the fastest, on a CPU."""
    if precision == "auto":
        precision = ("bf16" if has_bf16() else "fp16") if torch.cuda.is_available() else "float32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[precision]


def has_bf16() -> bool:
    """Whether the GPU multiplies bfloat16 itself, as those from Ampere on do; V100 and T4 only emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
