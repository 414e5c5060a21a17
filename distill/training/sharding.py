"""Frozen weights of a student's LLM, split over the ranks by FSDP2: a block is whole while it runs.

What is trained stays whole on every rank, under DDP: it is a few percent of a student, and so checkpoints, averages and
clipping are those of a run without. 4-bit weights lie in float32 words meanwhile, since FSDP2 takes floating points
alone. Embeddings and head stay whole: the objective reads the head row by row, outside its own layer. Knows LLMs of
transformers.

Source: Zhao et al., "PyTorch FSDP", arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from teachers.fourbit import from_words_, to_words_


def find_blocks(llm: nn.Module) -> list[nn.Module]:
    """The blocks of a LLM, as transformers names them for such splits.

    Raises:
        ValueError: it names none.
    """
    names = set(llm._no_split_modules or ())
    blocks = [module for module in llm.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"this launch splits frozen weights by FSDP, but transformers names no blocks of a {type(llm).__name__}; "
            f"launch with configs/accelerate/two_gpus_ddp.yaml."
        )
    return blocks


def shard_frozen_(accelerator: Accelerator, llm: nn.Module) -> None:
    """Leave each rank a part of every frozen weight of a LLM's blocks, in place; every rank must call it.

    Args:
        accelerator: the processes.
        llm: a causal LM of transformers, on the device, after DDP has wrapped it.

    Raises:
        ValueError: see `find_blocks`.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in find_blocks(llm):
        to_words_(block)
        kept = {p for p in block.parameters() if p.requires_grad or not p.dtype.is_floating_point}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    base = llm.base_model  # has none left of its own, but lets a GPU fetch a block while another runs
    fully_shard(base, mesh=mesh, ignored_params={p for p in base.parameters() if not isinstance(p, DTensor)})


def find_sharded(module: nn.Module) -> list[FSDPModule]:
    """The blocks whose weights are split."""
    return [block for block in module.modules() if isinstance(block, FSDPModule)]


@contextmanager
def whole_blocks(module: nn.Module) -> Iterator[None]:
    """A block of code in which every rank has every weight and calls layers as often as it likes, without exchanges."""
    blocks = find_sharded(module)
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.reshard()
            block.set_reshard_after_forward(True)


def unshard_(module: nn.Module) -> None:
    """Make split blocks ordinary ones again, whole on every rank, in place; every rank must call it."""
    for block in find_sharded(module):
        block.unshard()
        state = block._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        block.__class__ = type(block).__mro__[type(block)._orig_cls_mro_index]
        for key in (STATE_KEY, REGISTRY_KEY):
            block.__dict__.pop(key)
    from_words_(module)
