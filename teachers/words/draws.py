"""Answers that are drawn instead of greedy, from numbers that a name decides: the same in any batch and on any rank.

Shapes: B batch, T new ids, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


def seeded_generator(name: str) -> torch.Generator:
    """A generator for what has a name, the same wherever it is drawn."""
    return torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))


class Draw(LogitsProcessor):
    """Leaves one id a row and step: a draw from the softmax at a temperature.

    Each row has its own numbers, so that it draws the same in any batch.

    Args:
        names: the names of the rows, whose hashes seed their numbers.
        temperature: the temperature of the softmax.
        num_steps: at most.
    """

    def __init__(self, names: Sequence[str], temperature: float, num_steps: int):
        rows = [torch.rand(num_steps, generator=seeded_generator(name), dtype=torch.float64) for name in names]
        self.numbers_BT, self.temperature, self.step = torch.stack(rows), temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sums_BV = torch.softmax(scores.double() / self.temperature, -1).cumsum(-1)
        at_B1 = self.numbers_BT[:, self.step, None].to(scores.device) * sums_BV[:, -1:]
        self.step += 1
        chosen_B1 = torch.searchsorted(sums_BV, at_B1, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B1, 0.0)
