"""Which samples of the shards take part, what each comes with, and what it counts. Knows no order and reads nothing."""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from shards.sample import Sample


@dataclass(frozen=True)
class Selection:
    """The samples of a stream.

    Raises:
        ValueError: a share or a weight is out of its range.
    """

    tasks: Sequence[str] | None = None  # those to read; None: all
    labelled_share: float = 1.0  # of the samples whose text is given out, chosen by key; the others are unlabelled
    labelled_only: bool = False  # leave unlabelled samples out
    sample_weights: Mapping[str, float] = field(default_factory=dict)  # key -> what it counts, else 1; 0: left out
    targets: str | Path | None = None  # folder of a target cache to join by key
    student_answers: str | Path | None = None  # of the student's answers with their targets, see `distill answers`
    student_share: float = 0.0  # of the answered samples that come with the student's answer, drawn anew each epoch

    def __post_init__(self):
        for name in ("labelled_share", "student_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a share is 0 to 1; set it so.")
        wrong = next((key for key, weight in self.sample_weights.items() if not weight >= 0), None)
        if wrong is not None:
            weight = self.sample_weights[wrong]
            raise ValueError(f"sample_weights[{wrong!r}] is {weight}, but what counts is 0 or more; set it so.")

    @property
    def answered_share(self) -> float:
        """`student_share` where there are answers of the student."""
        return self.student_share if self.student_answers is not None else 0.0

    def dress(self, sample: Sample) -> Sample:
        """A sample with its weight, and without its text where that is not given out."""
        weight = self.sample_weights.get(sample.key)
        sample = sample if weight is None else replace(sample, weight=weight)
        return sample if self.shows_text(sample.key) else replace(sample, text=None)

    def describe(self, answers_digest: str) -> dict[str, str]:
        """What a stream's state says of labels, weights and answers, given the hash of the student's answers."""
        weights = json.dumps(dict(sorted(self.sample_weights.items())))
        answers = f"{self.answered_share:g} of {answers_digest[:16]}"
        return {
            "labels": f"{self.labelled_share:g} {'only' if self.labelled_only else 'and others'}",
            "sample_weights": hashlib.sha256(weights.encode()).hexdigest()[:16] if self.sample_weights else "none",
            "student_answers": answers if self.answered_share else "none",
        }

    def shows_text(self, key: str) -> bool:
        """Whether a sample's text is given out, if it has one."""
        return self.labelled_share >= 1 or zlib.crc32(key.encode()) < self.labelled_share * 2**32


def check_tasks(name: str, tasks: Sequence[str], known: Sequence[str]) -> None:
    """Refuse tasks that the shards do not hold.

    Args:
        name: the name of the option that names the tasks.
        tasks: its tasks.
        known: those of the shards.

    Raises:
        ValueError: naming the first, and one that it may have been meant for.
    """
    for task in tasks:
        if task not in known:
            near = get_close_matches(task, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "choose one of them."
            raise ValueError(f"{name} names {task!r}, but the shards hold {', '.join(known)}; {hint}")
