"""LoRA on a student's ears: what it changes and what it leaves alone; made, trained, saved, loaded, refused."""

import dataclasses
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from distill.cache import cache
from distill.config import Config, LossConfig, StudentConfig, TeacherConfig, TrainConfig, load_config
from distill.distiller import Distiller, Run
from distill.doctor.doctor import build_case
from distill.doctor.objective import check_gradients
from distill.evaluation.report import read_metrics
from distill.run import run
from students.ears import measure_ears_error
from students.hearing import Hearing
from students.student import build_student, load_student, save_student, trained_names
from teachers.ears.lora import LoraLinear, merge_ear_lora
from teachers.files.loading import load_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher

LORA = Lora(rank=4, targets=("q_proj", "v_proj"))
SAMPLES = [tiny.make_sample(1), tiny.make_sample(2, seconds=1.3)]
OPTIONS = TrainConfig(steps=2, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup_steps=1, save_every=2)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, precision="float32", student__quantization="none", student__ears_lora_rank=2,
                   cache__frames="float16", cache__max_new_tokens=3)  # fmt: skip
    return folder


def make_student(teacher, toys, **hearing):
    return build_student(teacher, str(toys / "parts/student-llm"), lora=LORA, quantization="none",
                         hearing=Hearing(**{"ears_lora_rank": 2} | hearing), say=lambda text: None)  # fmt: skip


def train(teacher, student, folder, toys, precision="float32", **changes):
    options, loss = dataclasses.replace(OPTIONS, **changes), LossConfig(frames=1.0)
    return Distiller(OnlineTeacher(teacher), student, train=toys / "data/train", loss=loss, options=options,
                     run=Run(folder, precision=precision)).fit()  # fmt: skip


@torch.no_grad()
def frames_of(model) -> torch.Tensor:
    batch = model.collate(SAMPLES)
    return model.frames(batch.waveforms_BN, batch.num_samples_B)[0]


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(model.collate(SAMPLES))[0]


def ears_of(model) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters() if name.startswith("whisper.")}


def randomize_(student) -> None:
    for name, parameter in student.whisper.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)


# What it is, and what it leaves alone


def test_it_begins_as_the_teachers_ears_to_the_last_bit_on_their_very_weights(toys):
    teacher = tiny.make_teacher(toys / "parts").eval()
    student = make_student(teacher, toys)
    assert torch.equal(frames_of(student), frames_of(teacher))
    theirs = {x.data_ptr() for x in teacher.whisper.parameters()}
    added = {name for name, x in student.whisper.named_parameters() if x.data_ptr() not in theirs}
    assert len(added) == 12 and all("lora_" in name for name in added)  # 6 linear layers in the only block
    assert not any(isinstance(module, LoraLinear) for module in teacher.whisper.modules())


@pytest.mark.parametrize(("precision", "recomputes"), [("float32", False), ("bf16", False), ("float32", True)])
def test_training_changes_the_adapters_alone_and_the_teacher_hears_as_before(toys, tmp_path, precision, recomputes):
    teacher = tiny.make_teacher(toys / "parts").eval()
    before, student = frames_of(teacher), make_student(teacher, toys)
    start = ears_of(student)
    train(teacher, student, tmp_path, toys, precision, gradient_checkpointing=recomputes)
    moved = {name for name, x in ears_of(student).items() if not torch.equal(x, start[name])}
    assert moved == {name for name in start if "lora_" in name}
    assert torch.equal(frames_of(teacher), before) and not torch.equal(frames_of(student), before)


@pytest.mark.parametrize(
    "form", [{}, {"ears_quantization": "int8"}, {"ears_quantization": "bf16", "whisper_layers": 1}]
)
def test_a_student_is_saved_with_its_adapters_alone_and_loads_as_it_was(toys, tmp_path, form):
    teacher = tiny.make_teacher(toys / "parts").eval()
    student = make_student(teacher, toys, **form)
    train(teacher, student, tmp_path / "run", toys)
    save_student(student.eval(), tmp_path / "student", lora=LORA, quantization="none")
    held = [name for name in load_file(tmp_path / "student/model.safetensors") if name.startswith("whisper.")]
    assert len(held) == 12 and all("lora_" in name for name in held)
    assert "whisper" in json.loads((tmp_path / "student/config.json").read_text())["frozen"]
    loaded = load_student(tmp_path / "student")
    assert torch.equal(logits_of(loaded), logits_of(student))
    coarse = frames_of(load_student(tmp_path / "student", dtype=torch.bfloat16))  # as a GPU answers
    torch.testing.assert_close(coarse, frames_of(student), atol=0.1, rtol=0.1)
    exact = make_student(teacher, toys, **form | {"ears_quantization": "none"})
    exact.whisper.load_state_dict({n: x for n, x in student.whisper.state_dict().items() if "lora_" in n}, strict=False)
    assert 0 <= measure_ears_error(exact, student, SAMPLES)["whisper"] < 0.03


@pytest.mark.parametrize("bits", ["none", "int8"])
def test_merged_ears_hear_the_same_with_plain_layers_and_the_student_keeps_its_own(toys, bits):
    student = make_student(tiny.make_teacher(toys / "parts").eval(), toys, ears_quantization=bits).eval()
    randomize_(student)
    with_lora, start = frames_of(student), ears_of(student)
    merged = merge_ear_lora(student.whisper)
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())
    batch = student.collate(SAMPLES)
    with torch.no_grad():
        torch.testing.assert_close(merged(batch.waveforms_BN, batch.num_samples_B)[0], with_lora, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, start[name]) for name, x in ears_of(student).items())
    assert merge_ear_lora(merged) is merged


# A teacher whose own ears have LoRA


@pytest.fixture(scope="module")
def adapted(toys, tmp_path_factory):
    """A student with adapted ears, saved, and loaded to teach."""
    folder = tmp_path_factory.mktemp("adapted")
    student = make_student(tiny.make_teacher(toys / "parts").eval(), toys)
    randomize_(student)
    save_student(student, folder, lora=LORA, quantization="none")
    return load_salmonn(folder)


def test_a_student_hears_with_its_teachers_adapters_as_they_are_and_holds_them(toys, adapted, tmp_path):
    student = make_student(adapted, toys, ears_lora_rank=0)
    assert student.whisper is adapted.whisper and not any(n.startswith("whisper") for n in trained_names(student))
    save_student(student.eval(), tmp_path, lora=LORA, quantization="none")
    loaded = load_student(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(student)) and torch.equal(frames_of(loaded), frames_of(adapted))


def test_a_student_trains_its_teachers_adapters_on_as_a_copy_of_its_own(toys, adapted, tmp_path):
    before, student = frames_of(adapted), make_student(adapted, toys)
    assert torch.equal(frames_of(student), before)
    train(adapted, student, tmp_path, toys)
    assert torch.equal(frames_of(adapted), before) and not torch.equal(frames_of(student), before)
    with pytest.raises(ValueError, match=r"ears_lora_rank is 4, but the teacher's Whisper has LoRA of rank 2; set stu"):
        make_student(adapted, toys, ears_lora_rank=4)
    with pytest.raises(ValueError, match=r"train_ears is true, but ears_lora_rank is 2 and beside LoRA a Whis"):
        make_student(adapted, toys, ears_lora_rank=0, train_ears=True)


# As a run


def run_to(toys, name, *words) -> dict[str, torch.Tensor]:
    assert run(load_config(toys / "toy.yaml", [f"name={name}", *words])) == 0
    return load_file(toys / "runs" / name / "student/model.safetensors")


ONLINE = ["teacher.online=true", "cache.frames=none"]


def test_a_run_reads_cached_frames_as_targets_alone_and_is_the_same_as_online(toys):
    assert cache(load_config(toys / "toy.yaml")) == 0
    cached, online = run_to(toys, "cached", "loss.frames=1"), run_to(toys, "online", "loss.frames=1", *ONLINE)
    assert cached.keys() == online.keys() and any(name.startswith("whisper.") for name in cached)
    for name, tensor in cached.items():
        torch.testing.assert_close(tensor, online[name], atol=5e-3, rtol=0.05)
    student = load_student(toys / "runs/cached/student")
    with pytest.raises(ValueError, match=r"cache\.frames is 'float16', but this student's ears are not the teacher's"):
        Distiller(toys / "data/cache", student, train=toys / "data/train", options=OPTIONS, run=toys / "frozen")


def test_a_run_goes_on_as_if_it_had_not_stopped_and_another_starts_from_its_student(toys):
    whole = run_to(toys, "whole", *ONLINE)
    run(load_config(toys / "toy.yaml", ["name=halved", "train.stop_after=2", *ONLINE]))
    resumed = run_to(toys, "halved", "train.stop_after=0", *ONLINE)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    words = [f"student.start={toys}/runs/whole/student", "train.learning_rate=1e-12", *ONLINE]
    assert all(torch.allclose(x, whole[name], atol=1e-6) for name, x in run_to(toys, "started", *words).items())
    with pytest.raises(ValueError, match=r"whose ears_lora_rank is 2, but this run's is 0; set it as it was"):
        run(load_config(toys / "toy.yaml", ["name=other", "student.ears_lora_rank=0", *words]))


def test_two_ranks_train_the_adapters_that_one_does(toys):
    alone = run_to(toys, "alone", *ONLINE)
    tiny.run_two_ranks(run, load_config(toys / "toy.yaml", ["name=two", *ONLINE]))
    two = load_file(toys / "runs/two/student/model.safetensors")
    assert alone.keys() == two.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-3, rtol=1e-3)
    losses = [[r["loss"] for r in read_metrics(toys / "runs" / n / "metrics.jsonl")[0]] for n in ("alone", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_run_says_what_int8_costs_beside_its_adapters(toys, capsys):
    run_to(toys, "int8", "student.ears_quantization=int8", *ONLINE)
    assert "ears in int8: error of their frames on 4 clips whisper 0.0" in capsys.readouterr().err


def test_the_doctor_finds_a_gradient_in_every_adapter_and_in_no_other_tensor_of_the_ears(toys):
    case = build_case(load_config(toys / "toy.yaml", ONLINE))
    assert "tensors" in check_gradients(case)
    trained = {name for name, p in case.student.whisper.named_parameters() if p.requires_grad}
    assert len(trained) == 12 and all("lora_" in name for name in trained)


def test_contradictions_are_refused_before_anything_is_built():
    with pytest.raises(ValueError, match=r"student\.train_ears is true, but student\.ears_lora_rank is 8 and beside"):
        StudentConfig(train_ears=True, ears_lora_rank=8)
    with pytest.raises(ValueError, match=r"student\.ears_lora_rank is -1, but must be 0 or more"):
        StudentConfig(ears_lora_rank=-1)
    online = TeacherConfig(online=True)
    with pytest.raises(ValueError, match=r"set student\.train_ears=true or student\.ears_lora_rank=8, or lo"):
        Config(loss=LossConfig(frames=1.0), teacher=online)
    Config(loss=LossConfig(frames=1.0), teacher=online, student=StudentConfig(ears_lora_rank=8))
