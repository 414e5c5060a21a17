"""What a student says itself, as samples to learn from: for a round, and of a share of a step's clips within the step.

Source: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024 (arXiv 2306.13649). Its lambda is
`on_policy.step_share`; there a whole step is on-policy or not, here each clip of it. Knows no loss and no file.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from distill.config import LossConfig, OnPolicyConfig
from distill.config.rules import check_own_answers
from shards.audio.augment import sample_seed
from shards.sample import Sample
from teachers.salmonn import Salmonn
from teachers.teacher import Teacher
from teachers.words.draws import Draw
from teachers.words.ending import TextEnd, find_end


@dataclass(frozen=True)
class OwnAnswers:
    """Lets a student answer, and puts what it said in the place of the samples' texts.

    Attributes:
        student: in evaluation mode when it is asked.
        end_ids: the teacher's end of an answer.
        num_shared: ids that are the same token to both; 0: none is, and the answer goes on as text.
        how: temperature and length of the answers.
    """

    student: Salmonn
    end_ids: Sequence[int]
    num_shared: int
    how: OnPolicyConfig

    def __call__(self, samples: Sequence[Sample], names: Sequence[str],
                 frames: list[Tensor] | None = None) -> list[Sample]:  # fmt: skip
        """The samples with the student's answers; `names` seed the draws, `frames` are taken over when given."""
        options = {"max_new_tokens": self.how.max_new_tokens}
        if self.how.temperature:
            options["logits_processor"] = [Draw(names, self.how.temperature, self.how.max_new_tokens)]
        batch = self.student.collate(samples, with_answer=False).to(self.student.device)
        rows = self.student.generate_ids(batch, frames=frames, **options)
        return [self.put(sample, ids) for sample, ids in zip(samples, rows)]

    def put(self, sample: Sample, ids: list[int]) -> Sample:
        """The student's own tokens where the teacher has the same, else their text."""
        student, rows, num_said = self.student, self.student.rows, len(ids)
        sample = replace(sample, text=student.read(ids))
        end = find_end(ids, student.ends)
        if isinstance(end, TextEnd):
            before = end.before(ids)
            is_whole = before is None and end.spells(ids) and num_said <= rows.max_answer_tokens
        else:
            before, is_whole = ids[: len(ids) - len(end)] if end else ids, False
        if max(ids, default=0) >= self.num_shared or (before is None and not is_whole):
            return sample
        if is_whole:  # a token is both answer and end
            return replace(sample, answer_ids=tuple(ids))
        before = before[: rows.max_answer_tokens]
        text = student.tokenizer.decode(before, skip_special_tokens=True).strip()
        return replace(sample, text=text, answer_ids=(*before, *self.end_ids))


class StepAnswers:
    """Lets the student in training answer a share of a step's clips, before the teacher says what it thinks of them.

    Seed, step and key decide which clips those are and what is drawn, so neither ranks nor a resumption change them.

    Args:
        answer: lets the student answer.
        seed: the seed of the run.
        score: lets the teacher add to the answered samples what its targets of them need.
    """

    def __init__(self, answer: OwnAnswers, seed: int, score: Callable[[Sequence[Sample]], list[Sample]] = list):
        self.answer, self.seed, self.score = answer, seed, score
        self.number, self.seconds = 0, 0.0  # of the answers since they were last told

    def choose(self, samples: Sequence[Sample], step: int) -> list[int]:
        """The places of the samples to answer; one that comes with an answer of a round keeps that."""
        least = self.answer.how.step_share * 2**128
        return [
            place
            for place, sample in enumerate(samples)
            # no key holds a dot, so this is the draw of nothing else
            if sample.student_answer is None and sample_seed(self.seed, step, f"{sample.key}.within") < least
        ]

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample], chosen: Sequence[int], step: int,
                 frames: list[Tensor] | None) -> list[Sample]:  # fmt: skip
        """The samples, those chosen with the student's answer, said without dropout.

        Args:
            samples: of a micro-batch.
            chosen: places of those to answer, at least one.
            step: from 0.
            frames: of all the samples, as the student's ears give them; None: it hears the clips again.
        """
        student, asked = self.answer.student, [samples[place] for place in chosen]
        if student.device.type == "cuda":
            torch.cuda.synchronize()  # what was to be done before is no cost of the answers
        began, was_training = time.perf_counter(), student.training
        own = None if frames is None else [x_BRE[list(chosen)] for x_BRE in frames]
        student.eval()
        said = self.answer(asked, [f"{self.seed}/step {step}/{sample.key}" for sample in asked], own)
        student.train(was_training)
        said = self.score(said)
        self.number, self.seconds = self.number + len(said), self.seconds + time.perf_counter() - began
        by_place = dict(zip(chosen, said))
        return [
            replace(by_place[place], is_said_now=True) if place in by_place else sample
            for place, sample in enumerate(samples)
        ]

    def tell(self) -> dict[str, float]:
        """How many answers there were since the last call, and the seconds that they took."""
        told = {"own_answers": self.number, "answering": self.seconds}
        self.number, self.seconds = 0, 0.0
        return told


def cost_of_answers(totals: Mapping[str, float], seconds: float, num_ranks: int) -> dict[str, float]:
    """What the log says of a step's own answers: their number, and the share of the step that they took.

    Args:
        totals: over all ranks; empty of them where nothing is answered within the steps.
        seconds: what the step has taken.
        num_ranks: which answer side by side.
    """
    if "own_answers" not in totals:
        return {}
    return {"own_answers": int(totals["own_answers"]), "answering": totals["answering"] / num_ranks / seconds}


class AnswerCost:
    """The callback that says in the end what a run's own answers cost.

    Args:
        say: is told.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.number, self.answering, self.seconds = say, 0, 0.0, 0.0

    def on_step(self, run, record: dict[str, float]) -> None:
        """Add a step's."""
        self.number += record["own_answers"]
        self.answering += record["answering"] * record["seconds"]
        self.seconds += record["seconds"]

    def on_end(self, run, result) -> None:
        """Say it."""
        self.say(f"the student's {self.number:,} own answers took {self.answering:.1f} s of the steps' "
                 f"{self.seconds:.1f}, {self.answering / max(self.seconds, 1e-9):.0%}")  # fmt: skip


def answer_within(how: OnPolicyConfig, loss: LossConfig, teacher: Teacher, student: Salmonn, *, num_shared: int,
                  is_sharded: bool, seed: int) -> StepAnswers | None:  # fmt: skip
    """What answers within the steps; None: nothing does.

    Args:
        how: the settings.
        loss: the objective that learns from the answers.
        teacher: that is to score them, as it meets the student.
        student: that answers.
        num_shared: ids that are the same token to both.
        is_sharded: whether a rank holds only a part of each of the student's tensors.
        seed: the seed of the run.

    Raises:
        ValueError: there is no teacher that could score what was said just now, no term learns from it, or no rank
            holds a whole student.
    """
    if not how.step_share:
        return None
    share = f"on_policy.step_share is {how.step_share:g}, but"
    if not teacher.scores_any_answer:
        who = f"a cache, {teacher.cache_folder}," if teacher.cache_folder else "one that computes no targets"
        raise ValueError(
            f"{share} the teacher is {who if teacher.has_targets else 'None'} and cannot score what the student says "
            f"in the step; give one that runs, or learn from a round (`distill answers`)."
        )
    check_own_answers(how, loss)
    if is_sharded:
        raise ValueError(
            f"{share} this launch leaves no rank a whole student to answer; launch with "
            f"configs/accelerate/two_gpus_zero2.yaml, or learn from a round (`distill answers`)."
        )
    end_ids = (teacher.rows or student.rows).end_ids
    return StepAnswers(OwnAnswers(student, end_ids, 0 if teacher.is_crossed else num_shared, how), seed, teacher.score)


def identify_step_answers(how: OnPolicyConfig) -> dict:
    """What must stay as it was for a run with answers within its steps to go on."""
    if not how.step_share:
        return {}
    return {"on_policy": {n: v for n, v in asdict(how).items() if n in ("step_share", "temperature", "max_new_tokens")}}
