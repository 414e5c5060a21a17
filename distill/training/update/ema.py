"""The running average of what is trained, which is validated and becomes the student. Knows tensors by name alone.

Source: Polyak and Juditsky, 1992; as an exponential average, and with a decay that begins low, as TensorFlow's
`ExponentialMovingAverage(num_updates)`: the weights of the start, which mean nothing, would weigh for 1 / (1 - decay)
steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

KIND = "ema"  # behind a tensor's name in a checkpoint, as "exp_avg" of a moment


class Ema:
    """An exponential average, float32 beside the trained tensors: as many bytes again.

    Args:
        named: what is trained, by name; its values now are the first average.
        decay: what is left of the average after a step, once so many steps are over that it is a fair share.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float):
        self.named, self.decay = named, decay
        self.average = {name: p.detach().float().clone() for name, p in named.items()}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after step `step`, from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, p in self.named.items():
            self.average[name].lerp_(p.float(), share)

    @contextmanager
    def worn(self) -> Iterator[None]:
        """A block in which the trained tensors are their averages; behind it they are what they were, bit by bit."""
        own = {name: p.detach().clone() for name, p in self.named.items()}
        self.put_()
        try:
            yield
        finally:
            copy_(self.named, own)

    def put_(self) -> None:
        """Give the trained tensors their averages, in place."""
        copy_(self.named, self.average)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, by `NAME.ema`, on the CPU."""
        return {f"{name}.{KIND}": tensor.cpu() for name, tensor in self.average.items()}

    def load_(self, file: Path) -> None:
        """Take a checkpoint's averages; where it has none the run had none, and they begin with its weights."""
        with safe_open(file, "pt") as saved:
            keys = [key for key in saved.keys() if key.endswith(f".{KIND}")]  # noqa: SIM118, it is no dict
            found = {key.removesuffix(f".{KIND}"): saved.get_tensor(key) for key in keys}
        copy_(self.average, found or {name: p.detach() for name, p in self.named.items()})


def copy_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of their names, in place."""
    for name, value in values.items():
        tensors[name].data.copy_(value)
