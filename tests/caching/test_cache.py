"""The caching job: what it writes trains as the teacher itself would, and no interruption changes a byte of it."""

import builtins
import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import signal
import traceback
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from distill import cache as cache_module
from distill.cache import cache
from distill.caching import identity
from distill.caching.identity import describe_teacher
from distill.config import Config, LossConfig, TrainConfig, load_config
from distill.distiller import Distiller
from distill.run import run, wrap_teacher
from distill.teacher import load_teacher
from shards.audio.augmentation import Augmentation
from shards.packing.folder import ShardSize
from shards.packing.pack import pack
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.codecs.table import decode
from shards.targets.header import LATER, CacheHeader
from shards.targets.record import TargetRecord
from shards.targets.store import TargetReader
from shards.tars.archive import ShardError
from shards.tars.tarwriter import TarWriter
from students.hearing import Connector, Hearing
from students.student import build_student
from teachers.cached import CachedTeacher
from teachers.files.cacheparts import FOLDER, HEAD, PROMPTS
from teachers.files.checkpoint import save_checkpoint
from teachers.files.loading import load_salmonn, save_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher
from teachers.targets import identify_row

OPTIONS = TrainConfig(steps=3, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=1, save_every=100)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, cache__features="float16", cache__max_new_tokens=5)
    return folder


@functools.cache
def read_config(path: Path, words: tuple[str, ...]) -> Config:
    return load_config(path, words)


def make_cache(toys: Path, folder: Path, *words: str) -> Config:
    """Run the job; returns its config."""
    config = read_config(toys / "toy.yaml", words)
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, folder=str(folder)))
    assert cache(config) == 0
    return config


def train(toys: Path, run_folder: Path, config, model=None, **loss) -> list[float]:
    """Losses of a short run, from the cache of a config or, with `teacher.online`, from the teacher itself."""
    model = model or load_salmonn(toys / "teacher")
    student = build_student(model, str(toys / "parts" / "student-llm"), lora=Lora(rank=4), connector=Connector("new"),
                            quantization="none")  # fmt: skip
    teacher = wrap_teacher(config, model)
    selection, decode = Selection(targets=teacher.cache_folder), config.cache.frames == "none"
    stream = ShardStream(toys / "data" / "train", Order(batch_size=4), selection, decode=decode)
    run = Distiller(teacher, student, train=stream, options=OPTIONS, run=run_folder, loss=LossConfig(**loss))
    return run.fit().losses


def read_files(folder: Path) -> dict[str, bytes]:
    """Everything a cache is: not the index, which holds the tar's time of change."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".idx")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_records(folder: Path) -> dict:
    """The records of a cache by key."""
    reader = TargetReader(folder, None)
    shards = sorted(path.name.removesuffix(".targets.tar") for path in folder.glob("*.targets.tar"))
    return {key: reader.read_record(shard, key) for shard in shards for key in reader.keys(shard)}


# --- codecs ----------------------------------------------------------------------------------------------------------

# What a codec cannot keep, in nats of the loss: float16, int8 states, a coarse tail, the mean of 3,000 draws. The
# teacher itself says what is comparable: the same k for topk and adaptive, all ids for the others.
CODECS = {
    "dense": (["cache.codec=dense"], 1.0, 5e-3),
    "dense at any temperature": (["cache.codec=dense"], 1.7, 5e-3),
    "hidden": (["cache.codec=hidden"], 1.0, 5e-3),
    "hidden at any temperature": (["cache.codec=hidden"], 1.7, 5e-3),
    "topk": (["cache.codec=topk", "cache.k=64"], 1.0, 5e-3),
    "topk at a stored temperature": (["cache.codec=topk", "cache.k=64"], 2.0, 5e-3),
    "adaptive": (["cache.codec=adaptive", "cache.k=64", "cache.threshold=0"], 1.0, 5e-3),
    "sampled": (["cache.codec=sampled", "cache.draws=3000"], 1.0, 0.1),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_cache_of_every_codec_gives_the_losses_of_the_teacher_itself(toys, tmp_path, name):
    words, temperature, error = CODECS[name]
    config = make_cache(toys, tmp_path / "cache", *words)
    model = load_salmonn(toys / "teacher")
    online = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, online=True))
    expected = train(toys, tmp_path / "online", online, model, temperature=temperature)
    losses = train(toys, tmp_path / "cached", config, model, temperature=temperature)
    assert losses == pytest.approx(expected, abs=error)


def test_a_teacher_in_int8_is_cached_as_another_one_and_says_the_same_online(toys, tmp_path, capsys):
    config = make_cache(toys, tmp_path / "cache", "teacher.quantization=int8", "cache.codec=dense")
    assert "the teacher's LLM is in int8 (teacher.quantization): " in capsys.readouterr().err
    online = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, online=True))
    expected = train(toys, tmp_path / "online", online, load_teacher(config))
    losses = train(toys, tmp_path / "cached", config, load_teacher(config, llm_weights=False))
    assert losses == pytest.approx(expected, abs=5e-3)
    whole = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, quantization="none"))
    with pytest.raises(ValueError, match='llm_bits: cached "int8", this run nothing'):
        wrap_teacher(whole, load_teacher(whole))


@pytest.mark.parametrize(
    ("codec", "refusal"),
    [
        ("topk", r"loss\.temperature is 3, but the teacher's targets are kept at 1, 2 alone; use one of those"),
        ("adaptive", r"loss\.temperature is 3, but the teacher's targets are kept at 1, 2 alone; use one of those"),
        ("sampled", r"temperature 3, but draws of the teacher .* give forward_kl at temperature 1 alone"),
    ],
)
def test_a_temperature_that_was_not_cached_is_refused_with_both_values(toys, tmp_path, codec, refusal):
    config = make_cache(toys, tmp_path / "cache", f"cache.codec={codec}")
    with pytest.raises(ValueError, match=refusal):
        train(toys, tmp_path / "run", config, temperature=3.0)


@pytest.mark.parametrize("codec", ["sampled", "hidden"])
def test_caching_again_from_nothing_gives_the_same_bytes(toys, tmp_path, codec):
    for name in ("first", "second"):
        make_cache(toys, tmp_path / name, f"cache.codec={codec}", "data.labelled_share=0.5")
    assert read_files(tmp_path / "first") == read_files(tmp_path / "second")


def test_hidden_states_find_the_head_in_the_cache_and_refuse_another(toys, tmp_path):
    make_cache(toys, tmp_path, "cache.codec=hidden")
    teacher = CachedTeacher(tmp_path)
    assert torch.equal(teacher.head_weight_VD, load_salmonn(toys / "teacher").llm.lm_head.weight)
    path = tmp_path / FOLDER / HEAD
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"head\.safetensors has hash [0-9a-f]{16}, but was cached as [0-9a-f]{16}"):
        CachedTeacher(tmp_path).head_weight_VD  # noqa: B018
    path.unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors is not there, but targets of codec hidden need the head"):
        CachedTeacher(tmp_path).head_weight_VD  # noqa: B018


def test_a_cache_makes_the_teachers_rows_without_the_teacher_and_refuses_other_prompts(toys, tmp_path):
    make_cache(toys, tmp_path)
    model, rows = load_salmonn(toys / "teacher"), CachedTeacher(tmp_path).rows
    for task in ("asr", "audiocaption", "gender_recognition"):
        sample = tiny.make_sample(3, task=task)
        theirs, ours = (r.row(sample, with_answer=True, first_prompt=False) for r in (model.rows, rows))
        assert identify_row(sample, ours) == identify_row(sample, theirs)
    path = tmp_path / FOLDER / PROMPTS
    path.write_text(path.read_text().replace("said", "spoken"))
    with pytest.raises(ValueError, match=r"prompts\.json has hash [0-9a-f]{16}, but was cached as [0-9a-f]{16}"):
        CachedTeacher(tmp_path).rows  # noqa: B018
    path.unlink()
    with pytest.raises(ValueError, match=r"teacher is not whole, but holds a cache's tokenizer and prompts"):
        CachedTeacher(tmp_path).rows  # noqa: B018


# --- features --------------------------------------------------------------------------------------------------------


def test_cached_layers_are_those_of_the_teacher(toys, tmp_path):
    config = make_cache(toys, tmp_path, "cache.hidden_layers=[-1,1]")
    model = load_salmonn(toys / "teacher")
    stream = ShardStream(toys / "data" / "train", Order(batch_size=3, shuffle=False), Selection(targets=tmp_path))
    batch = model.collate(next(iter(stream)))
    cached = wrap_teacher(config, model).targets(batch)
    live = OnlineTeacher(model, hidden_layers=[1]).targets(batch)
    assert cached.hidden_by_layer.keys() == live.hidden_by_layer.keys() == {1}
    torch.testing.assert_close(cached.hidden_by_layer[1], live.hidden_by_layer[1], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(cached.hidden, live.hidden, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(cached.label_logprobs_S, live.label_logprobs_S, rtol=1e-4, atol=1e-4)


def test_a_layer_that_the_llm_does_not_have_is_refused(toys, tmp_path):
    with pytest.raises(ValueError, match=r"hidden_layers names 7, but the LLM's blocks are 1 to 1"):
        make_cache(toys, tmp_path, "cache.hidden_layers=[7]")
    assert not list(tmp_path.glob("*.targets.tar"))


@pytest.mark.parametrize("windows", ["audio", "all"])
def test_cached_frames_give_the_losses_of_ears_that_run(toys, tmp_path, windows):
    words = ["cache.codec=dense", "cache.frames=float16", f"student.windows={windows}"]
    config = make_cache(toys, tmp_path / "cache", *words)
    plain = make_cache(toys, tmp_path / "plain", "cache.codec=dense")
    model = load_salmonn(toys / "teacher")
    expected = train(toys, tmp_path / "a", plain, model)
    model.whisper.forward = model.whisper.encode = None  # nobody may hear, and nothing is decoded
    assert train(toys, tmp_path / "b", config, model) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_is_unpacked_once_a_step_and_by_the_workers_where_there_are_some(toys, tmp_path, monkeypatch, workers):
    config = make_cache(toys, tmp_path, "cache.frames=int8", "data.labelled_share=0.5", "cache.hidden_layers=[1]")
    model, unpack, unpacked = load_salmonn(toys / "teacher"), TargetRecord.unpack, []
    monkeypatch.setattr(TargetRecord, "unpack", lambda data, **how: unpacked.append(data) or unpack(data, **how))
    stream = ShardStream(toys / "data" / "train", Order(batch_size=12, shuffle=False),
                         Selection(targets=tmp_path, labelled_share=0.5), Limits(workers=workers),
                         decode=False)  # fmt: skip
    teacher = wrap_teacher(config, model)
    samples, is_pseudo = teacher.label(next(iter(stream)))
    targets = teacher.targets(model.collate(samples))
    assert len(unpacked) == (0 if workers else 12) and 0 < sum(is_pseudo) < 12
    records = read_records(tmp_path)
    for b, sample in enumerate(samples):
        frames_RE = records[sample.key].features["frames_0_RE"]
        assert np.array_equal(targets.frames[0][b, : len(frames_RE)].numpy(), frames_RE)
    states_SD = np.concatenate([records[sample.key].features["hidden_1_SD"] for sample in samples])
    assert np.array_equal(targets.hidden_by_layer[1].numpy(), states_SD)


def test_frames_of_some_windows_are_refused_for_a_student_that_reads_all(toys, tmp_path):
    make_cache(toys, tmp_path / "cache", "cache.frames=int8")
    student = build_student(load_salmonn(toys / "teacher"), str(toys / "parts" / "student-llm"), quantization="none",
                            hearing=Hearing(windows="all"))  # fmt: skip
    with pytest.raises(ValueError, match=r"windows of the student is 'all', but .*/cache keeps the frames of 'audio'"):
        Distiller(tmp_path / "cache", student, train=toys / "data" / "train", run=tmp_path / "run")


def test_a_clip_that_is_not_decoded_is_silence_of_its_length(toys):
    heard, unheard = (
        next(iter(ShardStream(toys / "data" / "train", Order(batch_size=12, shuffle=False), decode=decode)))
        for decode in (True, False)
    )
    assert [(s.key, s.sha256, len(s.waveform_N)) for s in heard] == [
        (s.key, s.sha256, len(s.waveform_N)) for s in unheard
    ]
    assert all(h.waveform_N.any() and not u.waveform_N.any() for h, u in zip(heard, unheard))
    with pytest.raises(ValueError, match="decode is False, but augmentation needs the audio"):
        ShardStream(
            toys / "data" / "train", Order(batch_size=2), decode=False, augmentation=Augmentation(noise_share=1.0)
        )


def test_frames_are_cut_to_what_the_students_windows_read(toys, tmp_path):
    make_cache(toys, tmp_path, "cache.frames=int8")
    sizes = {len(record.features["frames_0_RE"]) for record in read_records(tmp_path).values()}
    assert sizes == {51}  # three windows of 17 frames for clips of 0.5, 0.75 and 1 s, of 100 frames for 2 s


def test_cached_frames_are_refused_for_an_augmented_clip(toys, tmp_path):
    config = make_cache(toys, tmp_path, "cache.frames=int8")
    model = load_salmonn(toys / "teacher")
    sample = next(iter(ShardStream(toys / "data" / "train", Order(batch_size=1), Selection(targets=tmp_path))))[0]
    sample = dataclasses.replace(sample, clean_N=sample.waveform_N, waveform_N=sample.waveform_N * 0.5)
    with pytest.raises(ValueError, match=r"is augmented, but .* holds the encoders' frames of the clean clip"):
        wrap_teacher(config, model).targets(model.collate([sample]))


# --- answers ---------------------------------------------------------------------------------------------------------


def test_with_both_answers_epochs_take_turns_and_targets_fit_each(toys, tmp_path):
    config = make_cache(toys, tmp_path, "cache.answers=both", "cache.codec=dense", "cache.num_beams=2")
    model = load_salmonn(toys / "teacher")
    teacher = wrap_teacher(config, model)
    stream = ShardStream(toys / "data" / "train", Order(batch_size=3, shuffle=False), Selection(targets=tmp_path))
    samples = next(iter(stream))
    own = OnlineTeacher(model, answers="teacher", max_new_tokens=5, num_beams=2).label(samples)[0]
    for epoch, expected in ((0, samples), (1, own), (2, samples)):
        now, is_pseudo = teacher.label([dataclasses.replace(sample, epoch=epoch) for sample in samples])
        assert [s.text for s in now] == [s.text for s in expected] and is_pseudo == [epoch == 1] * 3
        cached, live = (t.targets(model.collate(now)) for t in (teacher, OnlineTeacher(model)))
        torch.testing.assert_close(cached.distribution.logprobs_SK, live.distribution.logprobs_SK, rtol=0, atol=5e-3)
        torch.testing.assert_close(cached.queries_BWQE, live.queries_BWQE, rtol=2e-3, atol=2e-3)
    assert {(r.answer_source, r.other.answer_source) for r in read_records(tmp_path).values()} == {("label", "teacher")}


def test_the_teachers_own_answers_can_replace_every_label(toys, tmp_path):
    make_cache(toys, tmp_path, "cache.answers=teacher")
    records = read_records(tmp_path)
    labels = read_records(make_cache(toys, tmp_path / "labels").cache_folder)
    assert {record.answer_source for record in records.values()} == {"teacher"}
    assert all(records[key].answer != labels[key].answer for key in records)


@pytest.mark.parametrize("word", ["cache.answers=label", "cache.answers=both", "cache.transcripts=true"])
def test_the_ears_hear_a_clip_once_whatever_is_asked_about_it(toys, word):
    teacher = OnlineTeacher(load_salmonn(toys / "teacher"), max_new_tokens=5)
    samples = [tiny.make_sample(n, text=text, seconds=seconds)
               for n, (text, seconds) in enumerate([("one", 0.7), (None, 1.9), ("two", 1.6), (None, 1.2)])]  # fmt: skip
    heard, ear = [], teacher.model.whisper
    with ear.register_forward_hook(lambda ear, inputs, output: heard.append(len(inputs[0]))):
        records = cache_module.Capturer(teacher, read_config(toys / "toy.yaml", (word,)))(samples)
    assert heard == [len(samples)]
    for record, sample in zip(map(records.get, (sample.key for sample in samples)), samples):
        own = [sample.text or teacher.answer([sample])[0]]  # as it answers to the clip alone
        own += [teacher.answer([sample])[0]] if sample.text and word == "cache.answers=both" else []
        assert [one.answer for one in (record, record.other) if one is not None] == own


def test_transcripts_stand_beside_the_label_with_their_error_rate(toys, tmp_path):
    make_cache(toys, tmp_path, "cache.transcripts=true", "eval.normalize=false")
    notes = [record.notes for record in read_records(tmp_path).values()]
    assert all("transcript" in note and float(note["wer"]) > 0 for note in notes)


def test_byte_offsets_are_those_of_the_tokens_even_inside_a_character(toys, tmp_path):
    capturer = cache_module.Capturer(OnlineTeacher(load_salmonn(toys / "teacher")), load_config(toys / "toy.yaml"))
    text = "one Ä €"  # the tokenizer knows neither Ä nor €: their bytes are its tokens
    answer = capturer.model.rows.answer_ids(text)
    ends = capturer._byte_ends(answer, text).tolist()
    assert ends == sorted(ends) and ends[-1] == ends[-2] == len(text.encode())
    assert {5, 6, 8, 9, 10} <= set(ends)  # each byte of Ä (4 to 6) and of € (7 to 10) ends a token
    assert capturer._byte_ends(answer, "another text").tolist() == [-1] * len(answer)


# --- processes -------------------------------------------------------------------------------------------------------


def run_child(function) -> tuple[int, str]:
    """Run a function in a process of its own; returns its exit status, -9 where it was killed, and its error."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os.write(write_end, traceback.format_exc().encode()[-4000:])
            os._exit(1)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        error = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), error


def kill_at(call: int) -> None:
    """Make this process die by kill -9 before its n-th call of the teacher or of a disk."""
    left = [call]

    def fatal(function):
        def wrapper(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for owner, names in ((os, ("fsync", "replace", "link", "rename")), (builtins, ("open",)),
                         (TarWriter, ("add", "close")), (cache_module.Capturer, ("__call__",))):  # fmt: skip
        for name in names:
            setattr(owner, name, fatal(getattr(owner, name)))


def test_kill_9_at_ten_random_moments_ends_in_the_bytes_of_an_undisturbed_job(toys, tmp_path):
    words = ["cache.codec=sampled", "data.labelled_share=0.5"]
    expected = read_files(make_cache(toys, tmp_path / "whole", *words).cache_folder)
    moments, killed = random.Random(0), 0
    for attempt in range(20):
        folder, moment = tmp_path / f"killed-{killed // 3}", moments.randrange(1, 40)
        status, error = run_child(lambda at=moment, to=folder: (kill_at(at), make_cache(toys, to, *words)))
        assert status in (0, -signal.SIGKILL), error
        killed += status != 0
        left = {name: data for name, data in read_files(folder).items() if not name.startswith(".")}
        assert all(data == expected[name] for name, data in left.items()), f"attempt {attempt}, killed at {moment}"
        assert status != 0 or left == expected
        if killed == 10:
            break
    assert killed == 10
    for number in range(4):  # each was killed three times, the last once
        make_cache(toys, tmp_path / f"killed-{number}", *words)
        left = read_files(tmp_path / f"killed-{number}")
        assert {name: data for name, data in left.items() if not name.startswith(".")} == expected


def test_three_processes_share_a_job_and_write_the_bytes_of_one(toys, tmp_path):
    expected = read_files(make_cache(toys, tmp_path / "one").cache_folder)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                make_cache(toys, tmp_path / "three")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert read_files(tmp_path / "three") == expected


def test_the_closing_table_counts_what_was_written_and_a_teacher_that_only_guesses_is_said(toys, tmp_path, capsys):
    make_cache(toys, tmp_path, "cache.codec=topk")
    printed, warned = capsys.readouterr()
    records = read_records(tmp_path).values()
    tokens = sum(len(record.answer_ids_S) for record in records)
    doubt = sum(-float(record.label_logprobs_S.sum()) for record in records) / tokens
    assert f"warning: the teacher's cross-entropy on the answers is {doubt:.2f} nats a token, but guessing" in warned
    mass = sum(float(decode(record.payload).logprobs_SK.exp().sum()) for record in records) / tokens
    payload = sum(len(record.payload) for record in records) / tokens
    for name, value in (("samples", "12 "), ("tokens", f"{tokens}"), ("bytes a token", f"{payload:.1f} "),
                        ("captured mass", f"{mass:.4f}"), ("teacher", f"cross-entropy {doubt:.3f} "),
                        ("hours", "0.0")):  # fmt: skip
        assert f"  {name:<14} {value}" in printed


@pytest.mark.parametrize("limit", [1_000, 6_000, 30_000])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(toys, tmp_path, limit):
    words = ["cache.codec=dense", "cache.frames=float16"]
    expected = read_files(make_cache(toys, tmp_path / "whole", *words).cache_folder)

    def write_too_much():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        make_cache(toys, tmp_path / "full", *words)

    status, error = run_child(write_too_much)
    assert status == 1
    assert "bytes are free, but" in error and "free some space and start again" in error, error
    left = {name: data for name, data in read_files(tmp_path / "full").items() if not name.startswith(".")}
    assert left.items() <= expected.items()
    assert read_files(make_cache(toys, tmp_path / "full", *words).cache_folder).items() >= expected.items()


def test_what_a_killed_process_left_of_the_teachers_parts_is_cleared(toys, tmp_path):
    (tmp_path / "cache" / f".{FOLDER}.0123.tmp").mkdir(parents=True)
    (tmp_path / "cache" / f".{FOLDER}.0123.tmp" / PROMPTS).write_text("{")
    make_cache(toys, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").glob(f"*{FOLDER}*")] == [FOLDER]


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_training_refuses_a_cache_that_lacks_a_shard_or_holds_a_cut_one(toys, tmp_path):
    config = make_cache(toys, tmp_path)
    model, tars = load_salmonn(toys / "teacher"), sorted(tmp_path.glob("*.targets.tar"))
    tars[0].write_bytes(tars[0].read_bytes()[:-512])
    with pytest.raises(ShardError, match=r"targets\.tar is [\d,]+ bytes of \w+, but [\d,]+ bytes of \w+ were written"):
        wrap_teacher(config, model)
    tars[0].unlink()
    with pytest.raises(ShardError, match=r"lacks the targets of 1 of 3 shards \(train-000000\)"):
        wrap_teacher(config, model)
    make_cache(toys, tmp_path)
    assert len(wrap_teacher(config, model).reader.keys("train-000000")) == 5


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "record of another shape", "figures of another shape"])
def test_a_damaged_shard_of_a_cache_is_found_and_made_again_byte_for_byte(toys, tmp_path, damage):
    config = make_cache(toys, tmp_path)
    expected = read_files(tmp_path)
    tar, record = tmp_path / "train-000001.targets.tar", tmp_path / "train-000001.targets.json"
    data = tar.read_bytes()
    if damage == "flipped byte":
        tar.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
        with pytest.raises(ShardError, match=r"000001\.targets\.tar has .*; run `distill cache` again, which makes it"):
            wrap_teacher(config, load_salmonn(toys / "teacher")).reader.keys("train-000001")
    if damage == "cut":
        tar.write_bytes(data[:-512])
    if damage == "record of another shape":
        record.write_text("[]")
    if damage == "figures of another shape":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"figures": {"tokens": None}}))
    make_cache(toys, tmp_path)
    assert read_files(tmp_path) == expected


def test_a_wrong_data_folder_is_refused_before_a_teacher_is_loaded_or_a_folder_made(toys, tmp_path):
    words = [f"data.folder={tmp_path / 'gone'}", f"teacher.path={tmp_path / 'teacher'}"]
    with pytest.raises(ValueError, match=r"shards is '\S*gone/train' .*, but no shard matches"):
        cache(load_config(toys / "toy.yaml", words))
    assert not list(tmp_path.iterdir())


def test_shards_that_were_packed_anew_from_other_data_are_cached_again_and_no_others(toys, tmp_path, capsys):
    shutil.copytree(toys / "data" / "train", tmp_path / "data" / "train")
    words = [f"data.folder={tmp_path}/data"]
    config = load_config(toys / "toy.yaml", words)
    assert cache(config) == 0
    before = read_files(config.cache_folder)
    shutil.rmtree(tmp_path / "data" / "train")
    rows = json.loads((toys / "data" / "train.json").read_text())["annotation"]
    rows[-1]["text"] = "nine nine nine"  # in the last of three shards
    (tmp_path / "data" / "train.json").write_text(json.dumps({"annotation": rows}))
    pack(tmp_path / "data" / "train.json", tmp_path / "data" / "train", name="train", size=ShardSize(5), workers=1)
    model = load_salmonn(toys / "teacher")
    with pytest.raises(ShardError, match=r"lacks the targets of 1 of 3 shards \(train-000002\).* `distill cache`"):
        wrap_teacher(config, model)
    assert cache(config) == 0
    assert "used again" not in capsys.readouterr().err
    after = read_files(config.cache_folder)
    assert {name for name in before if before[name] != after[name]} == {
        f"train-000002.targets.{end}" for end in ("json", "tar")
    }
    stream = ShardStream(tmp_path / "data" / "train", Order(batch_size=12), Selection(targets=config.cache_folder))
    assert len(wrap_teacher(config, model).targets(model.collate(next(iter(stream)))).label_logprobs_S) > 12


CHANGES = {
    "codec.k": "cache.k=8",
    "codec.temperatures": "cache.temperatures=[1.0]",
    "codec.name": "cache.codec=adaptive",
    "features.queries": "cache.features=int8",
    "features.hidden_layers": "cache.hidden_layers=[1]",
    "features.frames": "cache.frames=int8",
    "answers.of": "cache.answers=both",
    "answers.num_beams": "cache.num_beams=3",
    "answers.max_new_tokens": "cache.max_new_tokens=6",
    "answers.labelled_share": "data.labelled_share=0.5",
    "dtype": "precision=bf16",
}


def test_a_cache_with_other_settings_is_refused_by_name(toys, tmp_path):
    make_cache(toys, tmp_path)
    model = load_salmonn(toys / "teacher")
    for field, word in CHANGES.items():
        config = load_config(toys / "toy.yaml", [f"cache.folder={tmp_path}", word])
        with pytest.raises(ValueError, match=rf"(?s)was cached as .* {field}: cached .*, this run"):
            wrap_teacher(config, model)


def test_a_cache_whose_header_does_not_name_later_fields_is_read_and_completed(toys, tmp_path, monkeypatch):
    def describe_as_before(*args, **how):
        fields = {name: value for name, value in describe_teacher(*args, **how).identity.items() if name != "ends"}
        for room in ("answers", "features", "teacher_config"):
            fields[room] = {name: x for name, x in fields[room].items() if f"{room}.{name}" not in LATER}
        return CacheHeader(fields)

    monkeypatch.setattr(cache_module, "describe_teacher", describe_as_before)
    config = make_cache(toys, tmp_path, "cache.frames=int8")
    monkeypatch.undo()
    before, model = read_files(tmp_path), load_salmonn(toys / "teacher")
    assert wrap_teacher(config, model).header != describe_teacher(model, config)
    (tmp_path / "train-000001.targets.json").unlink()
    make_cache(toys, tmp_path, "cache.frames=int8")
    assert read_files(tmp_path) == before and len(train(toys, tmp_path / "run", config, model)) == 3
    monkeypatch.setattr(identity, "ANSWERS", 2)
    with pytest.raises(ValueError, match=r"What differs:\n  answers\.version: cached 1, this run 2$"):
        wrap_teacher(config, model)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("path", ["teacher", "salmonn.pth", "trained"])
def test_a_teacher_without_its_llms_weights_is_the_same_teacher_to_a_cache(toys, tmp_path, path, precision):
    words = [f"precision={precision}"]
    if path == "salmonn.pth":
        save_checkpoint(tiny.make_teacher(toys / "parts", lora=True), tmp_path / path)
        words += [f"teacher.{name}={toys / 'parts' / name}" for name in ("llm", "whisper")]
        words += [f"teacher.path={tmp_path / path}"]
    if path == "trained":  # its LLM is its own, the head tied to the embeddings
        teacher = tiny.make_teacher(toys / "parts")
        teacher.llm.requires_grad_(True)
        assert teacher.llm.config.tie_word_embeddings
        save_salmonn(teacher, tmp_path / path)
        words += [f"teacher.path={tmp_path / path}"]
    config = load_config(toys / "toy.yaml", words)
    whole, light = load_teacher(config), load_teacher(config, llm_weights=False)
    assert describe_teacher(light, config).identity == describe_teacher(whole, config).identity
    assert light.llm.get_output_embeddings().weight is light.llm.get_input_embeddings().weight
    frozen = [p for name, p in light.llm.named_parameters() if "lora_" not in name]
    assert frozen and all(p.is_meta == (path != "trained") for p in frozen)
    for name, parameter in light.named_parameters():
        assert parameter.is_meta or torch.equal(parameter, whole.get_parameter(name)), name


def test_a_run_from_the_cache_never_loads_the_teachers_llm(toys, tmp_path, monkeypatch):
    config = make_cache(toys, tmp_path / "cache", f"runs={tmp_path}", "train.steps=1")
    loaded = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **k: loaded.append(path) or load(path, **k)
    )
    assert run(config) == 0
    assert loaded == [config.student.llm]
