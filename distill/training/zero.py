"""DeepSpeed's settings, and what ZeRO-3 needs beside them: it splits every parameter that it finds over the ranks.

Only trainable tensors are given to it. Frozen ones stay whole on every rank: in 4 bits a piece of a weight is not a
weight, and the head is read row by row, outside its own layer. Where FSDP2 splits instead, `sharding` does it. Knows
DeepSpeed, nothing of models.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from distill.config import TrainConfig
from distill.training.ranks import is_deepspeed, splits_frozen
from distill.training.sharding import unshard_, whole_blocks

WHOLE = 10**12  # elements up to which a parameter is gathered for good between steps: all of them


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether parameters are split over the ranks."""
    return is_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a rank holds only a part of some of the student's tensors."""
    return is_zero3(accelerator) or splits_frozen()


STEPS_ITSELF = "makes its step in the backward, before anything can judge it"
UNDER_DEEPSPEED = {  # options that must be so, and why
    "optimizer": ("adamw", "splits AdamW's moments over the ranks as float32"),
    "spike_deviations": (0.0, STEPS_ITSELF),
    "max_returns": (0, STEPS_ITSELF),
}

UNDER_ZERO3 = {"ema": (0.0, "keeps a part of every trained tensor on each rank under ZeRO-3")}


def check_options(accelerator: Accelerator, options: TrainConfig, dtype: torch.dtype = torch.float32) -> None:
    """Refuse what DeepSpeed cannot do.

    Raises:
        ValueError: naming the option and the launch.
    """
    if not is_deepspeed(accelerator):
        return
    if dtype == torch.float16:
        raise ValueError(
            "precision is fp16, but this launch is DeepSpeed's, whose fp16 rounds what is trained too; set "
            "precision=bf16 or float32, or launch with configs/accelerate/two_gpus_ddp.yaml."
        )
    for name, (needed, why) in (UNDER_DEEPSPEED | (UNDER_ZERO3 if is_zero3(accelerator) else {})).items():
        value = getattr(options, name)
        if value != needed:
            raise ValueError(
                f"train.{name} is {value}, but this launch is DeepSpeed's, which {why}; set train.{name}={needed}, or "
                f"launch with configs/accelerate/two_gpus_ddp.yaml."
            )


def configure_deepspeed(
    accelerator: Accelerator, options: TrainConfig, num_micro_batches: int, num_trained: int
) -> None:
    """Tell DeepSpeed what the run's own config says, before it wraps the model; `num_trained` elements are trained.

    Its buffer of gradients holds them all, and no more: by default it has 500 million places, 2 GB on every rank, for
    the few percent of a student that are trained.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["zero_optimization"].setdefault("reduce_bucket_size", num_trained)
    config["train_micro_batch_size_per_gpu"] = options.micro_batch_size
    config["gradient_accumulation_steps"] = num_micro_batches
    config["gradient_clipping"] = options.max_grad_norm
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", 10**9)
    if is_zero3(accelerator):  # the Q-Former's queries belong to no layer's call, so what is trained stays gathered
        config["zero_optimization"]["stage3_param_persistence_threshold"] = WHOLE
        config["zero_optimization"]["stage3_model_persistence_threshold"] = WHOLE


def build_root() -> Path:
    """Where torch compiles extensions: folders of operators, or of Python and CUDA versions with such folders."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def find_build_locks() -> list[Path]:
    """Lock files of operators that are being compiled, or whose compiler was killed."""
    root = build_root()
    return sorted(path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern))


def describe_build_locks() -> str:
    """What locks of a compiler there are and what to do; nothing where there are none.

    Nothing of ours is compiled (see `ranks.forbid_compiling`), but a user's own settings of DeepSpeed may ask for more.
    torch waits for such a file without a word and without end, and nothing tells a compiler at work from one that was
    killed.
    """
    locks = find_build_locks()
    if not locks:
        return ""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(path.stat().st_mtime for path in locks)))
    names = ", ".join(map(str, locks))
    return (
        f"{names} is there since {since}, and where DeepSpeed has that operator to compile it waits until the file is "
        f"gone: if no other launch compiles now, one was killed while it did; remove the file."
    )


def report_build_locks(say: Callable[[str], None]) -> None:
    """Tell what DeepSpeed's start may wait for."""
    text = describe_build_locks()
    if text:
        say(text)


def hide_frozen_(module: nn.Module) -> None:
    """Make every frozen parameter a plain attribute of its layer, in place, where DeepSpeed does not look."""
    for layer in module.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                del layer._parameters[name]
                layer.__dict__[name] = parameter  # nn.Module's own way would register it again


@contextmanager
def gathered(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """A block in which every rank has the whole parameters, and may call layers as often as it likes.

    Every rank must enter it. DeepSpeed's hooks gather by exchanges that all ranks take part in, but ranks that generate
    answers of different lengths call layers at different times: inside the block there are no hooks.

    Args:
        accelerator: the processes; without ZeRO-3 or FSDP2 the block is a plain one.
        module: what `accelerator.prepare` wrapped.
    """
    if not is_zero3(accelerator):
        with whole_blocks(module):
            yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    offload = accelerator.deepspeed_engine_wrapped.engine.optimizer.parameter_offload
    with GatheredParameters(list(module.parameters())):
        remove_hooks_(offload)
        yield
        offload.setup_zero_stage3_hooks()


def join_(accelerator: Accelerator, module: nn.Module) -> None:
    """Make a module that was trained under ZeRO-3 or FSDP2 an ordinary one again, whole on every rank, in place."""
    if not is_zero3(accelerator):
        unshard_(module)
        return
    with gathered(accelerator, module):
        whole = [parameter.detach().clone() for parameter in module.parameters()]
    for parameter, tensor in zip(list(module.parameters()), whole):
        parameter.data = tensor
    remove_hooks_(accelerator.deepspeed_engine_wrapped.engine.optimizer.parameter_offload)
    for layer in module.modules():
        for name, value in list(vars(layer).items()):
            if isinstance(value, nn.Parameter):
                del layer.__dict__[name]
                layer.register_parameter(name, value)


def remove_hooks_(offload) -> None:
    """Take DeepSpeed's hooks off every layer."""
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
