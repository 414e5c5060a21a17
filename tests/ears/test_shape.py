"""Ears of another form than their checkpoint: fewer bits, fewer layers, trained; made, saved, loaded, exported."""

import copy

import pytest
import tiny
import torch
from transformers import WhisperForConditionalGeneration

from distill.cache import cache
from distill.config import StudentConfig, load_config
from distill.demo.scratch import build_whisper
from distill.distiller import Distiller, Run
from distill.doctor.doctor import build_case
from distill.doctor.objective import check_gradients
from distill.export import export
from distill.run import run
from distill.sizes.costs import describe_student, describe_teacher, measure_sizes
from students.ears import measure_ears_error
from students.hearing import Hearing
from students.student import build_student, load_student, save_student
from teachers.ears.shape import even_places, keep_layers_
from teachers.ears.whisper import WhisperEar
from teachers.int8 import RowLinear
from teachers.lora import Lora
from teachers.online import OnlineTeacher

LORA = Lora(rank=4, targets=("q_proj", "v_proj"))
SAMPLES = [tiny.make_sample(1), tiny.make_sample(2, seconds=1.3)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Toys whose Whisper has five layers."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    torch.manual_seed(0)
    config = build_whisper(tiny.SIZES).config
    config.encoder_layers = 5
    WhisperForConditionalGeneration(config).save_pretrained(folder / "whisper")
    return folder


def make_teacher(parts, *, own_ears: bool):
    teacher = tiny.make_teacher(parts).eval()
    teacher.whisper.requires_grad_(own_ears)
    for layer in teacher.whisper.encoder.layers if own_ears else ():  # trained: no checkpoint of an encoder has them
        torch.nn.init.normal_(layer.fc1.weight, std=0.2)
    teacher.own_names = frozenset(n for n, p in teacher.named_parameters() if p.requires_grad)
    return teacher.requires_grad_(False)


def make_student(teacher, parts, **hearing):
    options = {"lora": LORA, "quantization": "none", "say": lambda text: None, "hearing": Hearing(**hearing)}
    return build_student(teacher, str(parts / "student-llm"), **options).eval()


def linears(ear) -> list:
    return [m for m in ear.modules() if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(model.collate(SAMPLES))[0]


# Bits


@pytest.mark.parametrize(("bits", "most"), [("bf16", 0.01), ("int8", 0.03)])
@pytest.mark.parametrize("own_ears", [False, True])
def test_a_student_with_ears_in_fewer_bits_leaves_its_teachers_alone_and_loads_as_it_was_saved(
    parts, tmp_path, bits, most, own_ears
):
    teacher = make_teacher(parts, own_ears=own_ears)
    before = copy.deepcopy(teacher.whisper.state_dict())
    student = make_student(teacher, parts, ears_quantization=bits)
    assert not linears(student.whisper) and len(linears(teacher.whisper)) == 30
    assert all(torch.equal(x, before[name]) for name, x in teacher.whisper.state_dict().items())
    assert 0 < measure_ears_error(teacher, student, SAMPLES)["whisper"] < most
    save_student(student, tmp_path / "student", lora=LORA, quantization="none")
    loaded = load_student(tmp_path / "student")
    assert torch.equal(logits_of(loaded), logits_of(student))
    narrow = [m for m in loaded.whisper.modules() if isinstance(m, RowLinear)]
    assert {m.weight.dtype for m in narrow} == {torch.int8 if bits == "int8" else torch.bfloat16}


def test_ears_are_put_in_fewer_bits_after_training_and_the_cost_is_said(toys, tmp_path, capsys):
    exported = load_student(export(toys / "runs/toy", tmp_path / "out", ears="int8"))
    said = capsys.readouterr().err
    assert "ears in int8: error of their frames on 4 clips whisper 0.0" in said
    assert exported.config.ears_quantization == "int8" and not linears(exported.whisper)
    whole = load_student(toys / "runs/toy/student")
    assert 0 < float((logits_of(exported) - logits_of(whole)).abs().max()) < 0.1
    assert "in int8" in (tmp_path / "out/README.md").read_text()
    merged = load_student(export(toys / "runs/toy", tmp_path / "merged", merge=True, whole=True, ears="int8"))
    torch.testing.assert_close(logits_of(merged), logits_of(exported), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, precision="float32", student__quantization="none", cache__frames="float16",
                   cache__max_new_tokens=3)  # fmt: skip
    assert cache(load_config(folder / "toy.yaml")) == 0
    assert run(load_config(folder / "toy.yaml")) == 0
    return folder


def test_a_run_trains_with_ears_in_int8_and_says_their_error(toys, capsys):
    words = ["name=int8", "student.ears_quantization=int8", "teacher.online=true", "cache.frames=none"]
    assert run(load_config(toys / "toy.yaml", words)) == 0
    assert "ears in int8: error of their frames on 4 clips whisper 0.0" in capsys.readouterr().err
    assert load_student(toys / "runs/int8/student").config.ears_quantization == "int8"
    with pytest.raises(ValueError, match=r"ears are to be in int8, but they are in int8 since training"):
        export(toys / "runs/int8", toys / "again", ears="int8")


@pytest.mark.parametrize("word", ["student.ears_quantization=int8", "student.whisper_layers=1"])
def test_cached_frames_of_whole_frozen_ears_are_not_those_of_others(toys, word):
    with pytest.raises(ValueError, match=r"cache\.frames is 'float16', but this student's ears are not the teacher's"):
        run(load_config(toys / "toy.yaml", ["name=other", word]))


def test_trained_ears_in_few_bits_are_refused_before_anything_is_built():
    with pytest.raises(ValueError, match=r"student\.train_ears is true, but student\.ears_quantization is 'int8'"):
        StudentConfig(train_ears=True, ears_quantization="int8")
    with pytest.raises(ValueError, match=r"student\.ears_quantization is 'int4', but must be one of none, bf16, int8"):
        StudentConfig(ears_quantization="int4")


# Layers


def test_layers_are_spread_evenly_from_the_first_to_the_last():
    assert [even_places(number, 6) for number in (6, 3, 2, 1)] == [[0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 5], [0]]
    assert even_places(8, 32) == [0, 4, 9, 13, 18, 22, 27, 31]
    assert even_places(10, 30) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert even_places(30, 30) == list(range(30)) and even_places(1, 5) == [0]


def test_a_whisper_keeps_the_layers_it_is_told_to_and_has_no_more_than_it_has(parts):
    ear = WhisperEar.from_pretrained(parts / "whisper")
    first, middle, last = (copy.deepcopy(ear.encoder.layers[place].state_dict()) for place in (0, 2, 4))
    keep_layers_(ear, 3)
    for layer, expected in zip(ear.encoder.layers, (first, middle, last)):
        assert all(torch.equal(x, expected[name]) for name, x in layer.state_dict().items())
    frames_BRE, _ = ear(torch.randn(1, 16_000), torch.tensor([16_000]))
    assert frames_BRE.isfinite().all() and ear.encoder.config.encoder_layers == 3
    with pytest.raises(ValueError, match=r"whisper_layers is 4, but this Whisper has 3"):
        keep_layers_(ear, 4)


@pytest.mark.parametrize("own_ears", [False, True])
def test_a_student_with_fewer_layers_loads_as_it_was_saved(parts, tmp_path, own_ears):
    teacher = make_teacher(parts, own_ears=own_ears)
    student = make_student(teacher, parts, whisper_layers=2)
    assert (len(student.whisper.encoder.layers), len(teacher.whisper.encoder.layers)) == (2, 5)
    last, theirs = student.whisper.encoder.layers[1], teacher.whisper.encoder.layers[4]
    assert torch.equal(last.fc1.weight, theirs.fc1.weight)
    save_student(student, tmp_path / "student", lora=LORA, quantization="none")
    assert torch.equal(logits_of(load_student(tmp_path / "student")), logits_of(student))


def test_layers_and_bits_are_counted(toys, parts):
    config = load_config(toys / "toy.yaml")
    teacher, given = describe_teacher(config)

    def whisper_of(*words):
        blueprint = describe_student(load_config(toys / "toy.yaml", ["precision=float32", *words]), teacher)
        return measure_sizes(blueprint, given)["Whisper encoder"]

    (number, size), (_, narrow) = whisper_of(), whisper_of("student.ears_quantization=int8")
    assert 0.25 < narrow / size < 0.6 and size == 4 * number


# Trained ears


def test_ears_are_trained_as_a_copy_saved_whole_and_the_teachers_stay(parts, tmp_path):
    teacher = make_teacher(parts, own_ears=True)
    before = copy.deepcopy(teacher.whisper.state_dict())
    student = make_student(teacher, parts, whisper_layers=2, train_ears=True)
    start = copy.deepcopy(student.whisper.state_dict())
    shards = tiny.make_shards(tmp_path / "data", num_samples=4)
    Distiller(OnlineTeacher(teacher), student, train=shards, run=Run(tmp_path / "run", precision="float32"),
              options=tiny_options()).fit()  # fmt: skip
    assert all(torch.equal(x, before[name]) for name, x in teacher.whisper.state_dict().items())
    moved = [name for name, x in student.whisper.state_dict().items() if not torch.equal(x, start[name])]
    assert any("layers.0" in name for name in moved) and any("layers.1" in name for name in moved)
    student.eval()
    save_student(student, tmp_path / "student", lora=LORA, quantization="none")
    assert torch.equal(logits_of(load_student(tmp_path / "student")), logits_of(student))


def test_the_doctor_finds_a_gradient_in_every_tensor_of_trained_ears(toys):
    words = ["student.train_ears=true", "teacher.online=true", "cache.frames=none"]
    case = build_case(load_config(toys / "toy.yaml", words))
    num_whisper = len(list(case.student.whisper.parameters()))
    assert int(check_gradients(case).split()[0]) > num_whisper > 10


def tiny_options():
    from distill.config import TrainConfig

    return TrainConfig(steps=2, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup_steps=1, save_every=2)
