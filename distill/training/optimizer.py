"""Which parameters decay, and the learning rate of each step as a pure function of the step. Knows no loop."""

import math

from torch import nn

from distill.config import TrainConfig


def group_by_decay(named: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: matrices decay; biases, norms and other vectors do not."""
    matrices = [p for p in named.values() if p.ndim >= 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, options: TrainConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up to the peak, then half a cosine down to the minimum."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    span = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
