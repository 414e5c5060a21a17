"""One update: the learning rate, the gradient's norm and limit, the optimizer's step. Knows no loss and no data."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from distill.config import TrainConfig
from distill.training.optimizer import learning_rate
from distill.training.ranks import is_deepspeed, say
from distill.training.update.clipping import CLIPS
from distill.training.update.ema import Ema
from distill.training.update.scaling import LossScale
from distill.training.update.spikes import BadSteps, Fault


class Update:
    """Applies gradients.

    Args:
        accelerator: the processes.
        named: what is trained, by name.
        options: rate and limits.
        dtype: the data type of the products.
    """

    def __init__(self, accelerator: Accelerator, named: Mapping[str, nn.Parameter], options: TrainConfig,
                 dtype: torch.dtype = torch.float32):  # fmt: skip
        self.accelerator, self.named, self.options = accelerator, named, options
        self.clip = CLIPS[options.clip](options)
        self.bad_steps = BadSteps(options, lambda text: say(accelerator, text))
        self.loss_scale = LossScale(accelerator.device, dtype)
        self.ema = Ema(named, options.ema) if options.ema else None

    def begin(self, optimizer, step: int) -> dict[str, float]:
        """Set rate and limit of step `step` (from 0) before its first backward; what the log says of them."""
        self.optimizer, self.step = optimizer, step
        rate, limit = learning_rate(step, self.options), self.clip.limit
        for group in optimizer.param_groups:
            group["lr"] = rate
        said = {"learning_rate": rate}
        if self.options.clip == "fixed":
            return said
        if is_deepspeed(self.accelerator):  # which clips and steps at the end of the last backward
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            engine._config.gradient_clipping = engine.optimizer.clip_grad = limit
        return said | {"grad_limit": limit}

    def __call__(self, loss: float) -> tuple[float, Fault | None]:
        """Clip and step, if there is nothing wrong with the step's loss and norm.

        Returns:
            The norm of the gradient before it is clipped, and what is wrong.
        """
        if is_deepspeed(self.accelerator):  # has made its step unless the gradient was not finite
            norm = float(self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm() or 0.0)  # None before a step
        else:
            self.loss_scale.unscale_(self.optimizer)
            norm = float(nn.utils.clip_grad_norm_(self.named.values(), self.clip.limit))
        fault = self.loss_scale.find_fault(loss, norm) or self.bad_steps.find_fault(loss, norm)
        if fault is None:
            self.optimizer.step()
            self.clip.add(norm)
            if self.ema is not None:
                self.ema.add(self.step)
        self.loss_scale.update()
        self.optimizer.zero_grad()
        return norm, fault

    def averaged(self) -> AbstractContextManager:
        """A block in which the trained tensors are what would become the student."""
        return nullcontext() if self.ema is None else self.ema.worn()

    @property
    def _parts(self) -> dict:
        return {"clip": self.clip, "bad_steps": self.bad_steps, "loss_scale": self.loss_scale}

    def state_dict(self) -> dict:
        """What a run that goes on must know of the steps before, as plain data by part; of a part without, nothing."""
        states = {name: part.state_dict() for name, part in self._parts.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, dict]) -> None:
        """Go on where another stood; a part that the run had not until now begins anew."""
        for name, part in self._parts.items():
            part.load_state_dict(state.get(name, {}))

    def go_back(self, state: Mapping[str, dict]) -> None:
        """As `load_state_dict`, of a run that goes back; what it left out stays counted."""
        counts = self.bad_steps.counts
        self.load_state_dict(state)
        self.bad_steps.count_return(counts)
