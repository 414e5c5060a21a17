"""A teacher that runs: a frozen model that computes its targets in every step.

Shapes: B batch, S supervised positions, V vocabulary, W windows, Q queries a window, E query width, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from shards.sample import Sample
from shards.targets.distributions import Distribution
from teachers.blocks import record_blocks
from teachers.files.identity import describe_model
from teachers.logits import head_logits
from teachers.salmonn import Salmonn
from teachers.targets import Targets
from teachers.teacher import Teacher, learns_own_answer, take_student_answer
from teachers.words.batch import Batch
from teachers.words.generation import ANSWERS
from teachers.words.rows import RowTokenizer
from teachers.words.vocabulary import Vocabulary, check_answer_ids


class OnlineTeacher(Teacher):
    """A frozen SALMONN that computes its targets in every step.

    Args:
        model: the teacher.
        k: ids kept a position; None keeps the whole vocabulary, exact at any temperature.
        temperatures: those the targets can be had at.
        answers: whose answers are learned: "label" where a clip has one, "teacher": always its own, "both": by turns.
        max_new_tokens: the most tokens of its own answer.
        num_beams: the number of beams of it.
        hidden_layers: LLM blocks whose outputs its targets hold, 1 is the first.
    """

    def __init__(self, model: Salmonn, *, k: int | None = None, temperatures: Sequence[float] = (1.0,),
                 answers: str = "label", max_new_tokens: int = 60, num_beams: int = 1,
                 hidden_layers: Sequence[int] = ()):  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.k, self.temperatures, self.answers = k, temperatures, answers
        self.max_new_tokens, self.num_beams, self.hidden_layers = max_new_tokens, num_beams, hidden_layers
        self.widths = {"feature": model.config.qformer_width, "hidden": model.project.out_features,
                       "frames": model.whisper.width}  # fmt: skip

    @cached_property
    def vocab(self) -> Vocabulary:
        """That of the model's tokenizer."""
        return Vocabulary.of(self.model.tokenizer)

    @property
    def rows(self) -> RowTokenizer:
        """The model's own."""
        return self.model.rows

    @cached_property
    def identity(self) -> dict:
        """The model, and what is asked of it."""
        return {
            **describe_model(self.model, self.model.llm.dtype),
            "k": self.k,
            "temperatures": list(self.temperatures),
            "hidden_layers": list(self.hidden_layers),
            "answers": {
                "of": self.answers,
                "max_new_tokens": self.max_new_tokens,
                "num_beams": self.num_beams,
                "version": ANSWERS,
            },
        }

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """Put the teacher's own answer where it is the one to learn, and say where that is."""
        samples = [take_student_answer(sample) for sample in samples]
        is_pseudo = [learns_own_answer(sample, self.answers) for sample in samples]
        answers = iter(self.answer([sample for sample, is_own in zip(samples, is_pseudo) if is_own]))
        return [replace(s, text=next(answers)) if is_own else s for s, is_own in zip(samples, is_pseudo)], is_pseudo

    def answer(self, samples: Sequence[Sample], frames: list[Tensor] | None = None) -> list[str]:
        """The teacher's own answers, greedy or by beam search; `frames` of these clips are taken over when given."""
        if not samples:
            return []
        heard = [sample.as_the_teacher_hears_it for sample in samples]
        options = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        return self.model.generate(heard, frames=frames, **options)

    @torch.no_grad()
    def targets(self, batch: Batch, frames: list[Tensor] | None = None) -> Targets:
        """Run the teacher on the batch's samples; `frames` of shared ears are taken over when given.

        Raises:
            ValueError: the batch's rows hold other ids of an answer than the teacher's own tokenizer gives.
        """
        own = self.model.collate([sample.as_the_teacher_hears_it for sample in batch.samples]).to(self.model.device)
        for sample, theirs, students in zip(batch.samples, own.rows, batch.rows):
            check_answer_ids(sample, theirs.answer, students.answer, self.model.tokenizer)
        heard = self.model.hear(own, frames)
        with record_blocks(self.model, self.hidden_layers) as outputs:
            hidden_SD = self.model.answer_states(own, heard)
        logits_SV = head_logits(self.model.llm, hidden_SD)
        label_logprobs_S = logits_SV.log_softmax(-1).gather(1, own.labels_S[:, None])[:, 0]
        distribution = Distribution.from_logits(logits_SV, self.k, self.temperatures)
        layers = {n: x_BTD.flatten(0, 1)[own.predicting_S] for n, x_BTD in outputs.items()}
        queries_BWQE = heard.queries_BWQE if self.model.has_queries else None
        return Targets(
            distribution, queries_BWQE, heard.num_windows_B, label_logprobs_S, hidden_SD, layers, heard.frames
        )
