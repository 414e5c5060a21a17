"""What a teacher says about a batch, and how its parts are named in a cache's records. Knows no teacher.

Shapes: S supervised positions, W windows, Q queries a window, E query width, D LLM width, R encoder frames.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from shards.sample import Sample
from shards.targets.distributions import Distribution, HiddenStates
from shards.targets.header import HEAD_INPUT
from shards.targets.record import identify_sample
from teachers.words.rows import Row

QUERIES = "queries_WQE"  # name of the Q-Former's queries among a record's features
FRAMES = "frames_"  # beginning of the names of the encoders' frames
NO_CODEC = "none"  # name of the codec of a cache that holds frames alone


@dataclass(frozen=True)
class Targets:
    """The teacher's word on every supervised position of a batch, row after row, and its Q-Former's queries."""

    distribution: Distribution | HiddenStates | None  # None: there are frames alone
    queries_BWQE: Tensor | None  # None: not cached
    num_windows_B: list[int]
    label_logprobs_S: Tensor  # natural log-probability of each label, at temperature 1
    hidden: Tensor | None = None  # the states that enter the teacher's head, [S, D]; None: not cached
    hidden_by_layer: dict[int, Tensor] = field(default_factory=dict)  # outputs of LLM blocks, 1 is the first: [S, D]
    frames: list[Tensor] | None = None  # of ears that teacher and student share, [B, R, E] each; None: not cached
    cross: ClassVar[None] = None  # what they say in another tokenizer's ids: only `CrossedTargets` have it


def hidden_name(layer: int) -> str:
    """The name of a layer's states among a record's features."""
    return "hidden_head_SD" if layer == HEAD_INPUT else f"hidden_{layer}_SD"


def identify_row(sample: Sample, row: Row) -> str:
    """What targets of a sample belong to: its audio, its prompt's ids and its answer's ids."""
    return identify_sample(sample.sha256, row.before + row.after, row.answer)
