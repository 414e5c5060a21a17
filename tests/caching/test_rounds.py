"""On-policy rounds: answers are the student's own, the teacher's word on them is right, and runs mix them exactly."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distill.answers import Answerer, answers, check_answers
from distill.cache import cache
from distill.caching.capture import Capturer
from distill.config import Config, OnPolicyConfig, StudentConfig, load_config
from distill.config.rules import value_at
from distill.demo.scratch import build_llm
from distill.demo.tokenizer import train_tokenizer
from distill.run import run
from distill.student import lora_of
from distill.training.microbatch import Collator
from distill.training.monitoring.steplog import rates
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.header import CacheHeader, read_header
from shards.targets.store import TargetReader
from students.hearing import Hearing
from students.start import identify_student, load_start_weights_
from students.student import build_student, load_student
from teachers.cached import CachedTeacher
from teachers.files.loading import WEIGHTS, load_salmonn, own_tensors
from teachers.lora import Lora
from teachers.online import OnlineTeacher
from teachers.words.draws import Draw

DRAWN = ("on_policy.round=1", "on_policy.temperature=1", "on_policy.max_new_tokens=6")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Parts, a teacher, shards, their cache, a student `runs/r0/student`, and its answers as round 1."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(
        folder,
        precision="float32",
        cache__codec="dense",
        cache__features="float16",
        cache__hidden_layers="[1,-1]",
        student__quantization="none",
    )
    cache(configure(folder))
    run(configure(folder, "name=r0"))
    answers(configure(folder, "name=r0", *DRAWN))
    return folder


def configure(toys: Path, *words: str):
    return load_config(toys / "toy.yaml", words)


def round_words(toys: Path, share: float, *words: str) -> list[str]:
    """What a run says that goes on from the student that answered."""
    return [f"student.start={toys}/runs/r0/student", "on_policy.round=1", f"on_policy.share={share}", *words]


def train(toys: Path, name: str, *words: str) -> list[dict]:
    """A run in this process; the metrics of its steps, without times."""
    run(configure(toys, f"name={name}", *words))
    return metrics(toys, name)


def metrics(toys: Path, name: str) -> list[dict]:
    lines = (toys / "runs" / name / "metrics.jsonl").read_text().splitlines()
    timed = rates({"tokens": 0, "audio_seconds": 0, "waited": 0}, 1.0, 1)
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def read_tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.targets.tar"))}


def read_records(folder: Path) -> dict:
    reader = TargetReader(folder, None)
    shards = [name.removesuffix(".targets.tar") for name in read_tars(folder)]
    return {key: reader.read_record(shard, key) for shard in shards for key in reader.keys(shard)}


def open_stream(toys: Path, share: float = 1.0, answers: Path | None = None, **options) -> ShardStream:
    cached = toys / "data" / "cache"
    selection = Selection(targets=cached, student_answers=answers or cached / "round-1", student_share=share)
    return ShardStream(toys / "data" / "train", Order(**({"batch_size": 12} | options)), selection)


# --- the job ---------------------------------------------------------------------------------------------------------


def test_a_greedy_answer_is_what_the_student_says_to_the_prompt_it_is_trained_with(toys, tmp_path):
    answers(configure(toys, "name=r0", f"cache.folder={tmp_path}", "on_policy.round=3", "on_policy.max_new_tokens=5"))
    records, student = read_records(tmp_path / "round-3"), load_student(toys / "runs/r0/student")
    for sample in next(iter(open_stream(toys, 0.0))):
        batch = student.collate([sample], with_answer=False)
        said = student.generate_ids(batch, max_new_tokens=5)[0]
        if said[-1] in student.end_ids:
            said.pop()
        assert records[sample.key].answer_ids_S.tolist() == [*said, *student.rows.end_ids]
        assert records[sample.key].answer_source == "student"
    assert len(records) == 12


def test_two_ranks_write_the_bytes_that_one_writes(toys, tmp_path):
    tiny.run_two_ranks(answers, configure(toys, "name=r0", f"cache.folder={tmp_path}", *DRAWN))
    assert read_tars(tmp_path / "round-1") == read_tars(toys / "data/cache/round-1")


def test_drawn_answers_depend_on_seed_and_round_and_not_on_the_batch(toys):
    student, teacher = load_student(toys / "runs/r0/student"), OnlineTeacher(load_salmonn(toys / "teacher"))
    samples = next(iter(open_stream(toys, 0.0, shuffle=False)))

    def answer(*words: str, together: bool = True) -> dict[str, tuple]:
        config = configure(toys, "name=r0", *DRAWN, *words)
        ask = Answerer(student, Capturer(teacher, config), config)
        batches = [samples] if together else [[sample] for sample in reversed(samples)]
        return {s.key: s.answer_ids for batch in batches for s in ask.answer(batch)}

    expected = {key: tuple(r.answer_ids_S.tolist()) for key, r in read_records(toys / "data/cache/round-1").items()}
    assert answer() == answer(together=False) == expected
    assert len(set(expected.values())) > 6
    assert all(answer(word) != expected for word in ("seed=1", "on_policy.round=2", "on_policy.temperature=0.5"))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_their_temperature(temperature):
    logits_V, num_rows = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0]), 4000
    draw = Draw([f"row {number}" for number in range(num_rows)], temperature, 2)
    expected_V = torch.softmax(logits_V / temperature, -1)
    for _ in range(2):
        chosen_B = draw(torch.zeros(num_rows, 0), logits_V.expand(num_rows, -1)).argmax(-1)
        share_V = torch.bincount(chosen_B, minlength=5) / num_rows
        assert share_V[1] == 0 and (share_V - expected_V).abs().max() < 4 * (0.25 / num_rows) ** 0.5


def test_a_stopped_job_goes_on_to_the_same_bytes(toys, tmp_path, capsys):
    folder = tmp_path / "round-1"
    shutil.copytree(toys / "data/cache/round-1", folder)
    for file in folder.glob("train-000001.targets.*"):
        file.unlink()
    kept = (folder / "train-000000.targets.tar").stat().st_mtime_ns
    config = configure(toys, "name=r0", f"cache.folder={tmp_path}", *DRAWN)
    answers(config)
    assert read_tars(folder) == read_tars(toys / "data/cache/round-1")
    assert (folder / "train-000000.targets.tar").stat().st_mtime_ns == kept
    answers(config)
    assert "holds the targets of all 3 shards, used again" in capsys.readouterr().err


def test_a_share_of_the_clips_is_answered_and_only_those_are_learned_from(toys, tmp_path):
    answers(configure(toys, "name=r0", f"cache.folder={tmp_path}", "on_policy.clips=0.4", *DRAWN))
    keys = set(read_records(tmp_path / "round-1"))
    assert len(keys) == 2 + 2 + 1  # of shards of 5, 5 and 2 clips
    samples = next(iter(open_stream(toys, 1.0, answers=tmp_path / "round-1")))
    assert {sample.key for sample in samples if sample.student_answer is not None} == keys


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_online", [False, True])
def test_the_teachers_word_on_the_students_answer_is_that_of_the_teacher_itself(toys, is_online):
    model = load_salmonn(toys / "teacher")
    live = OnlineTeacher(model, hidden_layers=[1])
    teacher = live if is_online else CachedTeacher(toys / "data/cache")
    records = read_records(toys / "data/cache/round-1")
    m = Collator(teacher, model, torch.device("cpu"), torch.float32)(next(iter(open_stream(toys))))
    answered = [records[sample.key] for sample in m.batch.samples]
    assert [row.answer for row in m.batch.rows] == [record.answer_ids_S.tolist() for record in answered]
    own = live.targets(m.batch)
    close = {"rtol": 2e-3, "atol": 5e-3}
    torch.testing.assert_close(m.targets.distribution.logprobs_SK, own.distribution.logprobs_SK, **close)
    torch.testing.assert_close(m.targets.label_logprobs_S, own.label_logprobs_S, **close)
    torch.testing.assert_close(m.targets.queries_BWQE, own.queries_BWQE, **close)
    torch.testing.assert_close(m.targets.hidden, own.hidden, **close)
    torch.testing.assert_close(m.targets.hidden_by_layer[1], own.hidden_by_layer[1], **close)


def test_answers_to_another_audio_are_refused(toys):
    first, second = next(iter(open_stream(toys, batch_size=2)))
    mixed = dataclasses.replace(first, student_answer=second.student_answer)
    model = load_salmonn(toys / "teacher")
    collate = Collator(CachedTeacher(toys / "data/cache"), model, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"the student's answer belongs to .*: another audio or prompt; run"):
        collate([mixed])


# --- runs ------------------------------------------------------------------------------------------------------------


def test_which_clips_come_with_the_students_answer_is_drawn_anew_each_epoch_whatever_the_ranks(toys):
    cached = toys / "data" / "cache"
    selection = Selection(targets=cached, student_answers=cached / "round-1", student_share=0.5)

    def draw(batch_size=12, seed=0, workers=0, **ranks) -> list[tuple]:
        order, limits = Order(batch_size, seed=seed, epochs=24), Limits(workers=workers)
        batches = iter(ShardStream(toys / "data" / "train", order, selection, limits, decode=False, **ranks))
        return [(s.epoch, s.key, s.student_answer is not None) for batch in batches for s in batch]

    alone = draw()
    assert sorted(alone) == sorted(draw(rank=0, world_size=2, batch_size=6) + draw(rank=1, world_size=2, batch_size=6))
    assert sorted(alone) == sorted(draw(workers=1))
    assert sum(is_answered for *_, is_answered in alone) / len(alone) == pytest.approx(0.5, abs=0.1)
    epochs = [frozenset(key for e, key, is_answered in alone if is_answered and e == epoch) for epoch in range(24)]
    assert len(set(epochs)) > 20  # no draw is that of another epoch, or its opposite
    assert draw(seed=1) != alone


@pytest.fixture(scope="module")
def mixed(toys) -> list[dict]:
    """An uninterrupted run that sees half of its clips with the student's answer."""
    return train(toys, "mixed", *round_words(toys, 0.5, "loss.kl_kind=jsd", "loss.kl_parameter=0.5"))


def test_a_resumed_round_repeats_the_uninterrupted_one_bit_by_bit(toys, mixed):
    words = round_words(toys, 0.5, "loss.kl_kind=jsd", "loss.kl_parameter=0.5")
    assert train(toys, "resumed", *words, "train.stop_after=2") == mixed[:2]
    assert train(toys, "resumed", *words) == mixed
    with pytest.raises(ValueError, match=r"state has student_answers 0\.5 of \w{16}, but this stream has 0\.6 of"):
        train(toys, "resumed", *round_words(toys, 0.6, *words[3:], "train.steps=5"))


def test_two_ranks_repeat_the_losses_of_one(toys, mixed):
    words = round_words(toys, 0.5, "loss.kl_kind=jsd", "loss.kl_parameter=0.5", "train.micro_batch_size=1")
    tiny.run_two_ranks(run, configure(toys, "name=ranks", *words))
    for own, expected in zip(metrics(toys, "ranks"), mixed, strict=True):
        assert own == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_share_of_zero_trains_as_a_run_without_a_round(toys):
    words = [f"student.start={toys}/runs/r0/student", "train.steps=2"]
    assert train(toys, "zero", *round_words(toys, 0.0, *words)) == train(toys, "without", *words)


def test_on_the_students_answers_there_is_no_cross_entropy(toys):
    words = round_words(toys, 1.0, "loss.kl_kind=reverse_kl", "train.steps=2")
    with_ce, without = train(toys, "all", *words), train(toys, "no-ce", *words, "loss.ce=0")
    assert all(step["ce"] == 0 and step["kl"] > 0 and step["feature"] > 0 and step["positions"] > 0 for step in with_ce)
    assert [step["loss"] for step in with_ce] == [step["loss"] for step in without]
    weights = [load_file(toys / "runs" / name / "student" / WEIGHTS) for name in ("all", "no-ce")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def own_answers_kl(toys: Path, folder: Path) -> float:
    """The mean KL of the teacher to a student on the answers that this very student draws now, nats a token."""
    student, teacher = load_student(folder), load_salmonn(toys / "teacher")
    config = configure(toys, "name=r0", *DRAWN)
    ask = Answerer(student, Capturer(OnlineTeacher(teacher), config), config)
    with torch.no_grad():
        answered = ask.answer(next(iter(open_stream(toys, 0.0))))
        theirs, own = (model(model.collate(answered))[0].log_softmax(-1) for model in (teacher, student))
    return float((theirs.exp() * (theirs - own)).sum(-1).mean())


def test_a_round_brings_the_student_nearer_to_the_teacher_on_its_own_answers(toys):
    words = ("loss.ce=0", "loss.feature=0", "train.steps=20", "train.learning_rate=0.01", "train.save_every=100")
    train(toys, "r1", *round_words(toys, 1.0, *words))
    before, after = (own_answers_kl(toys, toys / "runs" / name / "student") for name in ("r0", "r1"))
    assert after < 0.85 * before


# --- other tokenizers ------------------------------------------------------------------------------------------------


def test_a_student_of_another_tokenizer_answers_in_its_own_tokens_and_is_scored_in_the_teachers(toys, tmp_path):
    tokenizer = train_tokenizer([*tiny.WORDS, "other words"], tmp_path / "llm", vocab_size=300)
    build_llm(len(tokenizer), 32, 1, tokenizer).save_pretrained(tmp_path / "llm")
    words = [f"student.llm={tmp_path}/llm", "loss.cross_tokenizer=chunk", "train.steps=2"]
    train(toys, "cross", *words)
    job = configure(toys, "name=cross", *DRAWN, *words, "on_policy.round=7")
    answers(job)
    records = read_records(job.answers_folder)
    rows = load_salmonn(toys / "teacher").rows
    assert all(record.answer_ids_S.tolist() == rows.answer_ids(record.answer) for record in records.values())
    start = f"student.start={toys}/runs/cross/student"
    steps = train(toys, "cross-1", *words, start, "on_policy.round=7", "on_policy.share=1")
    assert all(step["ce"] == 0 and step["chunk"] > 0 and step["feature"] > 0 for step in steps)
    with pytest.raises(ValueError, match=r"vocabulary of the student .* is not that of the teacher"):
        answers(configure(toys, "name=cross", *DRAWN, *words[:1], "on_policy.round=8"))


# --- a student that goes on ------------------------------------------------------------------------------------------


LORA = lora_of(Config(student=StudentConfig(lora_rank=4)))  # as r0's


def make_student(toys: Path, lora: Lora = LORA, **hearing):
    model = load_salmonn(toys / "teacher")
    return build_student(model, str(toys / "parts/student-llm"), lora=lora, quantization="none", seed=5,
                         hearing=Hearing(**hearing))  # fmt: skip


def test_a_started_student_is_the_saved_one(toys):
    student = make_student(toys)
    load_start_weights_(student, toys / "runs/r0/student", lora=LORA, quantization="none")
    saved = load_file(toys / "runs/r0/student" / WEIGHTS)
    own = own_tensors(student)
    assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)


@pytest.mark.parametrize(
    ("changes", "quantization", "hearing", "message"),
    [
        ({"rank": 8}, "none", {}, r"whose lora rank is 4, but this run's is 8"),
        ({"alpha": 16.0}, "none", {}, r"whose lora alpha is 32\.0, but this run's is 16\.0"),
        ({}, "nf4", {}, r"whose quantization is 'none', but this run's is 'nf4'"),
        ({}, "none", {"windows": "all"}, r"whose windows is 'audio', but this run's is 'all'"),
    ],
)
def test_a_student_of_another_shape_is_no_start(toys, changes, quantization, hearing, message):
    lora = dataclasses.replace(LORA, **changes)
    with pytest.raises(ValueError, match=message):
        load_start_weights_(
            make_student(toys, lora, **hearing), toys / "runs/r0/student", lora=lora, quantization=quantization
        )


# --- what does not belong together -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_student(toys) -> Path:
    """A run whose student differs from r0's in one number."""
    folder = toys / "runs" / "other"
    shutil.copytree(toys / "runs/r0/student", folder / "student")
    tensors = load_file(folder / "student" / WEIGHTS)
    tensors["project.bias"][0] += 1e-3
    save_file(tensors, folder / "student" / WEIGHTS)
    assert identify_student(folder / "student") != identify_student(toys / "runs/r0/student")
    return folder / "student"


def test_answers_of_another_student_are_refused(toys, other_student):
    words = round_words(toys, 0.5, f"student.start={other_student}")
    with pytest.raises(ValueError, match=r"round-1 holds answers of a student with own \w{16}, but student\.start .*"):
        check_answers(configure(toys, *words), read_header(toys / "data/cache"))
    with pytest.raises(ValueError, match=r"round-1 holds answers with student own \w{16}, but this job's have student"):
        answers(configure(toys, "name=other", *DRAWN))


def test_a_student_that_was_trained_with_other_prompts_is_not_scored(toys):
    folder = toys / "runs" / "asked-otherwise" / "student"
    shutil.copytree(toys / "runs/r0/student", folder)
    content = json.loads((folder / "config.json").read_text())
    content["model"]["template"] = "{}"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"prompts of the student .*asked-otherwise/student are not those of the"):
        answers(configure(toys, "name=asked-otherwise", *DRAWN, "on_policy.round=6"))
    assert not (toys / "data/cache/round-6").exists()


def test_answers_made_in_another_way_are_not_written_beside_these(toys):
    with pytest.raises(ValueError, match=r"holds answers with temperature 1\.0, but this job's have temperature 0\.5"):
        answers(configure(toys, "name=r0", *DRAWN, "on_policy.temperature=0.5"))


def test_answers_that_another_teacher_scored_are_refused(toys):
    own = read_header(toys / "data/cache").identity
    other = CacheHeader({**own, "teacher_weights": {**own["teacher_weights"], "own": "of another"}})
    message = r"(?s)round-1/cache\.json was cached as .*teacher_weights\.own: cached .*, this run \"of another\""
    with pytest.raises(ValueError, match=message):
        check_answers(configure(toys, *round_words(toys, 0.5)), other)


def test_a_round_that_is_not_whole_is_refused(toys, tmp_path):
    shutil.copytree(toys / "data/cache", tmp_path / "cache")
    words = [f"cache.folder={tmp_path}/cache", *round_words(toys, 0.5)]
    with pytest.raises(FileNotFoundError, match=r"on_policy\.round is 4, but .*round-4 holds no answers; run"):
        run(configure(toys, "name=stale", *words, "on_policy.round=4"))
    config, header = configure(toys, *words), read_header(tmp_path / "cache")
    assert check_answers(config, header) == config.answers_folder
    done = config.answers_folder / "train-000001.targets.json"
    lacks = r"lacks the answers to 1 of 3 shards \(.*train-000001\.tar\), but"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"audio": "of another shard"}))
    with pytest.raises(ValueError, match=lacks):
        check_answers(config, header)
    done.unlink()
    with pytest.raises(ValueError, match=lacks):
        check_answers(config, header)


def test_a_job_without_round_or_student_is_refused(toys):
    with pytest.raises(FileNotFoundError, match=r"runs/nobody/student, but there is no saved student; finish"):
        answers(configure(toys, "name=nobody", *DRAWN))
    with pytest.raises(ValueError, match=r"on_policy\.round is 0, but answers belong to a round"):
        answers(configure(toys, "name=r0"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["on_policy.share=0.5", "on_policy.round=1"], r"on_policy\.share is 0\.5, but student\.start is ''"),
        (["on_policy.share=0.5", "student.start=there"], r"on_policy\.share is 0\.5, but on_policy\.round is 0"),
        (["on_policy.share=1.5"], r"on_policy\.share is 1\.5, but is a share from 0 to 1"),
        (["on_policy.clips=0"], r"on_policy\.clips is 0\.0, but must be above 0"),
        (["on_policy.temperature=-1"], r"on_policy\.temperature is -1\.0, but must be 0 or more"),
        (
            ["on_policy.share=1", "on_policy.round=1", "student.start=there", "loss.kl=0"],
            r"loss\.kl is 0 and a student",
        ),
    ],
)
def test_a_config_of_a_round_that_cannot_be_is_refused(toys, words, message):
    with pytest.raises(ValueError, match=message):
        configure(toys, *words)


def test_every_config_field_that_the_page_on_rounds_names_exists():
    page = (Path(__file__).parents[2] / "docs" / "rounds.md").read_text()
    fields = set(re.findall(r"((?:on_policy|student|loss|cache|teacher)\.\w+)[=`]", page))
    assert {f"on_policy.{field.name}" for field in dataclasses.fields(OnPolicyConfig)} <= fields
    for key in fields:
        value_at(Config(), key)
