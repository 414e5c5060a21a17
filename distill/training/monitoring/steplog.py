"""What a step's micro-batches tell the log, kept on the device until the step is over, then read at once.

A figure that is read of every micro-batch makes the host wait until the device has done it, and the device then waits
for the host's next one. Knows terms by name, no model.

Shapes: B batch, X elements of a term.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.objective.module import Found
from distill.objective.weighing import MicroBatch, Terms, present_terms


class StepLog:
    """Gathers one step of one rank.

    Args:
        terms: those of the run.
        tasks: the tasks of all samples of the run, the same on every rank; fewer than two are not told apart.
    """

    def __init__(self, terms: Terms, tasks: Sequence[str]):
        self.terms, self.tasks = terms, tasks if len(tasks) > 1 else ()
        self.names: list[str] = []  # of the figures below, which are added up by name
        self.figures: list[Tensor] = []  # on the device, one dimension each

    def rows(self, m: MicroBatch) -> dict[str, Tensor]:
        """The batch row of each element by term, where tasks are told apart; to be asked before the device is busy."""
        return {name: term.rows(m) for name, term in present_terms(self.terms, m.targets).items() if self._splits(m)}

    def add(self, m: MicroBatch, rows: Mapping[str, Tensor], weights: Mapping[str, Tensor], found: Found) -> None:
        """Take in what the objective found in a micro-batch; `rows` are those from above, `weights` are `weigh`'s."""
        for name, part in found.parts.items():
            self._note([name], part[None])
        self._note(["agreeing", "compared"], found.agreement_2)
        for name, row_X in rows.items():
            pair_X2 = torch.stack([found.values[name] * weights[name], weights[name]], 1)
            sums_B2 = pair_X2.new_zeros(len(m.batch.samples), 2).index_add_(0, row_X, pair_X2)
            for column, kind in enumerate(("value", "weight")):
                self._note([f"{sample.task}/{name}/{kind}" for sample in m.batch.samples], sums_B2[:, column])

    def read(self) -> dict[str, float]:
        """Every figure of this rank, under the same names on every rank: each term's part of the loss, and more."""
        kinds = [f"{task}/{term}/{kind}" for task in self.tasks for term in self.terms for kind in ("value", "weight")]
        sums = dict.fromkeys([*self.terms, "agreeing", "compared", *kinds], 0.0)
        for name, value in zip(self.names, torch.cat(self.figures).tolist(), strict=True):
            sums[name] += value
        return sums

    def record(self, sums: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
        """What the log says beside the terms, of the sums over all ranks.

        Args:
            sums: from `read`.
            weights: of the terms at this step.

        Returns:
            `agreement`, the share of the positions compared with the teacher at which both find the same token the most
            probable; and `loss/TASK`, the loss that the step would have were all its clips as those of the task.
        """
        told = {"agreement": sums["agreeing"] / sums["compared"]} if sums["compared"] else {}
        for task in self.tasks:
            there = [name for name in self.terms if sums[f"{task}/{name}/weight"]]
            means = [weights[name] * sums[f"{task}/{name}/value"] / sums[f"{task}/{name}/weight"] for name in there]
            told |= {f"loss/{task}": sum(means)} if means else {}
        return told

    def _splits(self, m: MicroBatch) -> bool:
        return bool(self.tasks) and m.is_real

    def _note(self, names: list[str], figures: Tensor) -> None:
        self.names += names
        self.figures.append(figures.detach())


def rates(totals: Mapping[str, float], seconds: float, num_ranks: int) -> dict[str, float]:
    """How fast a step was, of its `tokens`, `audio_seconds` and seconds `waited` for data over all ranks.

    Tokens are those that the LLM reads, of text and audio, without padding; `waiting` is the share of the step in which
    a rank had no data, on average.
    """
    return {
        "seconds": seconds,
        "tokens_per_second": totals["tokens"] / seconds,
        "audio_hours_per_hour": totals["audio_seconds"] / seconds,
        "waiting": totals["waited"] / num_ranks / seconds,
    }
