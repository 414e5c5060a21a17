"""Feature losses: how far the student's Q-Former queries or hidden states are from the teacher's.

Pure functions, float32 and unreduced: one value a window (for hidden states: a position). A window's value depends on
its own sample only, so that a batch can be split anywhere. Widths that differ meet through a learned projector, which
belongs to the training run and not to the student: it never reaches an export.

Shapes: W windows of the batch, flattened (or positions), Q queries a window, E width; `_WQE` also stands for `_WE`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from distill.objective.losses import widen


def _both(student_WQE: Tensor, teacher_WQE: Tensor) -> tuple[Tensor, Tensor]:
    """Both wide, the teacher without gradient; refuses shapes that would broadcast."""
    if student_WQE.shape != teacher_WQE.shape:
        raise ValueError(
            f"student features are {tuple(student_WQE.shape)}, but the teacher's are {tuple(teacher_WQE.shape)}; "
            f"project the student with build_projector, or use the relation loss, which compares any widths."
        )
    return widen(student_WQE), widen(teacher_WQE.detach())


def mse(student_WQE: Tensor, teacher_WQE: Tensor) -> Tensor:
    """Squared difference, mean over a window's queries and width; feature_W."""
    student, teacher = _both(student_WQE, teacher_WQE)
    return (student - teacher).square().flatten(1).mean(1)


def smooth_l1(student_WQE: Tensor, teacher_WQE: Tensor) -> Tensor:
    """Huber's loss with its corner at 1 (`torch.nn.functional.smooth_l1_loss`), mean as in `mse`; feature_W."""
    student, teacher = _both(student_WQE, teacher_WQE)
    return F.smooth_l1_loss(student, teacher, reduction="none").flatten(1).mean(1)


def cosine(student_WQE: Tensor, teacher_WQE: Tensor) -> Tensor:
    """1 - cosine of the angle between each query and the teacher's, mean over a window's queries; feature_W."""
    student, teacher = _both(student_WQE, teacher_WQE)
    distance_WQ = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return distance_WQ.reshape(len(student), -1).mean(1)


def _similarity(features_WQE: Tensor) -> Tensor:
    """Cosine between every two windows."""
    unit_WX = F.normalize(widen(features_WQE).flatten(1), dim=1)
    return unit_WX @ unit_WX.T


def relation(student_WQE: Tensor, teacher_WQE: Tensor, sample_W: Tensor) -> Tensor:
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


FEATURE_LOSSES = {"mse": mse, "cosine": cosine, "smooth_l1": smooth_l1, "relation": relation}


def feature_loss(kind: str, student_WQE: Tensor, teacher_WQE: Tensor, sample_W: Tensor) -> Tensor:
    """The feature loss of a name; arguments as `relation`, which alone looks at `sample_W`.

    Raises:
        ValueError: the name is unknown, or the shapes differ.
    """
    if kind not in FEATURE_LOSSES:
        names = ", ".join(FEATURE_LOSSES)
        raise ValueError(f"feature loss is {kind!r}, but it must be one of {names}; correct the name.")
    if kind == "relation":
        return relation(student_WQE, teacher_WQE, sample_W)
    return FEATURE_LOSSES[kind](student_WQE, teacher_WQE)


def build_projector(student_width: int, teacher_width: int) -> nn.Module:
    """What brings the student's features to the teacher's width: nothing when they agree, else a learned linear map.

    It starts as the first rows of an orthogonal matrix, so that lengths and angles survive where there is room.
    """
    if student_width == teacher_width:
        return nn.Identity()
    projector = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(projector.weight)
    return projector
