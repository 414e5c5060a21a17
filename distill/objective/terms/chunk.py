"""The likelihood of the chunks of the answers at whose ends the tokenizers of teacher and student agree."""

from typing import TYPE_CHECKING

from distill.objective.terms.needs import Held, lacks_temperature
from distill.objective.terms.term import HeadTerm

if TYPE_CHECKING:
    from torch import Tensor


class ChunkLikelihood(HeadTerm):
    """Of each chunk of the answers, see `crosstokenizer.chunk_likelihood`."""

    title = "Likelihood of chunks"
    needs_teacher = True
    only_crossed = True
    settings = ("chunk_temperature", "temperature")

    def lacks(self, loss, held: Held) -> str | None:
        """A teacher of another tokenizer is translated at the temperature of the divergence."""
        return lacks_temperature(loss, held)

    def rows(self, m) -> "Tensor":
        """The batch row of each chunk: row_C."""
        alignment, row_S = m.targets.cross.alignment, m.batch.row_S
        chunk_S = alignment.student_chunk_S
        rows = row_S.new_zeros(alignment.num_chunks + 1)  # the last place takes the tokens without a chunk
        return rows.scatter(0, chunk_S.where(chunk_S >= 0, alignment.num_chunks), row_S)[:-1]
