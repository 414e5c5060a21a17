"""Whether the ids of two tokenizers mean the same, which a loss that compares logits id by id must know.

Sizes do not tell: one family pads its heads to several sizes, and two families can share one by chance. Nor does the
table of tokens alone: the same tokens can be cut from a text in several ways.
"""

import json
from collections.abc import Mapping


def shared_vocab_size(teacher_ids: Mapping[str, int], student_ids: Mapping[str, int]) -> int:
    """Number of leading ids that mean the same token to teacher and student.

    Heads padded beyond it (Qwen2.5: 151,936 rows and 152,064) agree where it counts: give it to the losses as
    `vocab_size`, and slice dense targets to it.

    Args:
        teacher_ids: token to id, as `tokenizer.get_vocab()` returns it, added tokens among them.
        student_ids: the student's.

    Returns:
        The smaller vocabulary's size: every id below it is the same token on both sides.

    Raises:
        ValueError: an id below it means two different tokens, or one side has a hole where the other has a token.
    """
    teacher = {index: token for token, index in teacher_ids.items()}
    student = {index: token for token, index in student_ids.items()}
    size = min(max(teacher, default=-1), max(student, default=-1)) + 1
    differing = [index for index in range(size) if teacher.get(index) != student.get(index)]
    if differing or not size:
        example = differing[0] if differing else 0
        raise ValueError(
            f"student's tokenizer ({len(student):,} tokens) is not the teacher's ({len(teacher):,} tokens), but "
            f"id-by-id losses need equal ids; {len(differing):,} of the first {size:,} differ (id {example} is "
            f"{student.get(example)!r}, the teacher's {teacher.get(example)!r}); set loss.cross_tokenizer=chunk."
        )
    return size


def splits_text_alike(teacher_tokenizer, student_tokenizer, shared: int) -> bool:
    """Whether two tokenizers that share their first ids cut every text into the same of them, as far as they say.

    Rules are compared, not texts: normalizer, splits, merges and scores, and how added tokens are found. Two that are
    written in other words may still cut alike, which is then not seen.

    Args:
        teacher_tokenizer: one of transformers'.
        student_tokenizer: the same.
        shared: leading ids that mean the same token to both; added tokens behind them are not looked at.
    """
    return _cutting_rules(teacher_tokenizer, shared) == _cutting_rules(student_tokenizer, shared)


def _cutting_rules(tokenizer, shared: int) -> dict:
    """All that decides which ids a text without special tokens becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one that Python or sentencepiece runs
        names = ("legacy", "add_prefix_space", "do_lower_case")
        return {"class": type(tokenizer).__name__} | {name: getattr(tokenizer, name, None) for name in names}
    rules = json.loads(backend.to_str())
    added = [token for token in rules["added_tokens"] if token["id"] < shared]
    return {name: rules[name] for name in ("normalizer", "pre_tokenizer", "model")} | {"added_tokens": added}
