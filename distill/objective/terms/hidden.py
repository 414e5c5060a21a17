"""The distance of the LLM's hidden states to the teacher's, position by position.

Shapes: S supervised positions, D LLM width.
"""

from typing import TYPE_CHECKING

from distill.objective.features import feature_loss
from distill.objective.terms.needs import Held
from distill.objective.terms.term import Seen, SeenTerm
from shards.targets.header import HEAD_INPUT

if TYPE_CHECKING:
    from torch import Tensor


class StateDistance(SeenTerm):
    """Of each supervised position: the mean over `loss.layer_pairs`."""

    title = "Distance of hidden states"
    needs_teacher = True
    settings = ("hidden_kind", "hidden_layers")

    def lacks(self, loss, held: Held) -> str | None:
        """The states of each of the teacher's layers that is named."""
        lost = sorted(set(loss.layer_pairs) - set(held.layers))
        if not lost:
            return None
        return (
            f"loss.hidden is above 0, but the teacher's targets hold no states of layer {lost[0]}; cache again with "
            f"cache.hidden_layers=[{lost[0]}], or set loss.hidden=0."
        )

    def values(self, seen: Seen) -> "Tensor":
        """The distance at each position: hidden_S."""
        from torch import stack

        theirs = seen.targets.hidden_by_layer | {HEAD_INPUT: seen.targets.hidden}
        return stack([
            feature_loss(seen.loss.hidden_kind, seen.project(f"hidden{layer}", seen.states(own)), theirs[layer],
                         self.rows(seen))
            for layer, own in seen.loss.layer_pairs.items()
        ]).mean(0)  # fmt: skip

    def layers(self, loss) -> set[int]:
        """The student's of each pair."""
        return set(loss.layer_pairs.values()) - {HEAD_INPUT}

    def projections(self, student, loss) -> dict[str, tuple[str, int]]:
        """The states of each pair, by the teacher's layer."""
        width = student.project.out_features
        return {f"hidden{layer}": (loss.hidden_kind, width) for layer in loss.layer_pairs}
