"""The divergence of the student's next token from the teacher's, times temperature squared."""

from distill.objective.terms.needs import Held, lacks_temperature
from distill.objective.terms.term import HeadTerm


class TokenDivergence(HeadTerm):
    """Of each supervised position; across tokenizers of those that are the same token on both sides."""

    title = "Divergence from the teacher (nat a token)"
    needs_teacher = True
    settings = ("kl_kind", "temperature")

    def lacks(self, loss, held: Held) -> str | None:
        """Some codecs' targets tell some divergences alone, as draws do; others must have the temperature."""
        codec = held.codec
        if codec is None or codec.kl_kinds is None:
            return lacks_temperature(loss, held)
        if codec.tells(loss.kl_kind, loss.temperature):
            return None
        return (
            f"loss.kl_kind is {loss.kl_kind} at loss.temperature {loss.temperature:g}, but "
            f"{'draws' if codec.is_random else 'targets'} of the teacher (cache.codec={codec.name}) give "
            f"{' and '.join(codec.kl_kinds)} at temperature 1 alone; use that, or cache with cache.codec=topk."
        )

    def count(self, m) -> int:
        """Positions at which the teacher says something of the student's token."""
        crossed = m.targets.cross
        return m.batch.num_supervised if crossed is None else int(crossed.is_matched_S.sum())
