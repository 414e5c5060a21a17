"""What a tokenizer's ids mean; refuses teacher and student that mean other tokens, or cut an answer into others."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from shards.sample import Sample

NUM_IDS_SHOWN = 6  # of an answer's ids in a message


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's ids mean: their hash decides whether two models can be compared id by id."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, tokenizer) -> "Vocabulary":
        ids = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
        return cls(str(tokenizer.name_or_path), len(tokenizer), hashlib.sha256(ids.encode()).hexdigest())


def check_vocabularies(teacher: Vocabulary, student_tokenizer) -> None:
    """Refuse a student whose ids mean other tokens than the teacher's.

    Raises:
        ValueError: naming both tokenizers.
    """
    student = Vocabulary.of(student_tokenizer)
    if student.sha256 != teacher.sha256:
        raise ValueError(
            f"vocabulary of the student ({student.name}, {student.size:,} tokens, {student.sha256[:12]}) is not that "
            f"of the teacher ({teacher.name}, {teacher.size:,} tokens, {teacher.sha256[:12]}), but a KL compares id by "
            f"id; choose a student of the teacher's family, or set loss.cross_tokenizer=chunk."
        )


def check_answer_ids(sample: Sample, teacher_ids: Sequence[int], student_ids: Sequence[int], tokenizer) -> None:
    """Refuse an answer that teacher and student cut into other ids: one table of tokens can be cut in several ways.

    Args:
        sample: whose answer it is.
        teacher_ids: with the end token.
        student_ids: with the student's.
        tokenizer: the teacher's, which names the ids of both.

    Raises:
        ValueError: naming the sample and both sides' ids from the first that differs.
    """
    theirs, own = list(teacher_ids), list(student_ids)
    if theirs == own:
        return
    start = next((i for i, (a, b) in enumerate(zip(theirs, own)) if a != b), min(len(theirs), len(own)))
    shown = [_show_ids(ids, start, tokenizer) for ids in (own, theirs)]
    raise ValueError(
        f"answer of sample {sample.key} is {sample.text!r}, which the student reads as {shown[0]}, but the teacher as "
        f"{shown[1]} (from id {start} on), and a KL compares id by id; give both the same tokenizer files, end token "
        f"and max_answer_tokens, or set loss.cross_tokenizer=chunk."
    )


def _show_ids(ids: Sequence[int], start: int, tokenizer) -> str:
    """The ids from a place on, the first few, with their tokens."""
    part = list(ids[start : start + NUM_IDS_SHOWN])
    known = range(len(tokenizer))
    tokens = [tokenizer.convert_ids_to_tokens(i) if i in known else "(unknown)" for i in part]
    more = " …" if len(ids) > start + NUM_IDS_SHOWN else ""
    return f"{part}{more} {' '.join(map(str, tokens))}{more} of {len(ids)} ids"
