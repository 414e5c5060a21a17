"""Where a generated answer ends: at ids, or at a sequence of ids. Knows no model.

An end token's text can be several ids (`</s>` is three in Llama 3's vocabulary); the last of them alone ends nothing.

Shapes: B batch, T new ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria


class EndSequence(StoppingCriteria):
    """Ends each row (and each beam) of its own accord when its ids end with a sequence."""

    def __init__(self, ids: Sequence[int]):
        self.ids = list(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        if input_ids.shape[1] < len(self.ids):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return (input_ids[:, -len(self.ids) :] == torch.tensor(self.ids, device=input_ids.device)).all(1)


def cut_after_end(ids: list[int], ends: Sequence[Sequence[int]]) -> list[int]:
    """The ids up to and with the first of `ends`; all of them where none comes."""
    for stop in range(1, len(ids) + 1):
        if has_ended(ids[:stop], ends):
            return ids[:stop]
    return ids


def has_ended(ids: Sequence[int], ends: Sequence[Sequence[int]]) -> bool:
    """Whether the ids end with one of `ends`."""
    return any(list(ids[-len(end) :]) == list(end) for end in ends)
