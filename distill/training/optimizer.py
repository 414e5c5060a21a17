"""AdamW, which parameters decay, and the learning rate of each step as a pure function of the step. Knows no loop."""

import torch
from torch import nn

from distill.config import TrainConfig
from distill.training.falls import FALLS


def build_optimizer(named: dict[str, nn.Parameter], options: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on what is trained; in 8 bits (Dettmers et al., 2022, arXiv 2110.02861) tensors of 4,096 elements and more.

    Its rate is 0 until each step sets it.
    """
    groups = group_by_decay(named, options.weight_decay)
    if options.optimizer == "adamw_8bit":
        from teachers.fourbit import bnb

        return bnb.optim.AdamW8bit(groups, lr=0.0, betas=(0.9, options.beta2))
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, options.beta2))


def group_by_decay(named: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: matrices decay; biases, norms and other vectors do not."""
    matrices = [p for p in named.values() if p.ndim >= 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, options: TrainConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up to the peak, then as `options.schedule` says to the minimum."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    left = max(1, options.steps - options.warmup_steps)
    share = FALLS[options.schedule]((step - options.warmup_steps) / left, options.decay_share * options.steps / left)
    return options.min_learning_rate + (options.learning_rate - options.min_learning_rate) * share
