"""A student with a prefix: trained as a run, by one process and by two, saved, loaded, planned; exported or refused."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from distill.cache import cache
from distill.cli import main
from distill.config import StudentConfig, load_config
from distill.demo.scratch import build_llm
from distill.doctor.doctor import build_case
from distill.doctor.objective import check_gradients
from distill.evaluation.report import read_metrics
from distill.run import run
from distill.sizes.costs import describe_student, describe_teacher, measure_sizes
from students import Student, build_student, give_prefix_, load_student, save_student
from students.student import trained_names
from teachers.files.loading import load_salmonn, save_salmonn
from teachers.lora import Lora
from teachers.words.prefix import is_of_prefix, without_prefix

SAMPLES = [tiny.make_sample(1), tiny.make_sample(2, seconds=1.3)]
WIDTH = 64  # of the student's LLM, which a device's graph has in blocks of so many


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_parts(folder / "parts")
    tokenizer = AutoTokenizer.from_pretrained(folder / "parts/student-llm")
    build_llm(len(tokenizer), WIDTH, 2, tokenizer).save_pretrained(folder / "parts/student-llm")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    tiny.make_shards(folder / "data", num_samples=8)
    tiny.make_shards(folder / "data", num_samples=4, split="test")
    path = tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts",
                             precision="float32", student__prefix_tokens=3, train__learning_rate=0.05,
                             train__steps=2)  # fmt: skip
    assert cache(load_config(path)) == 0
    return folder


def configure(toys, name, *words):
    return load_config(toys / "toy.yaml", [f"name={name}", *words])


def tensors_of(toys, name) -> dict[str, torch.Tensor]:
    return load_file(toys / "runs" / name / "student/model.safetensors")


def prefix_of(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if is_of_prefix(name)}


@pytest.fixture(scope="module")
def finished(toys):
    """The folder of a run that trained a prefix so fast that its student answers otherwise than without."""
    config = configure(toys, "finished")
    assert run(config) == 0
    student = load_student(config.run_folder / "student")
    with without_prefix(student.llm):
        deaf = logits_of(student)
    assert (logits_of(student) - deaf).abs().max() > 0.05  # what an export that forgot it would be off by
    return config.run_folder


@torch.no_grad()
def logits_of(student) -> torch.Tensor:
    return student(student.collate(SAMPLES))[0]


def answer(student) -> list[str]:
    return student.generate(SAMPLES, max_new_tokens=6)


# Trained, saved, loaded


def test_a_run_trains_it_beside_lora_in_4_bits_and_its_folder_answers_alike(toys, finished, tmp_path):
    trained = prefix_of(tensors_of(toys, "finished"))
    assert len(trained) == 4 and all(tensor.shape[1] == 3 for tensor in trained.values())
    assert all(tensor.any() for tensor in trained.values())  # values began as zeros
    stored = json.loads((finished / "student/config.json").read_text())
    assert stored["model"]["prefix_tokens"] == 3 and "llm" in stored["frozen"]
    student = load_student(finished / "student")
    save_salmonn(student, tmp_path, settings=stored["settings"])
    assert torch.equal(logits_of(load_student(tmp_path)), logits_of(student))
    exact = Student.from_pretrained(finished / "student", device="cpu", dtype=torch.float32)
    assert answer(exact.model) == answer(student)
    fast, whole = logits_of(load_student(finished / "student", for_inference=True)), logits_of(student)
    assert (fast - whole).norm() < 0.02 * whole.norm()  # 4 bits may be packed, and a near tie end otherwise


def test_a_run_says_what_it_adds_and_the_doctor_finds_a_gradient_in_all_of_it(toys, capsys):
    assert run(configure(toys, "said", "student.quantization=none")) == 0
    assert "a prefix of 3 tokens in 2 layers: 0.00" in capsys.readouterr().err
    case = build_case(configure(toys, "examined"))
    assert "tensors" in check_gradients(case)
    assert len([n for n in trained_names(case.student) if is_of_prefix(n)]) == 4


def test_a_run_goes_on_as_if_it_had_not_stopped_and_another_starts_from_its_student(toys, finished):
    run(configure(toys, "halved", "train.stop_after=1"))
    assert run(configure(toys, "halved")) == 0
    whole, resumed = tensors_of(toys, "finished"), tensors_of(toys, "halved")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    words = [f"student.start={finished}/student", "train.learning_rate=1e-12"]
    assert run(configure(toys, "started", *words)) == 0
    assert all(torch.allclose(x, whole[name], atol=1e-6) for name, x in tensors_of(toys, "started").items())
    with pytest.raises(ValueError, match=r"whose prefix_tokens is 3, but this run's is 0; set it as it was"):
        run(configure(toys, "other", *words, "student.prefix_tokens=0"))
    with pytest.raises(ValueError, match=r"student\.prefix_tokens: 3 there, 2 here"):
        run(configure(toys, "finished", "student.prefix_tokens=2", "train.steps=3"))


def test_two_ranks_train_the_prefix_that_one_does(toys, finished):
    tiny.run_two_ranks(run, configure(toys, "two"))
    alone, two = tensors_of(toys, "finished"), tensors_of(toys, "two")
    assert alone.keys() == two.keys()
    for name, tensor in prefix_of(alone).items():
        torch.testing.assert_close(tensor, two[name], atol=1e-3, rtol=1e-3)
    losses = [[r["loss"] for r in read_metrics(toys / "runs" / n / "metrics.jsonl")[0]] for n in ("finished", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_blocks_that_run_again_in_the_backward_give_the_same_gradients(toys, finished):
    assert run(configure(toys, "again", "train.gradient_checkpointing=true")) == 0
    again = tensors_of(toys, "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors_of(toys, "finished").items())


def test_a_student_in_python_is_given_one_also_once_it_was_loaded(toys, tmp_path):
    lora, teacher = Lora(rank=4), tiny.make_teacher(toys / "parts").eval()
    student = build_student(teacher, str(toys / "parts/student-llm"), lora=lora, say=lambda text: None)
    save_student(student, tmp_path / "plain", lora=lora, quantization="nf4")
    loaded = load_student(tmp_path / "plain")
    found = give_prefix_(loaded, 2)
    assert found.layers == 2 and found.difference > 0 and loaded.config.prefix_tokens == 2
    save_student(loaded, tmp_path / "prefixed", lora=lora, quantization="nf4")
    assert torch.equal(logits_of(load_student(tmp_path / "prefixed")), logits_of(loaded))


def test_a_student_of_such_a_student_has_none_of_its_own_unless_it_is_said(toys, finished):
    teacher = load_salmonn(finished / "student")
    assert teacher.config.prefix_tokens == 3
    student = build_student(teacher, str(toys / "parts/student-llm"), lora=Lora(rank=4), say=lambda text: None)
    assert student.config.prefix_tokens == 0 and not any(is_of_prefix(name) for name, _ in student.named_parameters())


def test_a_plan_counts_it_as_trained(toys, finished):
    config = configure(toys, "finished")
    blueprint = describe_student(config, describe_teacher(config)[0])
    number = sum(tensor.numel() for tensor in prefix_of(tensors_of(toys, "finished")).values())
    assert measure_sizes(blueprint)["prefix"] == (number, 4.0 * number)
    assert "prefix" in blueprint.trained


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match=r"student\.prefix_tokens is -1, but must be 0 or more"):
        StudentConfig(prefix_tokens=-1)


# Exported


def test_a_whole_export_answers_with_it_wherever_it_lies_and_its_card_says_so(finished, tmp_path):
    assert main(["export", str(finished), str(tmp_path / "out"), "--whole"]) == 0
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    assert torch.equal(logits_of(load_student(moved)), logits_of(load_student(finished / "student")))
    assert "with LoRA and a prefix of 3 tokens" in (tmp_path / "moved/README.md").read_text()


@pytest.mark.parametrize("words", [["--merge"], ["--format", "vllm"], ["--format", "gguf-q8_0"], ["--salmonn"]])
def test_a_file_that_cannot_hold_it_is_refused_and_none_is_left(finished, tmp_path, capfd, words):
    assert main(["export", str(finished), str(tmp_path / "out"), *words]) == 1
    assert "prefix_tokens of the student is 3, but" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
