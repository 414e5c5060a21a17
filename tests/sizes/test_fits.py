"""Memory planned before there is a machine: what is counted on the meta device is what a real step holds."""

import dataclasses
import json

import pytest
import tiny
import torch

from distill.cli import main
from distill.config import Config, TeacherConfig, load_config
from distill.sizes.costs import Usage, describe_student, describe_teacher, measure_sizes
from distill.sizes.fits import (
    Cards,
    Need,
    advise,
    build_for_training,
    longest,
    measure_connector,
    measure_llm,
    need_of_training,
    next_change,
    plan_memory,
    refuse,
    row_length,
)
from distill.sizes.memory import PeakMemory
from distill.student import make_student
from distill.teacher import load_teacher
from shards.sample import SAMPLE_RATE
from students.upcycle import upcycle
from teachers.ears.whisper import WhisperEar

SECONDS, SIZE = 2.0, 6


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    upcycle(str(folder / "parts/student-llm"), folder / "mixture", experts=4, top_k=2)
    return folder


def test_what_is_freed_is_not_counted_and_what_is_held_is():
    with PeakMemory() as memory:
        for _ in range(3):
            held = torch.zeros(1000)  # the one before is freed when this one is there
        view = held[:10].view(2, 5)
    assert (memory.held, memory.peak) == (4000, 8000)
    assert view.sum() == 0


@pytest.mark.parametrize("words", [
    ["student.quantization=nf4"],
    ["student.quantization=none"],
    ["student.quantization=nf4", "student.llm={}/mixture", "student.lora_targets=[q_proj,experts]"],
])  # fmt: skip
def test_activations_counted_on_the_meta_device_are_those_of_a_real_forward(toys, words):
    config = load_config(toys / "toy.yaml", ["precision=float32", *(word.format(toys) for word in words)])
    student = make_student(config, load_teacher(config), torch.float32, print).train()
    samples = [tiny.make_sample(n, text="two three", seconds=SECONDS) for n in range(SIZE)]
    batch = student.collate(samples)
    frames = student.frames(batch.waveforms_BN, batch.num_samples_B)
    with PeakMemory([*student.parameters(), *student.buffers(), *frames]) as memory:
        states = student.answer_states(batch, student.hear(batch, frames))
    teacher, given = describe_teacher(config)
    model = build_for_training(describe_student(config, teacher), given)
    tokens = batch.input_ids_BT.shape[1] - model.num_audio_tokens(round(SECONDS * SAMPLE_RATE))
    usage = Usage(SECONDS, tokens - 2, 2)
    assert row_length(model, usage) == batch.input_ids_BT.shape[1]
    counted = measure_connector(model, SIZE, usage).forward + measure_llm(model, SIZE, usage).forward
    assert counted == pytest.approx(memory.held, rel=0.1)
    assert states.requires_grad


def test_recomputed_blocks_hold_less_and_more_ranks_hold_less_each(toys):
    config = load_config(toys / "toy.yaml")
    teacher, given = describe_teacher(config)
    student = describe_student(config, teacher)

    def train(cards: Cards, **changes) -> Need:
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
        return need_of_training(changed, cards, Usage(SECONDS, 20, 10), student, given)

    one, two = train(Cards(1)), train(Cards(2))
    assert two.parts["AdamW's moments"] == one.parts["AdamW's moments"] / 2
    assert "ZeRO's buffer of gradients" not in train(Cards(2, zero_stage=0)).parts
    whole, part = (train(Cards(number, zero_stage=0, splits_frozen=True)).parts for number in (1, 2))
    gathered = part.pop("two blocks of it, gathered")  # all that such a LLM of one block has, twice
    assert whole == train(Cards(1, zero_stage=0)).parts
    assert part["LLM"] == whole["LLM"] - gathered / 4 and part.keys() == whole.keys()
    small = train(Cards(1), gradient_checkpointing=True)
    assert small.parts["activations of the LLM"] < one.parts["activations of the LLM"] / 2
    average = train(Cards(1), ema=0.9).parts["the average of what is trained"]
    assert average == one.parts["what is trained"] and "the average of what is trained" not in one.parts
    assert train(Cards(1), optimizer="adamw_8bit").parts["AdamW's moments"] == one.parts["AdamW's moments"] / 4


@pytest.mark.parametrize("word", ["student.train_ears=true", "student.ears_lora_rank=2"])
def test_ears_that_are_trained_are_counted_as_a_real_step_holds_them(toys, word):
    words = ["precision=float32", "student.quantization=none", f"train.micro_batch_size={SIZE}", word]
    config = load_config(toys / "toy.yaml", [*words, "train.batch_size=6"])
    student = make_student(config, load_teacher(config), torch.float32, print).train()
    batch = student.collate([tiny.make_sample(n, seconds=SECONDS) for n in range(SIZE)])
    mel_BMX = student.whisper.mel(batch.waveforms_BN, batch.num_samples_B, None)
    with PeakMemory([*student.parameters(), *student.buffers(), mel_BMX]) as memory:
        frames_BRE = student.whisper.encode(mel_BMX)
    teacher, given = describe_teacher(config)
    recomputed = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_checkpointing=True))
    need, less = (
        need_of_training(one, Cards(1, zero_stage=0), Usage(SECONDS), describe_student(config, teacher), given)
        for one in (config, recomputed)
    )
    assert need.parts["activations of the ears"] == pytest.approx(memory.held, rel=0.1) and frames_BRE.requires_grad
    assert less.parts["activations of the ears"] < memory.held / 2
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert need.parts["gradients"] == need.parts["what is trained"] == 4 * trained
    assert ("ears" in need.parts) == ("lora" in word)


def test_the_advice_is_what_makes_it_fit_and_none_where_nothing_does(toys):
    config = load_config(toys / "toy.yaml", ["train.micro_batch_size=64", "train.batch_size=64"])
    usage = Usage(SECONDS, 20, 10)
    assert advise(config, Cards(2), usage) == []
    teacher, given = describe_teacher(config)
    need = need_of_training(config, Cards(2), usage, describe_student(config, teacher), given)
    words = advise(config, Cards(2, need.total * 0.999 / 1e9), usage)
    assert words[0] == "train.gradient_checkpointing=true"
    changed = load_config(toys / "toy.yaml", ["train.batch_size=64", "train.micro_batch_size=64", *words])
    assert need_of_training(changed, Cards(2), usage, describe_student(config, teacher), given).total < need.total
    words = ["train.micro_batch_size=1", "train.gradient_checkpointing=true", "cache.batch_size=1", "eval.batch_size=1"]
    least = load_config(toys / "toy.yaml", words)
    assert advise(least, Cards(2, 0.1), usage) is None  # less than the driver takes


def test_a_mixture_of_16b_that_stays_whole_is_refused_on_24_gb_with_what_it_needs_at_the_least():
    words = ["student.llm=deepseek-ai/DeepSeek-V2-Lite", "student.lora_targets=[all-linear]",
             "loss.cross_tokenizer=chunk", "student.quantization=none", "train.gradient_checkpointing=true",
             "train.micro_batch_size=1"]  # fmt: skip
    config = load_config("salmonn_3b_to_1b", words)
    teacher, given = describe_teacher(config)
    need = need_of_training(config, Cards(2), longest({}), describe_student(config, teacher), given)
    assert need.parts["LLM"] == pytest.approx(15.706e9 * 2, rel=1e-3)  # published parameters, in bf16
    assert not Cards(2).hold(need) and next_change(config, [need]) is None
    text = refuse([need], ["train.micro_batch_size=1"])
    assert text.startswith("No batch is small enough: even with train.micro_batch_size=1 train: 1 clips a micro-batch")
    assert f"needs {need.total / 1e9:.2f} GB; take a smaller LLM, student.quantization=nf4, or a larger card" in text


def test_a_teacher_that_scores_beside_its_cache_is_counted(toys):
    words = [[], ["on_policy.step_share=0.5"]]
    (alone, *others), (beside, *same) = (
        plan_memory(load_config(toys / "toy.yaml", own), Cards(1), longest({})) for own in words
    )
    assert beside.parts["the online teacher's LLM and connector"] > 0 and beside.total > alone.total
    assert others == same


def test_the_ears_of_an_online_teacher_are_counted_where_the_student_has_not_their_weights(toys):
    def theirs(*words: str) -> float:
        config = load_config(toys / "toy.yaml", ["teacher.online=true", "precision=float32", *words])
        return plan_memory(config, Cards(1), longest({}))[0].parts.get("the online teacher's ears", 0.0)

    assert theirs() == theirs("student.ears_lora_rank=2") == 0
    whole = sum(p.numel() for p in WhisperEar.from_pretrained(toys / "parts/whisper").parameters())
    assert theirs("student.train_ears=true") == theirs("student.ears_quantization=int8") == 4 * whole


def test_a_teacher_that_is_online_is_given_up_last():
    config = Config(teacher=TeacherConfig(online=True))
    short = [Need("train: 1 clips a micro-batch, teacher online", {})]
    train = dataclasses.replace(config.train, micro_batch_size=1, gradient_checkpointing=True)
    assert next_change(config, short) == ("train", "gradient_checkpointing", True)
    assert next_change(dataclasses.replace(config, train=train), short) == ("teacher", "online", False)


def test_a_teacher_that_answers_no_clip_alone_is_asked_in_int8():
    config = Config(cache=dataclasses.replace(Config().cache, batch_size=1))
    assert next_change(config, [Need("cache: 1 clips a batch", {})]) == ("teacher", "quantization", "int8")
    config = dataclasses.replace(config, teacher=TeacherConfig(quantization="int8"))
    assert next_change(config, [Need("cache: 1 clips a batch", {})]) is None
    words = [[], ["teacher.quantization=int8"]]
    whole, narrow = (
        measure_sizes(*describe_teacher(load_config("salmonn_3b_to_1b", own)))["LLM body"] for own in words
    )
    assert whole[1] - narrow[1] == pytest.approx(2.8e9, rel=0.02)  # of 3.2 thousand million weights, 2.8 are narrowed


def test_plan_prints_the_memory_of_every_stage_for_readers_and_scripts(toys, capsys):
    words = ["plan", str(toys / "toy.yaml"), "--gpus", "2", "--seconds", "2", "--answer-tokens", "10"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "on each of 2 GPUs of 24 GB, ZeRO-2; clips of 2 s" in text
    assert "activations of the LLM" in text and "cache: 4 clips a batch" in text
    words += [
        "train.micro_batch_size=1",
        "train.gradient_checkpointing=true",
        "cache.batch_size=1",
        "eval.batch_size=1",
    ]
    assert main([*words, "--gpu-gb", "0.1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["change"] is None and not any(stage["fits"] for stage in found["stages"])
