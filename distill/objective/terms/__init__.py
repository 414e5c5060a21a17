"""The terms of the loss: a further one is a file here and a line in `TERMS`; LossConfig's field of its name, if any,
lets a config say its weight."""

from distill.objective.terms.balance import ExpertBalance
from distill.objective.terms.ce import CrossEntropy
from distill.objective.terms.chunk import ChunkLikelihood
from distill.objective.terms.feature import QueryDistance
from distill.objective.terms.frames import FrameDistance
from distill.objective.terms.hidden import StateDistance
from distill.objective.terms.kl import TokenDivergence
from distill.objective.terms.term import Term

TERMS: dict[str, Term] = {
    "ce": CrossEntropy(),
    "kl": TokenDivergence(),
    "feature": QueryDistance(),
    "hidden": StateDistance(),
    "frames": FrameDistance(),
    "chunk": ChunkLikelihood(),
    "balance": ExpertBalance(),
}
