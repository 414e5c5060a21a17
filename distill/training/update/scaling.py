"""The factor that keeps gradients of fp16 products above zero, with torch's own scaler. Knows no model.

Source: Micikevicius et al., "Mixed Precision Training", 2018 (arXiv 1710.03740): fp16 ends at 6e-8, where
gradients are. The loss is multiplied by as much as none of them overflows with: halved when one does, and doubled after
2,000 steps without.
"""

import math

import torch
from torch import Tensor

from distill.training.update.spikes import Fault

FIRST = 2.0**16  # the factor of the first step: often too large, which costs that step


class LossScale:
    """What a loss is multiplied with before its backward, and what becomes of a step whose gradient overflows.

    Args:
        device: where the gradients are.
        dtype: in which the products are; only those of fp16 need a factor, with others it does nothing.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.scaler = torch.amp.GradScaler(device.type, init_scale=FIRST, enabled=dtype == torch.float16)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss as its backward needs it."""
        return self.scaler.scale(loss)

    def unscale_(self, optimizer) -> None:
        """Give the optimizer's gradients their true values, in place, once all micro-batches are through."""
        self.scaler.unscale_(optimizer)

    def find_fault(self, loss: float, norm: float) -> Fault | None:
        """What is wrong with a step whose loss is finite and whose gradient is not: the factor, unless that is 1."""
        if not self.scaler.is_enabled() or math.isfinite(norm) or not math.isfinite(loss):
            return None
        factor = self.scaler.get_scale()
        if factor <= 1:
            return None
        return Fault(
            "grad_norm", norm, f"overflows fp16 at a loss scale of {factor:g}; half of it is next", is_bad=False
        )

    def update(self) -> None:
        """Choose the factor of the next step."""
        self.scaler.update()

    def state_dict(self) -> dict:
        """What a run that goes on must know, as plain data; empty where nothing is scaled."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on where another stood; without a state, as at the start."""
        if state:
            self.scaler.load_state_dict(state)
