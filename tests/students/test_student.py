"""What ends a student's answers where its tokenizer is another than the teacher's."""

import pytest
import tiny

from distill.demo.scratch import build_llm
from distill.demo.tokenizer import train_byte_tokenizer, train_tokenizer
from distill.objective.crossteacher import CrossTeacher
from students.hearing import Connector
from students.quantize import quantize_4bit_
from students.student import build_student, load_student, save_student
from teachers.lora import ALL_LINEAR, Lora, add_lora_
from teachers.online import OnlineTeacher

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
    return teacher, build_student(teacher, str(parts / llm), lora=LORA, quantization="none", connector=Connector("new"),
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


@pytest.mark.parametrize("family", ["mixtral", "llama", "gpt2"])
def test_all_linear_gives_lora_to_every_linear_layer_but_the_head_and_the_experts(family):
    import transformers

    sizes = {"vocab_size": 32, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
    llama = {**sizes, "intermediate_size": 64, "num_key_value_heads": 1}
    config = {
        "mixtral": lambda: transformers.MixtralConfig(**llama, num_local_experts=2),
        "llama": lambda: transformers.LlamaConfig(**llama),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=32, n_layer=2, n_embd=64, n_head=2),
    }[family]()
    llm = transformers.AutoModelForCausalLM.from_config(config)
    if family != "gpt2":  # whose Conv1D has no 4-bit form
        quantize_4bit_(llm)
    add_lora_(llm, Lora(rank=2, targets=(ALL_LINEAR,)))
    got = {name.split(".")[-4] for name, _ in llm.named_parameters() if "lora_A" in name}
    assert (
        got
        == {
            "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
            "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            "gpt2": {"c_attn", "c_proj", "c_fc"},
        }[family]
    )


def test_a_llm_none_of_whose_layers_can_have_lora_is_refused_with_the_kinds_that_can():
    import transformers

    sizes = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
    llm = transformers.AutoModelForCausalLM.from_config(transformers.FalconConfig(**sizes))
    with pytest.raises(ValueError, match="no layer of FalconForCausalLM is a Linear or Conv1D or Linear4bit beside"):
        add_lora_(llm, Lora(targets=(ALL_LINEAR,)))


def test_targets_that_a_mixture_has_not_are_named_with_those_it_has():
    import transformers

    sizes = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, intermediate_size=64, num_key_value_heads=1, num_local_experts=2)
    llm = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"no layer named .*gate_proj.*k_proj, o_proj, .*or \[all-linear\] for all"):
        add_lora_(llm, Lora())
