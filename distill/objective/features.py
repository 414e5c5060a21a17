"""Feature losses: how far the student's Q-Former queries or hidden states are from the teacher's.

Pure functions, float32 and unreduced: one value a window (for hidden states: a position). A window's value depends on
its own sample only, so that a batch can be split anywhere. One more is one function, its plain twin and one line in
`FEATURES`; the twin is the formula once more, for the windows of one sample, and doctor holds the first to it.

Shapes: W windows of the batch, flattened (or positions), Q queries a window, E width; `_WQE` also stands for `_WE`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.objective.numerics import widen

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FeatureKind:
    """A distance of features.

    Attributes:
        values: computes it of student_WQE and teacher_WQE, and of sample_W where it is relative; one value a window.
        plain: computes it of student_WQE and teacher_WQE of one sample.
        is_relative: whether windows of one sample are compared with each other: it must know which sample each is of,
            and the widths may differ. Else they must be equal, by a learned projector where they are not.
    """

    values: Callable[..., "Tensor"]
    plain: Callable[["Tensor", "Tensor"], "Tensor"]
    is_relative: bool = False


def _both(student_WQE: "Tensor", teacher_WQE: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Both wide, the teacher without gradient; refuses shapes that would broadcast."""
    if student_WQE.shape != teacher_WQE.shape:
        raise ValueError(
            f"student features are {tuple(student_WQE.shape)}, but the teacher's are {tuple(teacher_WQE.shape)}; "
            f"project the student with build_projector, or use the relation loss, which compares any widths."
        )
    return widen(student_WQE), widen(teacher_WQE.detach())


def mse(student_WQE: "Tensor", teacher_WQE: "Tensor") -> "Tensor":
    """Squared difference, mean over a window's queries and width; feature_W."""
    student, teacher = _both(student_WQE, teacher_WQE)
    return (student - teacher).square().flatten(1).mean(1)


def plain_mse(student_WQE: "Tensor", teacher_WQE: "Tensor") -> "Tensor":
    """The same as a sum over a number."""
    return ((student_WQE - teacher_WQE) ** 2).flatten(1).sum(1) / student_WQE[0].numel()


def smooth_l1(student_WQE: "Tensor", teacher_WQE: "Tensor") -> "Tensor":
    """Huber's loss with its corner at 1 (`torch.nn.functional.smooth_l1_loss`), mean as in `mse`; feature_W."""
    student, teacher = _both(student_WQE, teacher_WQE)
    distance = (student - teacher).abs()
    return (0.5 * distance * distance).where(distance < 1, distance - 0.5).flatten(1).mean(1)


def plain_smooth_l1(student_WQE: "Tensor", teacher_WQE: "Tensor") -> "Tensor":
    """The same as half a square up to 1 and a line from there."""
    distance = (student_WQE - teacher_WQE).abs()
    return (distance.clamp(max=1) ** 2 / 2 + (distance - 1).clamp(min=0)).flatten(1).sum(1) / student_WQE[0].numel()


def _unit(x: "Tensor", least: float) -> "Tensor":
    """The tensor over its length along the last dimension."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=least)


def cosine(student_WQE: "Tensor", teacher_WQE: "Tensor") -> "Tensor":
    """1 - cosine of the angle between each query and the teacher's, mean over a window's queries; feature_W."""
    student, teacher = _both(student_WQE, teacher_WQE)
    distance_WQ = 1 - (_unit(student, 1e-8) * _unit(teacher, 1e-8)).sum(-1)
    return distance_WQ[:, None].flatten(1).mean(1)


def plain_cosine(student_WQE: "Tensor", teacher_WQE: "Tensor") -> "Tensor":
    """The same as a product over the lengths."""
    lengths_WQ = ((student_WQE**2).sum(-1) * (teacher_WQE**2).sum(-1)) ** 0.5
    return 1 - ((student_WQE * teacher_WQE).sum(-1) / lengths_WQ)[:, None].flatten(1).mean(1)


def _similarity(features_WQE: "Tensor") -> "Tensor":
    """Cosine between every two windows."""
    unit_WX = _unit(widen(features_WQE).flatten(1), 1e-12)
    return unit_WX @ unit_WX.T


def relation(student_WQE: "Tensor", teacher_WQE: "Tensor", sample_W: "Tensor") -> "Tensor":
    """Squared difference of the cosines between windows of one sample, mean over the window's partners (itself too).

    Relational distillation (Park et al. 2019; Tung and Mori 2019): what is compared is how alike the windows are, so
    the widths may differ and no projector is needed.

    Args:
        sample_W: which sample of the batch each window is of; windows of two samples are not compared, or the loss
            would depend on how the batch was split.

    Returns:
        feature_W.
    """
    is_pair_WW = sample_W[:, None] == sample_W[None, :]
    difference_WW = _similarity(student_WQE) - _similarity(teacher_WQE.detach())
    return (difference_WW.square() * is_pair_WW).sum(1) / is_pair_WW.sum(1)


def plain_relation(student_WQE: "Tensor", teacher_WQE: "Tensor") -> "Tensor":
    """The same, where all windows are of one sample."""

    def cosines(x_WX: "Tensor") -> "Tensor":
        lengths_W = (x_WX**2).sum(1) ** 0.5
        return (x_WX[:, None] * x_WX[None]).sum(-1) / (lengths_W[:, None] * lengths_W[None])

    return ((cosines(student_WQE.flatten(1)) - cosines(teacher_WQE.flatten(1))) ** 2).mean(1)


FEATURES = {
    "mse": FeatureKind(mse, plain_mse),
    "cosine": FeatureKind(cosine, plain_cosine),
    "smooth_l1": FeatureKind(smooth_l1, plain_smooth_l1),
    "relation": FeatureKind(relation, plain_relation, is_relative=True),
}


def feature_loss(kind: str, student_WQE: "Tensor", teacher_WQE: "Tensor", sample_W: "Tensor") -> "Tensor":
    """The feature loss of a name; arguments as `relation`, which alone looks at `sample_W`."""
    found = FEATURES[kind]
    return found.values(student_WQE, teacher_WQE, *([sample_W] if found.is_relative else []))
