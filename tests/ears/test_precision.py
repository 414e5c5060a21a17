"""In which precision a teacher's ears hear: which is exact, who decides, and what a cache says of it."""

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from test_beats import TINY as TINY_BEATS
from test_beats import make_official

from distill.cache import cache
from distill.caching.identity import describe_teacher
from distill.config import Config, TeacherConfig, load_config
from distill.run import wrap_teacher
from distill.teacher import load_teacher, resolve_ears
from distill.training import ranks
from distill.training.zero import hide_frozen_
from students.hearing import Connector
from students.student import build_student
from teachers.ears.beats import BeatsEar
from teachers.ears.precision import WEIGHTS, set_ear_precision_
from teachers.files.loading import load_salmonn, save_salmonn

BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A run whose teacher has two encoders, the Whisper of which is its own."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, precision="bf16", cache__max_new_tokens=3)
    torch.manual_seed(0)
    torch.save(make_official(BeatsEar.from_config(TINY_BEATS)), folder / "beats.pt")
    model = tiny.make_teacher(folder / "parts", second=str(folder / "beats.pt"), second_kind="beats")
    model.whisper.requires_grad_(True)
    model.second.requires_grad_(False)
    save_salmonn(model, folder / "teacher")
    return folder


@torch.no_grad()
def frames_of(model) -> torch.Tensor:
    batch = model.collate([tiny.make_sample(1), tiny.make_sample(2, seconds=1.3)])
    return torch.cat([x.flatten() for x in model.frames(batch.waveforms_BN, batch.num_samples_B)])


def test_ears_of_bf16_weights_have_many_times_the_error_of_fp16_autocast_and_float32_ears_have_none(toys):
    exact = load_salmonn(toys / "teacher")
    expected, errors = frames_of(exact), {}
    for precision in WEIGHTS:
        model = load_salmonn(toys / "teacher", dtype=torch.bfloat16, ear_precision=precision)
        assert model.llm.dtype == torch.bfloat16
        with BFLOAT16():  # as the caching job runs all of the teacher
            errors[precision] = float((frames_of(model) - expected).norm() / expected.norm())
    assert errors["float32"] == 0
    assert 0 < 4 * errors["fp16"] < errors["bf16"]
    with BFLOAT16():
        assert not torch.equal(frames_of(exact), expected)  # of ears that nobody told, autocast decides


def test_shared_ears_bring_their_precision_with_them(toys):
    teacher = load_salmonn(toys / "teacher", dtype=torch.bfloat16, ear_precision="float32")
    llm = str(toys / "parts" / "student-llm")
    student = build_student(teacher, llm, quantization="none", connector=Connector("new"), dtype=torch.bfloat16)
    with BFLOAT16():
        assert torch.equal(frames_of(student), frames_of(teacher))
    set_ear_precision_(teacher.whisper, "bf16")
    assert student.whisper.encoder.conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("ears", "is_kept", "card", "expected"),
    [
        ("auto", True, "A100", "float32"),
        ("auto", False, "A100", "bf16"),
        ("auto", False, "V100", "fp16"),
        ("auto", False, "", "float32"),
        ("fp16", True, "A100", "fp16"),
        ("fp16", True, "", "float32"),
        ("bf16", True, "", "bf16"),
        ("float32", False, "A100", "float32"),
    ],
)
def test_ears_are_float32_where_targets_are_kept_and_as_the_run_elsewhere_unless_a_config_says(
    monkeypatch, ears, is_kept, card, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(card))
    monkeypatch.setattr(ranks, "has_bf16", lambda: card == "A100")
    assert resolve_ears(Config(teacher=TeacherConfig(ears=ears)), is_kept=is_kept) == expected


def test_a_cache_is_of_one_precision_of_ears_says_its_cost_and_trains_a_student_of_another(toys, capsys):
    config = load_config(toys / "toy.yaml")
    assert cache(config) == 0
    said = capsys.readouterr().err
    assert "the teacher's ears hear in float32 (teacher.ears): " in said and "GB of weights where bf16 has" in said
    model = load_teacher(config, ears="bf16")  # as a run on cached targets hears
    assert model.whisper.encoder.conv1.weight.dtype == torch.bfloat16
    assert wrap_teacher(config, model).header.identity["ears"] == "float32"
    lower = replace(config, teacher=replace(config.teacher, ears="bf16"))
    with pytest.raises(ValueError, match=r"ears"):
        wrap_teacher(lower, load_teacher(lower))
    online = describe_teacher(load_teacher(config), config, is_kept=False)
    assert online.identity["ears"] == "bf16"


def test_fp16_ears_without_a_gpu_are_float32_and_that_is_said(toys, capsys):
    config = load_config(toys / "toy.yaml", ["teacher.ears=fp16", f"cache.folder={toys / 'fp16'}"])
    assert cache(config) == 0
    assert "teacher.ears is fp16, but without a GPU" in capsys.readouterr().err


def test_ears_whose_frozen_weights_zero3_does_not_see_hear_as_before(toys):
    teacher = load_salmonn(toys / "teacher")
    set_ear_precision_(teacher.whisper, "float32")
    batch = teacher.collate([tiny.make_sample(1)])
    heard = teacher.frames(batch.waveforms_BN, batch.num_samples_B)
    hide_frozen_(teacher.whisper)
    assert not list(teacher.whisper.parameters())
    again = teacher.frames(batch.waveforms_BN, batch.num_samples_B)
    assert all(torch.equal(a, b) for a, b in zip(again, heard, strict=True))
