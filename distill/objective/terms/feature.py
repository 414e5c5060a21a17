"""The distance of the student's Q-Former queries to the teacher's, window by window.

Shapes: B batch, W windows that both have, Q queries a window, E width.
"""

from typing import TYPE_CHECKING

from distill.objective.features import feature_loss
from distill.objective.terms.needs import Held
from distill.objective.terms.term import Seen, SeenTerm

if TYPE_CHECKING:
    from torch import Tensor


class QueryDistance(SeenTerm):
    """Of each window that student and teacher share."""

    title = "Feature loss"
    needs_teacher = True
    settings = ("feature_kind",)

    def lacks(self, loss, held: Held) -> str | None:
        """The Q-Former's queries."""
        if held.has_queries:
            return None
        return (
            "loss.feature is above 0, but the teacher's targets hold no Q-Former queries; cache again with "
            "cache.features=int8, or set loss.feature=0."
        )

    def rows(self, m) -> "Tensor":
        """The batch row of each shared window, row after row: row_W."""
        shared = m.batch.row_S.new_tensor(shared_windows(m.batch, m.targets))
        return shared.new_tensor(range(len(shared))).repeat_interleave(shared)

    def values(self, seen: Seen) -> "Tensor":
        """The distance of each shared window's queries: feature_W."""
        from torch import cat

        shared = shared_windows(seen.batch, seen.targets)
        own_WQE, theirs_WQE = (
            cat([queries_BWQE[b, :w] for b, w in enumerate(shared)])
            for queries_BWQE in (seen.heard.queries_BWQE, seen.targets.queries_BWQE)
        )
        return feature_loss(seen.loss.feature_kind, seen.project("feature", own_WQE), theirs_WQE, self.rows(seen))

    def projections(self, student, loss) -> dict[str, tuple[str, int]]:
        """The queries."""
        return {"feature": (loss.feature_kind, student.config.qformer_width)}


def shared_windows(batch, targets) -> list[int]:
    """Windows of each clip that student and teacher both have."""
    own = [row.num_audio_tokens // targets.queries_BWQE.shape[2] for row in batch.rows]
    return [min(a, b) for a, b in zip(own, targets.num_windows_B)]
