"""A student with its own tokenizer learns from the cache of a teacher with another."""

import copy
import dataclasses

import pytest
import tiny
import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM

from distill.cache import cache
from distill.config import LossConfig, TrainConfig, load_config
from distill.demo.scratch import build_llm
from distill.demo.tokenizer import train_byte_tokenizer, train_tokenizer
from distill.distiller import Distiller
from distill.objective.crossteacher import CrossTeacher, match_vocab
from distill.objective.weighing import count
from distill.run import run
from distill.training.microbatch import Collator
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from students.hearing import Connector
from students.student import build_student, load_student
from teachers.cached import CachedTeacher
from teachers.files.loading import load_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher
from teachers.salmonn import SalmonnConfig
from teachers.words.prompts import load_prompts

OPTIONS = TrainConfig(steps=3, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=1, save_every=100)
CROSS = LossConfig(cross_tokenizer="chunk", feature=0.5)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A Llama-style teacher with its cache, and a Qwen-style LLM with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, data__labelled_share=0.5, cache__max_new_tokens=4)
    cache(load_config(folder / "toy.yaml"))
    prompts = load_prompts(None, SalmonnConfig("", "").template)
    texts = [*tiny.WORDS, "one two three", *(prompt for task in tiny.TASKS for prompt in prompts.by_task[task])]
    tokenizer = train_byte_tokenizer(texts, folder / "qwen", vocab_size=330)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True,
                    eos_token_id=tokenizer.eos_token_id)
    ).save_pretrained(folder / "qwen")  # fmt: skip
    return folder


def make_student(toys, llm: str = "qwen"):
    return build_student(load_salmonn(toys / "teacher"), str(toys / llm), lora=Lora(rank=4), connector=Connector("new"))


def open_stream(toys) -> ShardStream:
    return ShardStream(
        toys / "data" / "train", Order(batch_size=4), Selection(targets=toys / "data" / "cache", labelled_share=0.5)
    )


def make_run(toys, run_folder, teacher=None, loss=CROSS, **changes) -> Distiller:
    student = make_student(toys)
    cached = CachedTeacher(toys / "data" / "cache")
    stream = open_stream(toys)
    return Distiller(teacher or cached, student, train=stream, loss=loss,
                     options=dataclasses.replace(OPTIONS, **changes), run=run_folder)  # fmt: skip


def test_a_qwen_student_trains_and_answers_from_the_cache_of_a_llama_teacher(toys):
    words = [f"student.llm={toys / 'qwen'}", "loss.cross_tokenizer=chunk", "name=qwen"]
    config = load_config(toys / "toy.yaml", words)
    assert run(config) == 0
    student = load_student(config.run_folder / "student")
    assert len(student.generate([tiny.make_sample(1)], max_new_tokens=3)) == 1


def test_every_term_of_another_tokenizer_is_counted(toys, tmp_path):
    run_ = make_run(toys, tmp_path)
    samples = next(iter(run_.stream))
    m = Collator(run_.teacher, run_.student, torch.device("cpu"), torch.float32)(samples)
    alignment = m.targets.cross.alignment
    found = count(run_.terms, m)
    assert found["chunk"] == alignment.num_chunks > len(samples)
    assert 0 < found["kl"] == int(m.targets.cross.is_matched_S.sum()) < found["ce"]
    assert run_.teacher.num_unaligned == 0


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_losses_across_tokenizers_do_not_depend_on_micro_batches(toys, tmp_path, micro_batch_size):
    whole = make_run(toys, tmp_path / "whole").fit().losses
    split = make_run(toys, tmp_path / "split", micro_batch_size=micro_batch_size).fit().losses
    assert split == pytest.approx(whole, abs=1e-5)


def test_cached_and_online_targets_cross_alike(toys):
    student = make_student(toys)
    samples = next(iter(open_stream(toys)))
    cached, _ = match_vocab(CachedTeacher(toys / "data" / "cache"), student, "chunk", 2.0)
    online, _ = match_vocab(
        OnlineTeacher(load_salmonn(toys / "teacher"), k=16, temperatures=(2.0,)), student, "chunk", 2.0
    )
    samples, _ = cached.label(samples)
    batch = student.collate(samples)
    ours, theirs = cached.targets(batch).cross, online.targets(batch).cross
    torch.testing.assert_close(ours.teacher_logprobs_S, theirs.teacher_logprobs_S, atol=1e-4, rtol=0)
    assert torch.equal(ours.is_matched_S, theirs.is_matched_S)
    torch.testing.assert_close(ours.sparse.log_residual_S, theirs.sparse.log_residual_S, atol=0.05, rtol=0)


def test_other_ids_are_refused_unless_chunks_are_asked_for(toys, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary of the student .* is not that of the teacher"):
        make_run(toys, tmp_path, loss=LossConfig())


def test_equal_ids_are_compared_as_they_are_even_when_chunks_are_allowed(toys):
    student = make_student(toys, "parts/student-llm")
    teacher, size = match_vocab(CachedTeacher(toys / "data" / "cache"), student, "chunk", 1.0)
    assert isinstance(teacher, CachedTeacher) and size == len(student.tokenizer)


# One table of tokens, cut in other ways, as files of one LLM differ between releases of transformers (`legacy` and
# `add_prefix_space` of Llama's are prepend_scheme always, first and never), and a text that each cuts otherwise.
OTHER_CUTS = {
    "legacy": ("one two", {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always", split=False)}),
    "add_prefix_space": ("one two", {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first", split=False)}),
    "letters apart": ("one two", {"pre_tokenizer": pre_tokenizers.Sequence([
        pre_tokenizers.Split("n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never", split=False)])}),
    "lower case": ("One two", {"normalizer": normalizers.Lowercase()}),
    "spaces lost": ("one two ", {"normalizer": normalizers.Strip()}),
}  # fmt: skip


def recut(tokenizer, **parts):
    """The tokenizer with other parts of its pipeline, and the same table."""
    recut = copy.deepcopy(tokenizer)
    for name, part in parts.items():
        setattr(recut.backend_tokenizer, name, part)
    return recut


@pytest.mark.filterwarnings("ignore:.*learned by cross-entropy alone")  # a normalizer changes the text
@pytest.mark.parametrize("cut", OTHER_CUTS)
def test_the_same_tokens_cut_in_another_way_are_refused_by_sample_or_aligned(toys, cut):
    text, parts = OTHER_CUTS[cut]
    student, teacher = make_student(toys, "parts/student-llm"), OnlineTeacher(load_salmonn(toys / "teacher"), k=8)
    student.tokenizer = student.rows.tokenizer = recut(student.tokenizer, **parts)
    batch = student.collate([tiny.make_sample(2, text=text)])
    met, _ = match_vocab(teacher, student, "refuse", 1.0)
    with pytest.raises(ValueError, match=rf"answer of sample k002 is {text!r}, which the student reads as \[.* but the "
                                         r"teacher as \[.*set loss\.cross_tokenizer=chunk"):  # fmt: skip
        met.targets(batch)
    crossed, _ = match_vocab(teacher, student, "chunk", 1.0)
    assert len(crossed.targets(batch).cross.is_matched_S) == batch.num_supervised


def test_a_cache_of_the_same_tokens_cut_in_another_way_names_the_tokenizer_and_crosses(toys):
    student, teacher = make_student(toys, "parts/student-llm"), CachedTeacher(toys / "data" / "cache")
    student.tokenizer = student.rows.tokenizer = recut(student.tokenizer, **OTHER_CUTS["legacy"][1])
    labelled = ([sample for sample in batch if sample.text is not None] for batch in open_stream(toys))
    samples = next(filter(None, labelled))  # which keys are labelled depends on the folder's name
    batch = student.collate(samples)
    with pytest.raises(ValueError, match=rf"answer of sample {samples[0].key} is .*set loss\.cross_tokenizer=chunk"):
        match_vocab(teacher, student, "refuse", 1.0)[0].targets(batch)
    assert len(match_vocab(teacher, student, "chunk", 1.0)[0].targets(batch).cross.is_matched_S) == batch.num_supervised


def test_an_answer_that_only_ends_in_another_way_is_refused_and_its_ends_are_named(toys):
    model, student = load_salmonn(toys / "teacher"), make_student(toys, "parts/student-llm")
    student.rows.end_ids = [student.tokenizer.convert_tokens_to_ids("<unk>")]
    met, _ = match_vocab(OnlineTeacher(model, k=8), student, "refuse", 1.0)
    with pytest.raises(ValueError, match=r"\[0\] <unk> of \d+ ids, but the teacher as \[2\] </s> of \d+ ids"):
        met.targets(student.collate([tiny.make_sample(1)]))
    assert isinstance(match_vocab(OnlineTeacher(model), student, "chunk", 1.0)[0], CrossTeacher)


def test_other_prompts_of_the_student_are_no_other_answer(toys):
    model, student = load_salmonn(toys / "teacher"), make_student(toys, "parts/student-llm")
    student.rows.prompts = load_prompts(None, "ASK {} ANSWER ")
    met, _ = match_vocab(OnlineTeacher(model, k=8), student, "refuse", 1.0)
    batch = student.collate([tiny.make_sample(1)])
    assert len(met.targets(batch).label_logprobs_S) == batch.num_supervised


def test_a_token_that_only_the_student_added_behind_the_others_takes_no_part(toys, tmp_path):
    student = make_student(toys, "parts/student-llm")
    shared = len(student.tokenizer)
    student.tokenizer.add_tokens(["<sound>"])
    teacher, size = match_vocab(CachedTeacher(toys / "data" / "cache"), student, "refuse", 1.0)
    assert isinstance(teacher, CachedTeacher) and size == shared


def test_ids_that_mean_other_tokens_in_a_vocabulary_of_the_same_size_are_refused(toys, tmp_path):
    texts = [*tiny.WORDS, *"abcdefghijklmnopqrstuvwxyz", "quite other words than those of the teacher"]
    tokenizer = train_tokenizer(texts, tmp_path / "llm", vocab_size=420)
    build_llm(len(tokenizer), 32, 1, tokenizer).save_pretrained(tmp_path / "llm")
    student = build_student(
        load_salmonn(toys / "teacher"), str(tmp_path / "llm"), lora=Lora(rank=4), connector=Connector("new")
    )
    with pytest.raises(ValueError, match=r"set loss\.cross_tokenizer=chunk"):
        match_vocab(CachedTeacher(toys / "data" / "cache"), student, "refuse", 1.0)
    assert isinstance(match_vocab(CachedTeacher(toys / "data" / "cache"), student, "chunk", 1.0)[0], CrossTeacher)


def test_an_answer_that_one_side_cannot_spell_is_learned_by_cross_entropy_alone(toys):
    student = make_student(toys)
    teacher, _ = match_vocab(OnlineTeacher(load_salmonn(toys / "teacher"), k=8), student, "chunk", 1.0)
    teacher.translator.student_pieces[student.tokenizer.encode("one")[0]] = b"another"
    with pytest.warns(UserWarning, match="learned by cross-entropy alone"):
        targets = teacher.targets(
            student.collate([tiny.make_sample(1, text="one two"), tiny.make_sample(2, text="two")])
        )
    assert teacher.num_unaligned == 1 and targets.cross.alignment.num_chunks > 0
