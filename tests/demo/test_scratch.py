"""The demo's teacher: made of the parts that its own settings ask for."""

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from torch import nn

from distill.config import load_config
from distill.demo.scratch import completion_mark, ear_loss, has_parts, make_parts, write_mark
from distill.teach import teach
from distill.training.ranks import build_accelerator, is_deepspeed
from teachers.files.loading import load_salmonn
from teachers.words.batch import pad_waveforms

SIZES = {"steps": 1, "ear_steps": 1, "text_steps": 1, "batch_size": 4, "vocab_size": 400, "ear_width": 32,
         "ear_layers": 1, "llm_layers": 1, "student_layers": 1, "student_width": 32, "qformer_width": 32}  # fmt: skip


def test_a_teacher_is_never_made_of_parts_that_other_settings_left(tmp_path, capsys):
    tiny.make_shards(tmp_path / "data", num_samples=4)
    path = tiny.write_config(tmp_path / "toy.yaml", tmp_path / "data", "", tmp_path, teacher__path="''",
                             corpus__train=tmp_path / "data" / "train.json", student__llm="''",
                             **{f"scratch__{name}": value for name, value in SIZES.items()})  # fmt: skip
    wide, narrow = (load_config(path, [f"scratch.llm_width={width}"]) for width in (96, 64))
    folder, marks = wide.run_folder / "scratch", [completion_mark(config) for config in (wide, narrow)]
    make_parts(wide, folder, build_accelerator())  # and then the job is killed, and its settings are changed
    write_mark(folder / "parts.json", marks[0])
    assert has_parts(folder, marks[0])
    assert teach(narrow) == 0
    assert "scratch is unfinished or of other settings, made anew" in capsys.readouterr().err
    assert load_salmonn(folder / "teacher").llm.config.hidden_size == 64
    assert has_parts(folder, marks[1])


def test_a_teacher_made_of_parts_that_an_interrupted_job_left_is_the_uninterrupted_ones(tmp_path):
    tiny.make_shards(tmp_path / "data", num_samples=4)
    path = tiny.write_config(tmp_path / "toy.yaml", tmp_path / "data", "", tmp_path, teacher__path="''",
                             corpus__train=tmp_path / "data" / "train.json", student__llm="''",
                             **{f"scratch__{name}": value for name, value in SIZES.items()})  # fmt: skip
    whole, broken = (load_config(path, [f"name={name}"]) for name in ("whole", "broken"))
    assert teach(whole) == 0
    make_parts(broken, broken.run_folder / "scratch", build_accelerator())
    torch.rand(7)  # whatever the next process draws before
    assert teach(broken) == 0
    one, other = (load_salmonn(config.run_folder / "scratch/teacher").state_dict() for config in (whole, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_teacher_from_nothing_is_too_small_to_be_split_where_the_launcher_says_deepspeed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not is_deepspeed(build_accelerator(takes_deepspeed=False))


def test_ears_learn_words_in_their_order_and_what_is_said_of_a_whole_clip_from_its_mean(tmp_path):
    tiny.make_parts(tmp_path)
    model = tiny.make_teacher(tmp_path)
    heads = nn.ModuleDict({name: nn.Linear(model.whisper.width, len(model.tokenizer)) for name in ("order", "whole")})
    words = tiny.make_sample(1, text="one two")
    voice = tiny.make_sample(2, text="male", task="gender_recognition", seconds=0.9)
    one, other, both = (ear_loss(model.whisper, heads, s, model.tokenizer) for s in ([words], [voice], [words, voice]))
    assert float(both) == pytest.approx(float(one) + float(other), rel=1e-4)
    frames_BRE, num_frames_B = model.whisper(*pad_waveforms([voice.waveform_N]))
    logprobs_V = heads["whole"](frames_BRE[0, : num_frames_B[0]].mean(0)).log_softmax(-1)
    assert float(other) == pytest.approx(
        -float(logprobs_V[model.tokenizer.encode("male", add_special_tokens=False)[0]])
    )
    other.backward()
    assert heads["order"].weight.grad is None and torch.count_nonzero(heads["whole"].weight.grad) > 0


def test_ears_that_are_cut_to_the_clip_learn_and_hear_so_from_the_start(tmp_path):
    tiny.make_shards(tmp_path / "data", num_samples=4)
    path = tiny.write_config(tmp_path / "toy.yaml", tmp_path / "data", "", tmp_path, teacher__path="''",
                             corpus__train=tmp_path / "data" / "train.json", student__llm="''",
                             **{f"scratch__{name}": value for name, value in SIZES.items()})  # fmt: skip
    config = load_config(path, ["scratch.ears_seconds=clip"])
    assert teach(config) == 0
    model = load_salmonn(config.run_folder / "scratch/teacher")
    assert model.config.ears_seconds == "clip" and model.num_speech_frames(32_000) == 102  # its last window's; of 180
    heads = nn.ModuleDict({name: nn.Linear(model.whisper.width, len(model.tokenizer)) for name in ("order", "whole")})
    clips = [tiny.make_sample(1, text="one", seconds=1.0), tiny.make_sample(2, text="two", seconds=2.0)]
    losses = {
        how: float(ear_loss(model.whisper, heads, clips, model.tokenizer, how)) for how in ("clip", "clip+5", "30")
    }
    alone = [float(ear_loss(model.whisper, heads, [clip], model.tokenizer, "clip")) for clip in clips]
    assert losses["clip"] == pytest.approx(sum(alone) / 2, rel=1e-4)  # a clip is heard as it is alone
    assert losses["clip+5"] == pytest.approx(losses["30"], rel=1e-4) != pytest.approx(losses["clip"], rel=1e-4)
    with pytest.raises(ValueError, match=r"scratch\.ears_seconds is 'all', but must be '30'"):
        load_config(path, ["scratch.ears_seconds=all"])
