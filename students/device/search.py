"""Greedy and beam search over a decoder with a state, as transformers' `generate` has them. Knows no graph, no text.

Shapes: B batch, K beams, C candidates, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

NEVER = -1e9  # the score of a beam that is not in the race


class Decoder(Protocol):
    """What answers token by token."""

    def start(self, times: int) -> np.ndarray:
        """Read the prompts, each `times` over; logits_BV of what follows."""

    def follow(self, ids: np.ndarray, beams: np.ndarray) -> np.ndarray:
        """Append an id to each row, which goes on from row `beams` of the step before; logits_BV of what follows."""


@dataclass(frozen=True)
class Search:
    """How an answer is looked for."""

    has_ended: Callable[[Sequence[int]], bool]
    num_tokens: int  # ids from this on stand for no token
    pad_id: int  # fed to a row that has ended
    num_ends: int = 1  # single ids that end an answer: so many more candidates are kept
    max_new_tokens: int = 100
    min_new_tokens: int = 0  # before so many nothing ends
    num_beams: int = 1
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0

    def run(self, decoder: Decoder, on_ids: Callable[[list[list[int]]], None] = lambda ids: None) -> list[list[int]]:
        """New ids of each row up to and with its end.

        Args:
            decoder: with its prompts.
            on_ids: is called with all rows' ids after each step of a greedy search.
        """
        return self.greedy(decoder, on_ids) if self.num_beams == 1 else self.beam(decoder)

    def greedy(self, decoder: Decoder, on_ids: Callable[[list[list[int]]], None]) -> list[list[int]]:
        logits_BV = decoder.start(1)
        rows: list[list[int]] = [[] for _ in logits_BV]
        is_open = [True] * len(rows)
        while True:
            chosen = self.allow(logits_BV, rows).argmax(1)
            for b, row in enumerate(rows):
                if is_open[b]:
                    row.append(int(chosen[b]))
                    is_open[b] = not self.is_over(row)
            on_ids(rows)
            if not any(is_open):
                return rows
            ids = np.where(is_open, chosen, self.pad_id)
            logits_BV = decoder.follow(ids, np.arange(len(rows)))

    def is_over(self, row: list[int]) -> bool:
        """Whether a row ends here."""
        return len(row) >= self.max_new_tokens or (len(row) >= self.min_new_tokens and self.has_ended(row))

    def allow(self, scores_BV: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores without what stands for no token, and lower for what a row has said."""
        scores_BV = np.array(scores_BV, np.float32)
        scores_BV[:, self.num_tokens :] = -np.inf
        if self.repetition_penalty != 1:
            for b, row in enumerate(rows):
                said = np.unique(np.array(row, np.int64))
                found = scores_BV[b, said]
                factor = np.where(found < 0, self.repetition_penalty, 1 / self.repetition_penalty)
                scores_BV[b, said] = found * factor
        return scores_BV

    def beam(self, decoder: Decoder) -> list[list[int]]:
        """The best beam of each row. Source: transformers' `_beam_search`, without sampling and early stopping."""
        logits, beams = decoder.start(self.num_beams), self.num_beams
        size = len(logits) // beams
        rows = [[_Beam(0.0 if k == 0 else NEVER) for k in range(beams)] for _ in range(size)]
        done: list[list[_Beam]] = [[] for _ in range(size)]
        is_open = [True] * size
        while True:
            flat = [beam.ids for row in rows for beam in row]
            scores = self.allow(log_softmax(logits), flat).reshape(size, beams, -1)
            sources, is_all_over = np.zeros((size, beams), np.int64), True
            for b in range(size):
                candidates = self.extend(rows[b], scores[b])
                over = [self.is_over(list(beam.ids)) for beam in candidates]
                is_all_over &= all(over)
                if is_open[b]:
                    done[b] = self.finish(done[b], candidates, over)
                going = [replace(c, score=c.score + (NEVER if o else 0.0)) for c, o in zip(candidates, over)]
                rows[b] = sorted(going, key=lambda beam: -beam.score)[:beams]
                best = rows[b][0].score / len(rows[b][0].ids) ** self.length_penalty
                is_open[b] &= len(done[b]) < beams or best > min(beam.score for beam in done[b])
                sources[b] = [beam.source + b * beams for beam in rows[b]]
            if is_all_over or not any(is_open):
                return [list(found[0].ids) for found in done]
            logits = decoder.follow(np.array([beam.ids[-1] for row in rows for beam in row]), sources.flatten())

    def extend(self, row: list["_Beam"], scores_KV: np.ndarray) -> list["_Beam"]:
        """The best continuations of a row's beams, the best first."""
        total = scores_KV + np.array([beam.score for beam in row], np.float32)[:, None]
        keep = min(max(2, 1 + self.num_ends) * self.num_beams, total.size)
        flat = total.flatten()
        best = np.argpartition(-flat, keep - 1)[:keep]
        best = best[np.argsort(-flat[best], kind="stable")]
        places = [divmod(int(i), total.shape[1]) for i in best]
        return [_Beam(float(total[k, v]), (*row[k].ids, v), k) for k, v in places]

    def finish(self, done: list["_Beam"], candidates: list["_Beam"], over: list[bool]) -> list["_Beam"]:
        """The best finished beams, those of this step among them; only the best continuations may finish."""
        ended = [
            _Beam(beam.score / len(beam.ids) ** self.length_penalty, beam.ids)
            for beam, is_over in list(zip(candidates, over))[: self.num_beams]
            if is_over
        ]
        return sorted([*done, *ended], key=lambda beam: -beam.score)[: self.num_beams]


@dataclass(frozen=True)
class _Beam:
    score: float
    ids: tuple[int, ...] = ()
    source: int = 0  # beam of the step before


def log_softmax(logits_BV: np.ndarray) -> np.ndarray:
    """The natural log-probabilities, [B, V]."""
    shifted = logits_BV - logits_BV.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
