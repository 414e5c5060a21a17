"""Cross-entropy on the answers: the labels' own, and at `loss.pseudo_ce` the teacher's."""

from distill.objective.terms.term import HeadTerm


class CrossEntropy(HeadTerm):
    """Of each supervised position, but of those of a student's own answer, whose words are not the truth."""

    title = "Cross-entropy (nat a token)"
    settings = ("pseudo_ce",)

    def count(self, m) -> int:
        """Supervised positions of answers that are to be learned."""
        batch = m.batch
        return sum(len(row.answer) for s, row in zip(batch.samples, batch.rows) if not s.is_students)

    def factors(self, m, loss) -> list[float]:
        """Nothing on the student's own answer, `pseudo_ce` on the teacher's."""
        pairs = zip(m.batch.samples, m.is_pseudo)
        return [0.0 if sample.is_students else loss.pseudo_ce if is_pseudo else 1.0 for sample, is_pseudo in pairs]
