"""Answers of the student within a step: a round's loss and gradient, drawn from seed, step and key, told, refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from distill.cache import cache
from distill.caching.capture import Capturer
from distill.caching.scoring import ScoredCache
from distill.config import LossConfig, OnPolicyConfig, load_config
from distill.demo.scratch import build_llm
from distill.demo.tokenizer import train_tokenizer
from distill.distiller import Distiller, Run
from distill.objective.weighing import count, weigh
from distill.run import run
from distill.training.microbatch import Collator
from distill.training.onpolicy import OwnAnswers, StepAnswers, answer_within
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from students.student import build_student
from teachers.cached import CachedTeacher
from teachers.files.loading import load_salmonn, own_tensors
from teachers.lora import Lora
from teachers.online import OnlineTeacher
from teachers.teacher import NoTeacher

pytestmark = pytest.mark.usefixtures("on_the_cpu")

DRAWN = OnPolicyConfig(step_share=1.0, temperature=1.0, max_new_tokens=6)
WORDS = ("teacher.online=true", "on_policy.step_share=0.5", "on_policy.temperature=1", "on_policy.max_new_tokens=6",
         "loss.kl_kind=jsd", "loss.kl_parameter=0.5")  # fmt: skip
ALL = (*WORDS, "on_policy.step_share=1", "train.steps=2")
TIMED = ("seconds", "tokens_per_second", "audio_hours_per_hour", "waiting", "answering")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Parts, a teacher, shards and their cache, and a config without 4 bits."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, precision="float32", student__quantization="none", cache__codec="dense",
                   cache__features="float16", cache__frames="float16")  # fmt: skip
    cache(load_config(folder / "toy.yaml"))
    return folder


@pytest.fixture
def model(toys):
    return load_salmonn(toys / "teacher")


@pytest.fixture
def student(toys, model):
    return build_student(model, str(toys / "parts" / "student-llm"), lora=Lora(rank=4, dropout=0.5),
                         quantization="none").train()  # fmt: skip


def within(student, how: OnPolicyConfig = DRAWN, seed: int = 0, score=list) -> StepAnswers:
    return StepAnswers(OwnAnswers(student, student.rows.end_ids, student.num_tokens, how), seed, score)


def train(toys: Path, name: str, *words: str) -> list[dict]:
    """A run in this process; the metrics of its steps, without times."""
    run(load_config(toys / "toy.yaml", [f"name={name}", *words]))
    return metrics(toys, name)


def metrics(toys: Path, name: str) -> list[dict]:
    lines = (toys / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


# --- as a round ------------------------------------------------------------------------------------------------------


def gradients(toys, folder, teacher, student, loss: LossConfig, answers: StepAnswers | None, samples):
    """Loss, gradients and rows of one step in training mode, its dropout seeded."""
    run = Distiller(teacher, student, train=toys / "data" / "train", loss=loss, run=folder)
    m = Collator(teacher, student, torch.device("cpu"), torch.float32, step_answers=answers)(samples, 3)
    torch.manual_seed(1)
    weights = {name: run.schedules[name].weight(0) for name in run.terms}
    loss, _ = run.objective(m, weigh(run.terms, m, run.loss, weights, count(run.terms, m)))
    return loss, torch.autograd.grad(loss, list(run.named.values()), allow_unused=True), m.batch.rows


@pytest.mark.parametrize("loss", [LossConfig(kl_kind="jsd", kl_parameter=0.5), LossConfig(kl_kind="reverse_kl")])
def test_loss_and_gradient_are_those_of_a_round_on_the_same_answers(toys, tmp_path, model, student, loss):
    cached = toys / "data" / "cache"
    samples = next(iter(ShardStream(toys / "data" / "train", Order(4, shuffle=False), Selection(targets=cached))))
    online, answers = OnlineTeacher(model), within(student)
    said = answers(samples, range(4), 3, None)
    beside = ScoredCache(cached, None, Capturer(online, load_config(toys / "toy.yaml")))
    records = {sample.key: sample.student_answer for sample in beside.score(said)}  # as a round's job stores them
    of_a_round = [replace(sample, student_answer=records[sample.key]) for sample in samples]
    own = gradients(toys, tmp_path / "own", online, student, loss, answers, samples)
    again = gradients(toys, tmp_path / "again", online, student, loss, None, of_a_round)
    read = gradients(toys, tmp_path / "read", CachedTeacher(cached), student, loss, None, of_a_round)
    scored = gradients(toys, tmp_path / "scored", beside, student, loss, within(student, score=beside.score), samples)
    assert len({tuple(row.answer) for row in own[2]}) == 4
    assert sum(g is not None and bool(g.any()) for g in own[1]) > 8
    for within_step, of_round in ((own, again), (scored, read)):
        assert [row.answer for row in within_step[2]] == [row.answer for row in of_round[2]]
        assert torch.equal(within_step[0], of_round[0])
        pairs = zip(within_step[1], of_round[1], strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    here, there = (torch.cat([g.flatten() for g in found[1] if g is not None]) for found in (own, read))
    assert (here - there).norm() < 5e-3 * here.norm()  # of targets that were stored in 16 bits


def test_on_its_own_answers_there_is_no_cross_entropy(toys):
    with_ce, without = train(toys, "all", *ALL), train(toys, "no-ce", *ALL, "loss.ce=0")
    assert all(step["ce"] == 0 and step["kl"] > 0 and step["feature"] > 0 for step in with_ce)
    assert [step["loss"] for step in with_ce] == [step["loss"] for step in without]


# --- the answers -----------------------------------------------------------------------------------------------------


def test_seed_step_and_key_alone_decide_which_clips_are_answered(student):
    samples = [tiny.make_sample(number) for number in range(200)]

    def choose(samples, step=0, seed=0, share=0.5) -> list[str]:
        answers = within(student, replace(DRAWN, step_share=share), seed)
        return [samples[place].key for place in answers.choose(samples, step)]

    whole = choose(samples)
    assert whole == choose(samples[:70]) + choose(samples[70:]) and 70 < len(whole) < 130
    assert len({tuple(choose(samples, step, seed)) for step in range(3) for seed in range(3)}) == 9
    assert set(whole) < set(choose(samples, share=0.9))
    assert choose(samples, share=1.0) == [sample.key for sample in samples]


def test_a_clip_is_answered_as_alone_from_the_frames_of_a_batch_without_dropout_and_without_a_trace(student):
    samples = [tiny.make_sample(number, text=None, seconds=0.5 + 0.3 * number) for number in range(4)]
    batch = student.collate(samples, with_answer=False)
    frames = student.frames(batch.waveforms_BN, batch.num_samples_B)
    before, state = {name: x.clone() for name, x in own_tensors(student).items()}, torch.get_rng_state()
    answers = within(student)
    together = answers(samples, [0, 2, 3], 5, frames)
    alone = [answers([sample], [0], 5, None)[0] for sample in samples]
    assert [s.answer_ids for s in together] == [alone[0].answer_ids, None, alone[2].answer_ids, alone[3].answer_ids]
    assert [s.is_said_now for s in together] == [True, False, True, True] and together[1] is samples[1]
    assert [s.answer_ids for s in answers(samples, range(4), 6, frames)] != [s.answer_ids for s in alone]
    assert student.training and student.llm.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in own_tensors(student).items())


def test_a_greedy_answer_is_what_the_student_says_in_evaluation(student):
    sample = tiny.make_sample()
    said = within(student, OnPolicyConfig(step_share=1.0, max_new_tokens=5))([sample], [0], 0, None)[0]
    student.eval()
    ids = student.generate_ids(student.collate([sample], with_answer=False), max_new_tokens=5)[0]
    assert said.answer_ids == (*(ids[:-1] if ids[-1] in student.end_ids else ids), *student.rows.end_ids)


def test_the_ears_run_once_a_step_and_the_teacher_answers_only_what_the_student_does_not(toys, model, student):
    num_heard, asked = [], []
    model.whisper.register_forward_hook(lambda ear, clips, out: num_heard.append(len(clips[0])))

    class Heard(OnlineTeacher):
        def answer(self, samples):
            asked.append([sample.key for sample in samples])
            return super().answer(samples)

    samples = [tiny.make_sample(number, text=None) for number in range(8)]
    answers = within(student, replace(DRAWN, step_share=0.5))
    m = Collator(Heard(model, max_new_tokens=4), student, torch.device("cpu"), torch.float32, step_answers=answers)(
        samples
    )
    said = [sample.is_said_now for sample in m.batch.samples]
    assert 0 < sum(said) < 8 and m.is_pseudo == [not own for own in said]
    assert asked == [[s.key for s, own in zip(samples, said) if not own]]
    assert num_heard == [8, len(asked[0])]  # once for all, and by the teacher for answers of its own


def test_beside_a_cache_the_student_answers_from_its_frames_and_the_teacher_hears_only_those_clips(
    toys, model, student
):
    cached, num_heard = toys / "data" / "cache", []
    samples = next(iter(ShardStream(toys / "data" / "train", Order(8, shuffle=False), Selection(targets=cached))))
    beside = ScoredCache(cached, None, Capturer(OnlineTeacher(model), load_config(toys / "toy.yaml")))
    answers = within(student, replace(DRAWN, step_share=0.5), score=beside.score)
    model.whisper.register_forward_hook(lambda ear, clips, out: num_heard.append(len(clips[0])))
    m = Collator(beside, student, torch.device("cpu"), torch.float32, step_answers=answers)(samples)
    said = sum(sample.is_said_now for sample in m.batch.samples)
    assert 0 < said < 8 and num_heard == [said] and len(m.frames[0]) == 8
    labels = [row.answer for sample, row in zip(m.batch.samples, m.batch.rows) if not sample.is_said_now]
    assert labels == [student.rows.answer_ids(s.text) for s, o in zip(samples, m.batch.samples) if not o.is_said_now]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["true", "false"], ids=["online", "beside its cache"])
def whole(request, toys) -> tuple[list[str], list[dict]]:
    """Words and metrics of an uninterrupted run whose student answers half of each step's clips."""
    words = [*WORDS, f"teacher.online={request.param}"]
    return words, train(toys, f"whole {request.param}", *words)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(toys, whole):
    (words, expected), name = whole, f"resumed {whole[0][-1]}"
    assert train(toys, name, *words, "train.stop_after=2") == expected[:2]
    assert train(toys, name, *words) == expected
    assert 0 < sum(step["own_answers"] for step in expected) < 16
    with pytest.raises(ValueError, match=r"other settings \(on_policy\.step_share: 0\.5 there, 0\.6 here\)"):
        train(toys, name, *words, "on_policy.step_share=0.6")


def test_two_ranks_answer_the_clips_that_one_does_and_repeat_its_losses(toys, whole):
    (words, steps), name = whole, f"ranks {whole[0][-1]}"
    config = load_config(toys / "toy.yaml", [f"name={name}", *words, "train.micro_batch_size=1"])
    tiny.run_two_ranks(run, config)
    for own, expected in zip(metrics(toys, name), steps, strict=True):
        assert own == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_what_the_answers_cost_is_logged_and_said_in_the_end(toys, capsys):
    train(toys, "told", *ALL)
    records = [json.loads(line) for line in (toys / "runs/told/metrics.jsonl").read_text().splitlines()]
    assert all(step["own_answers"] == 4 and 0 < step["answering"] < 1 for step in records)
    assert "the student's 8 own answers took" in capsys.readouterr().err


def test_without_a_share_nothing_is_logged_and_nothing_is_held_against_an_older_checkpoint(toys, tmp_path, student):
    run = Distiller(toys / "teacher", student, train=toys / "data" / "train", run=tmp_path)
    assert run.step_answers is None and "on_policy" not in run.identity
    assert "own_answers" not in train(toys, "off", "teacher.online=true", "train.steps=1")[0]


@pytest.mark.parametrize("online", ["true", "false"])
def test_a_student_of_another_tokenizer_learns_from_the_text_that_it_says(toys, tmp_path, online):
    tokenizer = train_tokenizer([*tiny.WORDS, "other words"], tmp_path / "llm", vocab_size=300)
    build_llm(len(tokenizer), 32, 1, tokenizer).save_pretrained(tmp_path / "llm")
    words = [*ALL, f"teacher.online={online}", f"student.llm={tmp_path}/llm"]
    steps = train(toys, f"cross {online}", *words, "loss.cross_tokenizer=chunk")
    assert all(step["own_answers"] == 4 and step["ce"] == 0 and step["chunk"] > 0 for step in steps)
    with pytest.raises(ValueError, match=r"vocabulary of the student .* is not that of the teacher"):
        train(toys, f"refused {online}", *words)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["loss.kl=0", "loss.kl_kind=forward_kl", "loss.kl_parameter=null"],
            r"step_share is 0\.5, but loss\.kl is 0 and",
        ),
        (["on_policy.step_share=1.5"], r"on_policy\.step_share is 1\.5, but is a share from 0 to 1"),
        (["on_policy.step_share=0"], r"on_policy\.temperature is 1, but nothing reads it without on_policy\.round or"),
        (["on_policy.clips=0.5"], r"on_policy\.clips is 0\.5, but nothing reads it without on_policy\.round above 0"),
    ],
)
def test_a_config_with_answers_that_nobody_scores_or_learns_from_is_refused(toys, words, message):
    with pytest.raises(ValueError, match=message):
        load_config(toys / "toy.yaml", [*WORDS, *words])


def test_a_run_without_a_teacher_that_runs_is_refused(toys, tmp_path, student):
    def begin(teacher, loss=None):
        Distiller(teacher, student, train=toys / "data" / "train", loss=loss, run=Run(tmp_path, on_policy=DRAWN))

    with pytest.raises(ValueError, match=r"step_share is 1, but the teacher is None and cannot score what the student"):
        begin(None)
    with pytest.raises(ValueError, match=r"the teacher is a cache, .*/cache, and cannot score what .*; give one that"):
        begin(toys / "data" / "cache")
    with pytest.raises(ValueError, match=r"on_policy\.step_share is 1\.0, but loss\.kl is 0 and a student's answer"):
        begin(toys / "teacher", LossConfig(kl=0))


def test_a_student_of_which_a_rank_holds_a_part_is_refused(model, student):
    settings = {"num_shared": 1, "seed": 0}
    with pytest.raises(ValueError, match=r"step_share is 1, but this launch leaves no rank a whole"):
        answer_within(DRAWN, LossConfig(), OnlineTeacher(model), student, is_sharded=True, **settings)
    assert answer_within(OnPolicyConfig(), LossConfig(), NoTeacher(), student, is_sharded=True, **settings) is None
