"""Whether the ids of two tokenizers mean the same, which a loss that compares logits id by id must know.

Sizes do not tell: one family pads its heads to several sizes, and two families can share one by chance.
"""

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
