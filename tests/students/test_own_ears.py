"""A student with ears of its own: what it shares, what its connector starts from, how it learns, what is refused."""

import dataclasses
import json

import pytest
import tiny
import torch
from safetensors import safe_open
from test_beats import TINY as TINY_BEATS
from test_beats import make_official
from test_eat import TINY as TINY_EAT
from test_eat import save_hugging_face

from distill.cache import cache
from distill.config import Config, LossConfig, StudentConfig, TrainConfig, load_config
from distill.demo.scratch import build_llm, build_whisper
from distill.demo.tokenizer import train_byte_tokenizer
from distill.distiller import Distiller
from distill.doctor.doctor import doctor
from distill.export import export
from distill.run import find_valid, run, wrap_teacher
from distill.sizes.costs import Blueprint, build_on_meta, describe_student
from distill.training.microbatch import Collator
from students.hearing import Connector, Hearing
from students.student import CONNECTOR, build_student, load_student, save_student
from teachers.ears.beats import BeatsEar
from teachers.ears.eat import EatEar
from teachers.files.loading import load_salmonn, save_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher
from teachers.salmonn import SalmonnConfig

LORA = Lora(rank=4)
OPTIONS = TrainConfig(steps=5, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=2, save_every=100,
                      min_learning_rate=1e-4)  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A teacher with Whisper and BEATs, its cache, and encoders in their published formats for students."""
    folder = tmp_path_factory.mktemp("toys")
    parts = folder / "parts"
    tiny.make_parts(parts)
    torch.save(make_official(BeatsEar.from_config(TINY_BEATS)), parts / "beats.pt")
    (parts / "eat").mkdir()
    save_hugging_face(EatEar.from_config(TINY_EAT), parts / "eat")
    for name, width, mels in (("small", 32, 80), ("turbo", 64, 128)):
        whisper = build_whisper(dataclasses.replace(tiny.SIZES, ear_width=width))
        if mels != 80:
            whisper = type(whisper)(type(whisper.config)(**{**whisper.config.to_dict(), "num_mel_bins": mels}))
        whisper.save_pretrained(parts / name)
    teacher = tiny.make_teacher(parts, second=str(parts / "beats.pt"), second_kind="beats")
    teacher.second.requires_grad_(False)
    save_salmonn(teacher, folder / "teacher")
    tiny.make_shards(folder / "data", num_samples=8)
    tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", parts, cache__codec="dense",
                      cache__features="float16", student__connector="teacher")  # fmt: skip
    cache(load_config(folder / "toy.yaml"))
    return folder


@pytest.fixture(scope="module")
def teacher(toys):
    return load_salmonn(toys / "teacher")


def build(toys, teacher, lines=None, **ears):
    """A student on the toys; what it says is kept in `lines`."""
    names = {key: str(toys / "parts" / name) if name != "none" and key != "second_kind" else name
             for key, name in ears.items()}  # fmt: skip
    return build_student(teacher, str(toys / "parts" / "student-llm"), lora=LORA, quantization="none",
                         hearing=Hearing(**names), say=([] if lines is None else lines).append)  # fmt: skip


def small_words(toys) -> list[str]:
    return [f"student.whisper={toys / 'parts' / 'small'}", "student.second_kind=none"]


# What it hears with, and what its connector starts from


def test_an_encoder_that_is_named_as_the_teachers_is_the_teachers(toys, teacher):
    odd = f"{toys / 'parts'}/../parts/whisper"
    student = build_student(teacher, str(toys / "parts" / "student-llm"), lora=LORA, quantization="none",
                            hearing=Hearing(whisper=odd))  # fmt: skip
    assert student.whisper is teacher.whisper and student.second is teacher.second


def test_only_the_encoder_that_differs_is_loaded_and_it_is_frozen(toys, teacher):
    lines = []
    student = build(toys, teacher, lines, whisper="small")
    assert student.second is teacher.second and student.whisper.width == 32
    assert not any(p.requires_grad for p in student.whisper.parameters())
    assert lines[0] == f"ears of its own: whisper {toys / 'parts' / 'small'}"


@pytest.mark.parametrize(
    ("ears", "kept"),
    [
        ({"whisper": "small"}, "second"),
        ({"second_kind": "none"}, "whisper"),
        ({"whisper": "small", "second_kind": "none"}, None),
        ({"whisper": "turbo", "second": "eat", "second_kind": "eat"}, "all"),
    ],
)
def test_the_connector_starts_from_every_tensor_of_the_teachers_that_fits(toys, teacher, ears, kept):
    lines = []
    student = build(toys, teacher, lines, **ears)
    theirs, anew = dict(teacher.named_parameters()), set()
    for name, own in student.named_parameters():
        if name.split(".")[0] in CONNECTOR:
            if theirs[name].shape == own.shape:
                assert torch.equal(own, theirs[name]), name
            else:
                anew.add(name)
    keys = [name for name in anew if "crossattention" in name]
    assert len(keys) == (0 if kept == "all" else 2) and {"project.weight", "project.bias"} <= anew
    own_columns = {"whisper": slice(0, 64), "second": slice(32, 64)}
    their_columns = {"whisper": slice(0, 64), "second": slice(64, 96)}
    for name in keys if kept else ():
        own = dict(student.named_parameters())[name]
        assert torch.equal(own[:, own_columns[kept]], theirs[name][:, their_columns[kept]])
    assert all(name.replace(".0.", ".*.") in lines[-1] for name in anew)
    assert ("but its columns of" in lines[-1]) == (kept in ("whisper", "second"))


def test_a_new_connector_says_nothing_of_the_teachers(toys, teacher):
    lines = []
    build_student(teacher, str(toys / "parts" / "student-llm"), lora=LORA, quantization="none",
                  connector=Connector("new"), say=lines.append)  # fmt: skip
    assert lines == []


@pytest.mark.parametrize(
    ("ears", "message"),
    [
        (
            {"second": "b.pt", "second_kind": "none"},
            r"second is 'b\.pt', but student\.second_kind is 'none'; empty one",
        ),
        ({"second_kind": "eat"}, r"second_kind is 'eat', but student\.second is empty and .*second encoder is 'beats'"),
    ],
)
def test_ears_that_contradict_each_other_are_refused(ears, message):
    with pytest.raises(ValueError, match=message):
        Hearing(**ears).of(SalmonnConfig("llm", "whisper", "a.pt", "beats"))


def test_a_second_encoder_of_no_kind_is_refused_where_the_teacher_has_none():
    with pytest.raises(ValueError, match=r"second_kind is empty and the teacher has no second encoder"):
        Hearing(second="b.pt").of(SalmonnConfig("llm", "whisper"))


def test_one_spectrum_for_both_encoders_ends_with_beats():
    shared = SalmonnConfig("llm", "whisper", "a.pt", "beats", front_end="shared")
    assert Hearing(whisper="small").of(shared).front_end == "shared"
    assert Hearing(second_kind="none").of(shared).front_end == "exact"
    assert Hearing(second="e", second_kind="eat").of(shared).front_end == "exact"


def test_one_spectrum_serves_ears_of_128_mel_bins(toys, tmp_path):
    parts = toys / "parts"
    shared = tiny.make_teacher(parts, second=str(parts / "beats.pt"), second_kind="beats", front_end="shared")
    student = build(toys, shared, whisper="turbo")
    batch = student.collate([tiny.make_sample(1)])
    with torch.no_grad():
        assert torch.equal(student.frames(batch.waveforms_BN, batch.num_samples_B)[0],
                           student.whisper(batch.waveforms_BN, batch.num_samples_B)[0])  # fmt: skip


def test_ears_of_128_mel_bins_and_eat_answer_beside_a_teacher_of_80(toys, teacher):
    student = build(toys, teacher, whisper="turbo", second="eat", second_kind="eat")
    assert (student.whisper.log_mel.num_mels, teacher.whisper.log_mel.num_mels) == (128, 80)
    batch = student.collate([tiny.make_sample(1), tiny.make_sample(2, seconds=1.1)])
    assert torch.isfinite(student(batch)[0]).all()


# Learning


@pytest.mark.parametrize("ears", [{"whisper": "small", "second_kind": "none"}, {"second": "eat", "second_kind": "eat"}])
def test_it_learns_the_same_from_the_cache_and_from_the_teacher(toys, teacher, tmp_path, ears):
    losses = {}
    for name in ("online", "cached"):
        config = load_config(toys / "toy.yaml", [f"teacher.online={name == 'online'}"])
        run = Distiller(wrap_teacher(config, teacher), build(toys, teacher, **ears), train=toys / "data" / "train",
                        loss=LossConfig(feature=0.5), options=OPTIONS, run=tmp_path / name)  # fmt: skip
        losses[name] = run.fit().losses
    assert losses["cached"] == pytest.approx(losses["online"], abs=5e-3)
    assert losses["online"][-1] < losses["online"][0] - 0.05


def test_an_online_teacher_hears_with_its_own_ears(toys, teacher):
    student = build(toys, teacher, whisper="turbo")  # frames as wide as the teacher's, so nothing else would show it
    collator = Collator(OnlineTeacher(teacher), student, torch.device("cpu"), torch.float32)
    samples = [tiny.make_sample(1), tiny.make_sample(2, seconds=1.1)]
    micro_batch = collator(samples)
    assert not collator.shares_ears and micro_batch.frames is None
    with torch.no_grad():
        expected = teacher.hear(teacher.collate(samples)).queries_BWQE
    assert torch.equal(micro_batch.targets.queries_BWQE, expected)


@pytest.mark.parametrize("words", [["student.second_kind=none"], ["student.whisper={parts}/turbo"]])
def test_cached_frames_of_the_teachers_ears_are_refused_before_training(toys, tmp_path, words):
    words = [word.format(parts=toys / "parts") for word in words]
    words += ["cache.frames=float16", f"cache.folder={toys / 'frames'}", f"runs={tmp_path}"]
    cache(load_config(toys / "toy.yaml", words))
    with pytest.raises(
        ValueError, match=r"frames is 'float16', but this student's ears are not the teacher's .*online"
    ):
        run(load_config(toys / "toy.yaml", words))
    assert not (tmp_path / "toy" / "checkpoints").exists()


def test_cached_frames_serve_a_student_that_names_the_teachers_ears(toys, tmp_path):
    words = [f"student.whisper={toys / 'parts' / 'whisper'}", "cache.frames=float16", "train.steps=1",
             f"cache.folder={toys / 'frames'}", f"runs={tmp_path}"]  # fmt: skip
    cache(load_config(toys / "toy.yaml", words))
    assert run(load_config(toys / "toy.yaml", words)) == 0


def test_a_clip_that_its_ears_cannot_hear_is_refused_before_training(toys, tmp_path):
    build_whisper(dataclasses.replace(tiny.SIZES, seconds=0.7)).save_pretrained(tmp_path / "short")
    words = [f"student.whisper={tmp_path / 'short'}", f"runs={tmp_path}", "teacher.online=true"]
    with pytest.raises(ValueError, match=r"clips last 0\.50 to 1\.00 s, but the ears of this run take 0\.02 to 0\.7"):
        run(load_config(toys / "toy.yaml", words))


def test_a_clip_for_validation_that_its_ears_cannot_hear_is_refused_before_training(toys, tmp_path):
    build_whisper(dataclasses.replace(tiny.SIZES, seconds=0.7)).save_pretrained(tmp_path / "short")
    student = build_student(load_salmonn(toys / "teacher"), str(toys / "parts" / "student-llm"), lora=LORA,
                            hearing=Hearing(whisper=str(tmp_path / "short")))  # fmt: skip
    config = load_config(toys / "toy.yaml", [f"data.folder={tmp_path}"])
    assert find_valid(config, student, None) is None
    (tmp_path / "valid").symlink_to(toys / "data" / "train")
    with pytest.raises(ValueError, match=r"but the ears of this run take 0\.02 to 0\.7"):
        find_valid(config, student, None)


def test_a_recipe_in_small_passes_doctor_and_its_losses_fall(toys, tmp_path, capsys):
    """Another tokenizer, smaller ears, no second encoder, windows of audio alone, from the teacher's cache."""
    tokenizer = train_byte_tokenizer([*tiny.WORDS, "USER: what do you hear? ASSISTANT:"], tmp_path / "qwen",
                                     vocab_size=300)  # fmt: skip
    torch.manual_seed(0)
    build_llm(len(tokenizer), 32, 1, tokenizer).save_pretrained(tmp_path / "qwen")
    words = [*small_words(toys), f"student.llm={tmp_path / 'qwen'}", "loss.cross_tokenizer=chunk", f"runs={tmp_path}",
             "loss.schedules.feature=cosine 0.05", "train.steps=6"]  # fmt: skip
    config = load_config(toys / "toy.yaml", words)
    assert doctor(config) == 0 and run(config) == 0
    losses = [json.loads(line)["loss"] for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("online", ["true", "false"])
def test_doctor_passes_a_student_with_ears_of_its_own(toys, capsys, online):
    words = [*small_words(toys), f"teacher.online={online}"]
    assert doctor(load_config(toys / "toy.yaml", words)) == 0
    assert "FAIL" not in capsys.readouterr().out


# The finished student


@pytest.fixture(scope="module")
def finished(toys):
    """The folder of a run, from the cache, with smaller ears and no second encoder."""
    config = load_config(toys / "toy.yaml", [*small_words(toys), f"runs={toys / 'runs'}"])
    assert run(config) == 0
    return config.run_folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(model.collate([tiny.make_sample(1), tiny.make_sample(2, seconds=1.1)]))[0]


def names_in(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name.split(".")[0] for name in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)


def test_it_is_saved_without_its_ears_and_loads_as_it_was(toys, teacher, tmp_path):
    student = build(toys, teacher, whisper="small", second="eat", second_kind="eat").eval()
    save_student(student, tmp_path, lora=LORA, quantization="none")
    assert torch.equal(logits(load_student(tmp_path)), logits(student))
    assert not {"whisper", "second"} & names_in(tmp_path)
    frozen = json.loads((tmp_path / "config.json").read_text())["frozen"]
    assert set(frozen) == {"llm", "whisper", "second"}


def test_other_weights_under_the_names_of_its_ears_are_refused(toys, teacher, tmp_path):
    whisper = build_whisper(dataclasses.replace(tiny.SIZES, ear_width=32))
    whisper.save_pretrained(tmp_path / "own")
    student = build_student(teacher, str(toys / "parts" / "student-llm"), lora=LORA,
                            hearing=Hearing(whisper=str(tmp_path / "own")))  # fmt: skip
    save_student(student, tmp_path / "student", lora=LORA, quantization="nf4")
    build_whisper(dataclasses.replace(tiny.SIZES, ear_width=32)).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"whisper of .* has hash"):
        load_student(tmp_path / "student")


def test_a_run_from_the_cache_ends_in_a_student_with_its_own_ears(finished, toys):
    student = load_student(finished / "student")
    assert student.second is None and student.config.whisper == str(toys / "parts" / "small")
    losses = [json.loads(line)["loss"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_hears_with_the_students_ears_and_its_card_names_them(finished, tmp_path, merge):
    exported = load_student(export(finished, tmp_path / "out", merge=merge, salmonn=True))
    torch.testing.assert_close(logits(exported), logits(load_student(finished / "student")), atol=1e-4, rtol=1e-4)
    assert "* Ears: Whisper `small`\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("ears", "held"), [({}, {"whisper"}), ({"whisper": "small"}, set())])
def test_ears_that_the_teacher_trained_are_saved_with_those_alone_who_share_them(toys, tmp_path, ears, held):
    trained = tiny.make_teacher(toys / "parts")
    trained.whisper.requires_grad_(True)
    save_salmonn(trained, tmp_path / "teacher")
    student = build(toys, load_salmonn(tmp_path / "teacher"), **ears).eval()
    save_student(student, tmp_path / "student", lora=LORA, quantization="none")
    assert names_in(tmp_path / "student") & {"whisper", "second"} == held
    assert torch.equal(logits(load_student(tmp_path / "student")), logits(student))


def test_a_student_whose_ears_were_trained_gets_no_file_of_salmonns_as_that_holds_no_ears(toys, teacher, tmp_path):
    student = build_student(teacher, str(toys / "parts" / "student-llm"), lora=LORA, quantization="none",
                            hearing=Hearing(train_ears=True))  # fmt: skip
    save_student(student, tmp_path / "student", lora=LORA, quantization="none")
    with pytest.raises(ValueError, match=r"whisper of the student was trained, but salmonn\.pth holds no ears"):
        export(tmp_path, tmp_path / "out", salmonn=True)


def test_the_table_of_costs_counts_its_own_ears(toys, teacher):
    student = build(toys, teacher, whisper="small", second_kind="none")
    own = StudentConfig(llm=student.config.llm, whisper=student.config.whisper, second_kind="none", lora_rank=4,
                        lora_targets=LORA.targets)  # fmt: skip
    blueprint = describe_student(Config(student=own), Blueprint(teacher.config, None, torch.float32))
    planned = build_on_meta(blueprint, {})
    shapes = {n: p.shape for n, p in student.named_parameters() if "lora_" not in n}
    assert {n: p.shape for n, p in planned.named_parameters()} == {
        n.replace(".base_layer.", "."): shape for n, shape in shapes.items()
    }
