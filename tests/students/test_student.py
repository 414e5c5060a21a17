"""What ends a student's answers where its tokenizer is another than the teacher's."""

import pytest
import tiny

from distill.demo.tokenizer import train_byte_tokenizer, train_tokenizer
from distill.objective.crossteacher import CrossTeacher
from distill.teach import build_llm
from students.student import build_student, load_student, save_student
from teachers.lora import Lora
from teachers.targets import OnlineTeacher

LORA = Lora(rank=4)
END = "<|end_of_text|>"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The toys' parts, whose LLM's tokenizer has `END` as one token, and a LLM of another family."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    tokenizer = train_tokenizer([*tiny.WORDS, "USER: ASSISTANT: what do you hear?"], folder / "ended", vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    for name in ("llm", "student-llm"):
        tokenizer.save_pretrained(folder / name)
        build_llm(len(tokenizer), 64, 1, tokenizer).save_pretrained(folder / name)
    other = train_byte_tokenizer([*tiny.WORDS, "USER: ASSISTANT: what do you hear?"], folder / "other", vocab_size=300)
    build_llm(len(other), 32, 1, other).save_pretrained(folder / "other")
    return folder


def build(parts, llm, lines):
    teacher = tiny.make_teacher(parts, end_token=END)
    assert len(teacher.rows.end_ids) == 1
    return teacher, build_student(teacher, str(parts / llm), lora=LORA, quantization="none", connector="new",
                                  say=lines.append)  # fmt: skip


def test_a_student_of_another_family_ends_with_its_own_end_token(parts, tmp_path):
    lines = []
    teacher, student = build(parts, "other", lines)
    assert student.rows.end_ids == [student.tokenizer.eos_token_id]
    assert len(lines) == 1 and f"as {END} is " in lines[0]
    translator = CrossTeacher(OnlineTeacher(teacher), student, 1.0).translator
    assert translator.twin_V[teacher.rows.end_ids[0]] == student.rows.end_ids[0]
    save_student(student, tmp_path, lora=LORA, quantization="none")
    assert load_student(tmp_path).rows.end_ids == student.rows.end_ids


def test_a_student_of_the_teachers_family_ends_as_the_teacher_does(parts):
    lines = []
    teacher, student = build(parts, "student-llm", lines)
    assert student.rows.end_ids == teacher.rows.end_ids and lines == []
