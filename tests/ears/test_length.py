"""Ears at a clip's real length: what is heard, alone and in a batch, online, cached and exported."""

import dataclasses
import math
from dataclasses import replace

import pytest
import tiny
import torch
from test_beats import TINY as TINY_BEATS
from test_beats import make_official
from test_whisper import TINY as TINY_WHISPER
from test_whisper import make_batch

from distill.cache import cache, describe_teacher
from distill.config import StudentConfig, load_config
from distill.distiller import Distiller
from distill.export import export
from distill.run import run, wrap_teacher
from distill.sizes.costs import describe_student, measure
from distill.sizes.costs import describe_teacher as describe_teachers_sizes
from distill.teacher import load_teacher
from distill.training.microbatch import Collator, check_frames
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.store import TargetReader
from students.hearing import Connector, Hearing
from students.start import load_start_weights_
from students.student import build_student, load_student
from teachers.cached import CachedTeacher
from teachers.ears.beats import BeatsEar
from teachers.ears.length import parse_ears_seconds
from teachers.ears.whisper import WhisperEar
from teachers.lora import Lora
from teachers.online import OnlineTeacher

LORA = Lora(rank=4, targets=("q_proj", "v_proj"))


@pytest.fixture
def ear() -> WhisperEar:
    torch.manual_seed(0)
    ear = WhisperEar.from_config(TINY_WHISPER).requires_grad_(False)
    for parameter in ear.parameters():  # biases too, which a fresh model has at zero
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.2, std=0.2)
    return ear


# The ear


def test_an_ear_cut_to_all_of_its_length_is_the_whole_ear(ear):
    waveforms_BN, num_samples_B = make_batch(48_000, 20_001)
    whole_BRE, _ = ear(waveforms_BN, num_samples_B)
    cut_BRE, num_frames_B = ear(waveforms_BN, num_samples_B, None, [150, 150])
    torch.testing.assert_close(cut_BRE, whole_BRE, atol=1e-6, rtol=0)
    assert num_frames_B.tolist() == [150, 63]


def test_a_cut_row_in_a_batch_is_the_row_alone_and_zero_behind_it(ear):
    waveforms_BN, num_samples_B, heard = *make_batch(40_000, 20_001, 16_000), [130, 63, 51]
    together_BRE, _ = ear(waveforms_BN, num_samples_B, None, heard)
    assert together_BRE.shape == (3, 130, ear.width)
    for row, (num_samples, num_frames) in enumerate(zip(num_samples_B.tolist(), heard)):
        alone_BRE, _ = ear(waveforms_BN[row : row + 1, :num_samples], num_samples_B[row : row + 1], None, [num_frames])
        torch.testing.assert_close(together_BRE[row, :num_frames], alone_BRE[0], atol=2e-6, rtol=0)
        assert not together_BRE[row, num_frames:].any()


def test_a_cut_ear_hears_something_else_than_one_with_silence_up_to_its_length(ear):
    waveforms_BN, num_samples_B = make_batch(16_000)
    whole_BRE, _ = ear(waveforms_BN, num_samples_B)
    cut_BRE, _ = ear(waveforms_BN, num_samples_B, None, [50])
    assert float((cut_BRE - whole_BRE[:, :50]).norm() / cut_BRE.norm()) > 1e-3


@pytest.mark.parametrize("text", ["", "10", "clip+", "clip-1", "clip+1s", "30.0"])
def test_a_length_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=rf"ears_seconds is '{text.replace('+', '[+]')}', but must be '30' .* clip\+1"):
        parse_ears_seconds(text)
    assert [parse_ears_seconds(good) for good in ("30", "clip", "clip+2", "clip+0.5")] == [None, 0, 2, 0.5]


# Models


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    torch.manual_seed(0)
    torch.save(make_official(BeatsEar.from_config(TINY_BEATS)), folder / "beats.pt")
    return folder


def make_student(parts, ears_seconds, *, beats=False, **changes):
    second = {"second": str(parts / "beats.pt"), "second_kind": "beats"} if beats else {}
    teacher = tiny.make_teacher(parts, **second, **changes).eval()
    llm = str(parts / "student-llm")
    student = build_student(teacher, llm, lora=LORA, quantization="none", say=lambda text: None,
                            hearing=Hearing(ears_seconds=ears_seconds))  # fmt: skip
    return teacher, student.eval()


SAMPLES = [(1, 1.2), (2, 0.6), (3, 1.9), (4, 2.0)]  # toys hear 2 s


@pytest.mark.parametrize("beats", [False, True])
@pytest.mark.parametrize("window_seconds", [0.34, 0.0])
@pytest.mark.parametrize("ears_seconds", ["clip", "clip+0.3"])
@torch.no_grad()
def test_a_clip_in_a_batch_is_heard_as_alone_whatever_stands_beside_it(parts, ears_seconds, beats, window_seconds):
    _, student = make_student(parts, ears_seconds, beats=beats)
    student.qformer.window_frames = student.qformer.stride_frames = round(50 * window_seconds)
    samples = [tiny.make_sample(number, seconds=seconds) for number, seconds in SAMPLES]
    together = student.collate(samples)
    heard = student.hear(together)
    for row, sample in enumerate(samples):
        alone = student.hear(student.collate([sample]))
        count = alone.num_windows_B[0]
        assert heard.num_windows_B[row] == count
        torch.testing.assert_close(heard.queries_BWQE[row, :count], alone.queries_BWQE[0, :count], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_cut_ear_gives_frames_up_to_the_last_window_and_its_silence(parts):
    _, student = make_student(parts, "clip")
    window = student.qformer.window_frames
    for seconds in (0.6, 1.0, 1.2, 1.95, 2.0):
        num_samples = round(seconds * 16_000)
        count = student.num_speech_frames(num_samples)
        num_audio = math.ceil(50 * max(seconds, 1.0))
        assert count == min(100, max(num_audio, window * student.num_windows(num_samples)))
        assert student.num_speech_frames(num_samples, "clip+0.2") == min(100, max(count, num_audio + 10))
        assert student.num_speech_frames(num_samples, "30") == 100


def test_windows_of_padding_and_cut_ears_exclude_each_other(parts):
    with pytest.raises(ValueError, match=r"ears_seconds is 'clip', but windows is 'all' and those of pure padding"):
        tiny.make_teacher(parts, ears_seconds="clip")
    with pytest.raises(ValueError, match=r"student\.ears_seconds is 'clip\+1', but student\.windows is 'all'"):
        StudentConfig(ears_seconds="clip+1", windows="all")
    with pytest.raises(ValueError, match=r"student\.ears_seconds is 'short', but must be '30'"):
        StudentConfig(ears_seconds="short")


def test_a_student_inherits_its_teachers_length_and_shares_its_frames_only_then(parts):
    teacher = tiny.make_teacher(parts, ears_seconds="clip", windows="audio")
    llm, options = str(parts / "student-llm"), {"quantization": "none", "say": lambda text: None, "lora": LORA}
    same = build_student(teacher, llm, **options)
    other = build_student(teacher, llm, hearing=Hearing(ears_seconds="30"), **options)
    assert (same.config.ears_seconds, other.config.ears_seconds) == ("clip", "30")
    samples, online = [tiny.make_sample(1)], OnlineTeacher(teacher)
    assert Collator(online, same, same.device, torch.float32)(samples).frames is not None
    assert Collator(online, other, other.device, torch.float32)(samples).frames is None


# Runs


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, precision="float32", student__ears_seconds="clip", student__quantization="none",
                   cache__frames="float16", cache__max_new_tokens=3)  # fmt: skip
    assert cache(load_config(folder / "toy.yaml")) == 0
    assert run(load_config(folder / "toy.yaml")) == 0
    return folder


def test_a_cache_keeps_the_frames_that_the_student_hears_and_the_targets_of_what_its_teacher_hears(toys):
    config = load_config(toys / "toy.yaml")
    teacher = load_teacher(config)
    reader = TargetReader(config.cache_folder, None)
    assert reader.header.identity["features"]["ears_seconds"] == "clip"
    assert reader.header.identity["teacher_config"]["ears_seconds"] == "30"
    sample = next(iter(tiny_stream(config)))
    record = sample.targets
    batch = teacher.collate([sample])
    with torch.no_grad():
        cut_BRE = teacher.frames(batch.waveforms_BN, batch.num_samples_B, ears_seconds="clip")[0]
        heard = teacher.hear(batch)
    frames_RE = torch.from_numpy(record.features["frames_0_RE"].to_float32())
    torch.testing.assert_close(frames_RE, cut_BRE[0, : len(frames_RE)], atol=2e-3, rtol=0)
    own = heard.queries_BWQE[0, : heard.num_windows_B[0]]
    torch.testing.assert_close(torch.from_numpy(record.features["queries_WQE"].to_float32()), own, atol=0.05, rtol=0)


def tiny_stream(config):
    order = Order(batch_size=1, shuffle=False, epochs=1)
    stream = ShardStream(config.shards("train"), order, Selection(targets=config.cache_folder))
    return (samples[0] for samples in stream)


def test_a_cache_of_another_length_is_refused_with_both_values(toys):
    config = load_config(toys / "toy.yaml", ["student.ears_seconds=clip+1"])
    teacher = load_teacher(config)
    with pytest.raises(ValueError, match=r'features\.ears_seconds: cached "clip", this run "clip\+1"'):
        wrap_teacher(config, teacher)
    student = build_student(teacher, str(toys / "parts/student-llm"), hearing=Hearing(ears_seconds="clip+1"),
                            quantization="none", connector=Connector("new"), say=lambda text: None)  # fmt: skip
    cached = CachedTeacher(config.cache_folder)
    with pytest.raises(ValueError, match=r"ears_seconds of the student is 'clip\+1', but the cache keeps .* of 'clip'"):
        check_frames(cached.header, student)
    with pytest.raises(ValueError, match=r"ears_seconds of the student is 'clip\+1', but the cache keeps"):
        Distiller(cached, student, train=toys / "data/train", run=toys / "other")


def test_a_fingerprint_without_frames_does_not_hold_the_students_length(toys):
    config = load_config(toys / "toy.yaml", ["cache.frames=none"])
    other = replace(config, student=replace(config.student, ears_seconds="clip+1"))
    teacher = load_teacher(config)
    assert describe_teacher(teacher, config).fingerprint == describe_teacher(teacher, other).fingerprint


def test_a_saved_and_an_exported_student_hear_as_they_were_trained_and_salmonns_code_does_not_get_them(toys, tmp_path):
    samples = [tiny.make_sample(1, seconds=1.3), tiny.make_sample(2)]
    student = load_student(toys / "runs/toy/student")
    assert student.config.ears_seconds == "clip"
    exported = load_student(export(toys / "runs/toy", tmp_path / "out", whole=True))
    with torch.no_grad():
        logits = student(student.collate(samples))[0]
        assert torch.equal(exported(exported.collate(samples))[0], logits)
        student.config = dataclasses.replace(student.config, ears_seconds="30")
        assert not torch.allclose(student(student.collate(samples))[0], logits)
    with pytest.raises(ValueError, match=r"ears_seconds of the student is 'clip', but SALMONN's code"):
        export(toys / "runs/toy", tmp_path / "pth", salmonn=True)


def test_a_student_does_not_go_on_from_one_that_heard_another_length(toys):
    student = build_student(load_teacher(load_config(toys / "toy.yaml")), str(toys / "parts/student-llm"),
                            quantization="none", connector=Connector("new"), say=lambda text: None,
                            lora=Lora(rank=4))  # fmt: skip
    with pytest.raises(ValueError, match=r"whose ears_seconds is 'clip', but this run's is '30'"):
        load_start_weights_(student, toys / "runs/toy/student", lora=Lora(rank=4), quantization="none")


def test_cut_ears_cost_fewer_flops(toys):
    config = load_config(toys / "toy.yaml")
    teacher, given = describe_teachers_sizes(config)
    from distill.sizes.costs import Usage

    usage = Usage(seconds=1.0)
    cut = {part.name: part for part in measure(describe_student(config, teacher), usage, given)}
    whole = {part.name: part for part in measure(teacher, usage, given)}
    assert 0.4 < cut["Whisper encoder"].flops / whole["Whisper encoder"].flops < 0.6
