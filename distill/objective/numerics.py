"""Arithmetic that no loss may get wrong: floats that are wide enough, products with nothing, mixtures of logs.

Methods of tensors only: who reads the names of losses here (a config's rules) need not wait for torch.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def widen(x: "Tensor") -> "Tensor":
    """The tensor in float32, or in float64 when it already is."""
    return x if x.is_floating_point() and x.itemsize == 8 else x.float()


def expect(logweight: "Tensor", value: "Tensor") -> "Tensor":
    """`exp(logweight) * value`, and zero, as its gradient, where the weight is zero, whatever the value is there."""
    is_there = logweight > -math.inf
    product = logweight.where(is_there, 0).exp() * value.where(is_there, 0)
    return product.where(is_there, 0)


def log_mixture(student: "Tensor", teacher: "Tensor", teacher_share: float) -> "Tensor":
    """`log(share * teacher + (1 - share) * student)`; zero where both are empty, which no term looks at."""
    is_empty = (student == -math.inf) & (teacher == -math.inf)
    own = student.where(~is_empty, 0) + student.new_tensor(1 - teacher_share).log()
    return own.logaddexp(teacher.where(~is_empty, 0) + student.new_tensor(teacher_share).log())
