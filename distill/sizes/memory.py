"""How much memory a computation holds at its peak, counted tensor by tensor; on the meta device without any memory.

Every operator's output is seen, and its storage's end. So a step of a model of any size is measured before there is a
machine for it. What an allocator adds, and what a kernel uses inside, is not seen.
"""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """While it is open, bytes of the tensors that are made inside, and their highest sum.

    Args:
        known: tensors of before, whose storage is not counted: weights, say.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.known = {self._key(tensor) for tensor in known}
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and self._key(tensor) not in inputs:
                self._add(tensor)
        return made

    @property
    def held(self) -> int:
        """Bytes of what is alive now."""
        return sum(self.live.values())

    def _add(self, tensor: Tensor) -> None:
        key, storage = self._key(tensor), tensor.untyped_storage()
        if key in self.known or key in self.live:
            return
        self.live[key] = storage.nbytes()
        weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, self.held)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata


class MemoryEfficientAttention(TorchFunctionMode):
    """While it is open, attention keeps what FlashAttention keeps, and no matrix of scores; its result has no values.

    On the meta device torch takes the plain form, whose scores no GPU holds.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Shapes as of attention; saves queries, keys, values, the result and a log-sum-exp a query, float32."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class Peak(NamedTuple):
    """Bytes."""

    forward: int  # held when the forward is over: what the backward needs
    total: int  # the most at any moment
