"""In which precision an ear hears: that of its weights, and that of its products. Knows no model around it.

SALMONN's trainers hold the ears' weights in float32 and multiply under fp16 autocast. Weights rounded to bf16 have
about ten times the error of that, which targets on a disk would keep for ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import nn

WEIGHTS = {"float32": torch.float32, "fp16": torch.float32, "bf16": torch.bfloat16}
PRODUCTS = {"float32": torch.float32, "fp16": torch.float16}  # whatever autocast stands around; "bf16": as that says


def set_ear_precision_(ear: nn.Module, precision: str) -> None:
    """Let an ear hear in a precision, one of `WEIGHTS`, wherever it is shared, in place; weights are only rounded."""
    ear.to(WEIGHTS[precision])
    ear.precision = precision


def describe_precision(ear: nn.Module) -> str:
    """The precision that an ear was told to hear in; of one that was not, that of its weights."""
    told = getattr(ear, "precision", None)
    return told or f"{str(next(ear.parameters()).dtype).removeprefix('torch.')}, products as around it"


@contextmanager
def ear_autocast(ear: nn.Module) -> Iterator[None]:
    """While it is open, products are in the precision that the ear is to hear in; of one without, nothing changes."""
    dtype = PRODUCTS.get(getattr(ear, "precision", None))
    if dtype is None:
        yield
        return
    with torch.autocast(device_of(ear).type, dtype, enabled=dtype != torch.float32):
        yield


def device_of(ear: nn.Module) -> torch.device:
    """Where an ear's weights are, also those that are plain attributes of their layers, as ZeRO-3 wants frozen ones."""
    attributes = (value for module in ear.modules() for value in vars(module).values())
    return next(x for x in chain(ear.parameters(), attributes) if isinstance(x, torch.Tensor)).device


def has_amx_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bfloat16 in tiles: three times as fast as float32; without them it is slower.

    The one place that asks. Its answer decides nothing but the speed of ears, head and embeddings that only answer.
    """
    if not cpuinfo.is_file():
        return False
    lines = cpuinfo.read_text().splitlines()
    return any("amx_bf16" in line.split() for line in lines if line.startswith("flags"))
