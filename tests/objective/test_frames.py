"""The distance of trained ears' frames to the teacher's: what it compares, cached or online, and who may ask for it."""

import json
from dataclasses import replace

import pytest
import tiny
import torch

from distill.cache import cache
from distill.config import Config, LossConfig, StudentConfig, TeacherConfig, load_config
from distill.demo.scratch import build_whisper
from distill.distiller import Distiller
from distill.objective.module import Objective
from distill.objective.terms import TERMS
from distill.run import run
from distill.training.microbatch import Collator
from students.hearing import Hearing
from students.student import build_student, load_student
from teachers.lora import Lora
from teachers.online import OnlineTeacher

LORA = Lora(rank=4, targets=("q_proj", "v_proj"))
SAMPLES = [tiny.make_sample(1), tiny.make_sample(2, seconds=1.3)]
ONLY = {"ce": 0.0, "kl": 0.0, "feature": 0.0, "frames": 1.0}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A run, and beside its teacher's Whisper one of half its width."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, precision="float32", student__quantization="none", cache__frames="float16",
                   cache__max_new_tokens=3, student__train_ears=True, loss__frames=1.0)  # fmt: skip
    build_whisper(replace(tiny.SIZES, ear_width=32)).save_pretrained(folder / "parts/narrow")
    return folder


def make_pair(toys, *, whisper="", train_ears=True):
    teacher = tiny.make_teacher(toys / "parts").eval()
    student = build_student(teacher, str(toys / "parts/student-llm"), lora=LORA, quantization="none",
                            hearing=Hearing(train_ears=train_ears, whisper=whisper), say=lambda text: None)  # fmt: skip
    return OnlineTeacher(teacher), student


def value_of(teacher, student, kind="mse"):
    """The term's mean over its elements, and the objective."""
    loss = LossConfig(**ONLY, frames_kind=kind)
    terms = {"frames": TERMS["frames"]}
    objective = Objective(student, loss, torch.float32, terms, widths=teacher.widths)
    m = Collator(teacher, student, student.device, torch.float32)(SAMPLES)
    assert m.frames is None  # trained ears hear themselves
    count = terms["frames"].count(m)
    total, _ = objective(m, {"frames": torch.full((count,), 1 / count)})
    return total, m, objective


def test_frames_of_an_untrained_copy_are_the_teachers_and_of_changed_ears_are_not(toys):
    teacher, student = make_pair(toys)
    assert float(value_of(teacher, student)[0].detach()) < 1e-12
    with torch.no_grad():
        student.whisper.encoder.layers[0].fc1.weight.mul_(1.5)
    total, m, _ = value_of(teacher, student)
    total.backward()
    own, theirs = (model.frames(m.batch.waveforms_BN, m.batch.num_samples_B)[0].detach()
                   for model in (student, teacher.model))  # fmt: skip
    counts = [30, 65]  # 0.6 and 1.3 s: padding does not count
    pairs = [(own[b, :n], theirs[b, :n]) for b, n in enumerate(counts)]
    expected = torch.cat([(a - b).square().mean(1) for a, b in pairs]).mean()
    torch.testing.assert_close(total.detach(), expected, rtol=1e-4, atol=1e-9)
    assert float(student.whisper.encoder.conv1.weight.grad.abs().max()) > 0
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1", "relation"])
def test_ears_of_another_width_meet_the_teachers_through_a_projector_that_is_learned(toys, kind):
    teacher, student = make_pair(toys, whisper=str(toys / "parts/narrow"))
    total, _, objective = value_of(teacher, student, kind)
    assert float(total.detach()) > 0 and ("frames" in objective.projectors) == (kind != "relation")
    total.backward()
    assert float(student.whisper.encoder.conv1.weight.grad.abs().max()) > 0


def test_a_run_from_cached_frames_pulls_its_ears_to_the_teachers_as_one_online_does(toys):
    config = load_config(toys / "toy.yaml", ["student.whisper_layers=1"])
    assert cache(config) == 0
    losses = {}
    for name, words in {"cached": [], "online": ["teacher.online=true", "cache.frames=none"]}.items():
        own = load_config(toys / "toy.yaml", [f"name={name}", *words])
        assert run(own) == 0
        lines = (toys / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["frames"] for line in lines]
    torch.testing.assert_close(torch.tensor(losses["cached"]), torch.tensor(losses["online"]), rtol=0.05, atol=1e-5)
    assert losses["cached"][0] < 1e-5 < losses["cached"][-1]  # it begins as a copy, and other terms move it
    student = load_student(toys / "runs/cached/student")
    assert any(name.startswith("whisper.") for name in student.own_names)


def test_frozen_ears_and_targets_without_frames_do_not_serve_it(toys, tmp_path):
    with pytest.raises(ValueError, match=r"loss\.frames is 1, but student\.train_ears is false and frozen ears"):
        Config(loss=LossConfig(frames=1.0), teacher=TeacherConfig(online=True))
    with pytest.raises(ValueError, match=r"loss\.frames is above 0, but the teacher's targets hold no frames"):
        Config(loss=LossConfig(frames=1.0), student=StudentConfig(train_ears=True))
    teacher, student = make_pair(toys, train_ears=False)
    with pytest.raises(ValueError, match=r"loss\.frames is above 0, but this student's ears are frozen"):
        Distiller(teacher, student, train=toys / "data/train", loss=LossConfig(**ONLY), run=tmp_path)
