"""The model: rows are contiguous, a batch is its rows, the end token is learned, a saved model is the model."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_beats import TINY as TINY_BEATS
from test_beats import make_official

from distill.caching.capture import num_frames_read
from distill.caching.identity import describe_teacher
from distill.config import Config, TeacherConfig
from distill.teacher import load_teacher
from shards.sample import SAMPLE_RATE
from students.hearing import Connector
from students.student import build_student, load_student
from teachers.ears.beats import BeatsEar
from teachers.files.loading import load_salmonn, save_salmonn
from teachers.lora import Lora, add_lora_
from teachers.online import OnlineTeacher
from teachers.words.prompts import load_prompts


def load_named(folder, **settings):
    """The teacher that a config names."""
    return load_teacher(Config(teacher=TeacherConfig(path=str(folder), **settings)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    return folder


@pytest.fixture(scope="module")
def model(parts):
    return tiny.make_teacher(parts, windows="audio").eval()


SAMPLES = [
    tiny.make_sample(0, text="one", seconds=0.4),
    tiny.make_sample(1, text="two three four five", seconds=1.6),
    tiny.make_sample(2, text="six", seconds=0.9),
]


@torch.no_grad()
def hear(model, samples):
    batch = model.collate(samples)
    return model.frames(batch.waveforms_BN, batch.num_samples_B)


@torch.no_grad()
def logits(model, samples):
    batch = model.collate(samples)
    return model(batch)[0], batch


@pytest.mark.parametrize("windows", ["all", "audio"])
def test_logits_of_a_batch_are_those_of_each_row_alone(parts, windows):
    model = tiny.make_teacher(parts, windows=windows).eval()
    together, batch = logits(model, SAMPLES)
    for b, sample in enumerate(SAMPLES):
        torch.testing.assert_close(together[batch.row_S == b], logits(model, [sample])[0], atol=1e-5, rtol=1e-5)


def test_prompt_and_answer_are_contiguous_and_end_with_the_end_token(model):
    batch = model.collate(SAMPLES)
    for b, row in enumerate(batch.rows):
        length = row.prompt_length + len(row.answer)
        assert batch.attention_mask_BT[b].tolist() == [1] * length + [0] * (batch.input_ids_BT.shape[1] - length)
        assert batch.labels_S[batch.row_S == b].tolist() == row.answer
        assert row.answer[-1] == model.tokenizer.eos_token_id
        positions = batch.predicting_S[batch.row_S == b] - b * batch.input_ids_BT.shape[1]
        assert positions.tolist() == list(range(row.prompt_length - 1, length - 1))


def test_rows_for_generation_are_padded_at_the_start(model):
    batch = model.collate(SAMPLES, with_answer=False)
    assert batch.attention_mask_BT[:, -1].tolist() == [1, 1, 1]
    assert batch.attention_mask_BT[0, 0] == 0


def test_greedy_answers_of_a_batch_are_those_of_each_row_alone(model):
    together = model.generate(SAMPLES, max_new_tokens=6)
    assert together == [model.generate([sample], max_new_tokens=6)[0] for sample in SAMPLES]


def test_the_first_generated_id_is_the_argmax_of_the_first_logits(model):
    sample = SAMPLES[1]
    scores, _ = logits(model, [sample])
    ids = model.generate_ids(model.collate([sample], with_answer=False), max_new_tokens=1)
    assert ids[0][0] == int(scores[0].argmax())


def test_windows_with_audio_give_fewer_audio_tokens(parts):
    model = tiny.make_teacher(parts, windows="audio")
    assert model.num_audio_tokens(20_000) == -(-63 // 17)
    assert model.num_audio_tokens(8_000) == model.num_audio_tokens(16_000) == -(-50 // 17)
    assert tiny.make_teacher(parts, windows="all").num_audio_tokens(8_000) == (100 - 17) // 17 + 1


def test_a_clip_longer_than_the_ears_is_refused_by_name(model):
    with pytest.raises(ValueError, match=r"sample k007 lasts 2\.50 s, but these ears take 0\.02 to 2 s"):
        model.collate([tiny.make_sample(7, seconds=2.5)])


def test_an_unknown_task_is_refused_with_the_nearest_name(model):
    with pytest.raises(ValueError, match=r"task of sample k000 is 'asrr', but the prompts know .*did you mean 'asr'"):
        model.collate([tiny.make_sample(0, task="asrr")])


def test_an_unlabelled_sample_has_no_training_row(model):
    with pytest.raises(ValueError, match=r"text of sample k003 is None, but training needs an answer"):
        model.collate([tiny.make_sample(3, text=None)])


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_loads_to_identical_logits(parts, tmp_path, lora):
    model = tiny.make_teacher(parts, lora=lora).eval()
    settings = {"lora": dataclasses.asdict(Lora(rank=4, alpha=8))} if lora else {}
    save_salmonn(model, tmp_path / "saved", settings=settings)
    loaded = load_salmonn(tmp_path / "saved")
    assert torch.equal(logits(loaded, SAMPLES)[0], logits(model, SAMPLES)[0])
    save_salmonn(loaded, tmp_path / "again", settings=settings)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "again"))
    assert first == second


def read_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_bytes", [500, 5_000, 60_000], ids=["config", "tokenizer", "weights"])
def test_a_model_that_a_full_disk_does_not_take_leaves_the_saved_one_as_it_was(parts, tmp_path, num_bytes):
    save_salmonn(tiny.make_teacher(parts), tmp_path / "model")
    before = read_files(tmp_path)
    (tmp_path / ".model.0123.tmp").mkdir()  # of a process that was killed
    for name in ("model", "new"):
        with (
            tiny.full_disk(num_bytes),
            pytest.raises(OSError, match=rf"^\S*{name} cannot be written \(File too large\), but .*; free space"),
        ):
            save_salmonn(tiny.make_teacher(parts, seed=1), tmp_path / name)
    assert read_files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_frozen_weights_than_at_training_are_refused(parts, tmp_path):
    tiny.make_parts(tmp_path / "parts")
    save_salmonn(tiny.make_teacher(tmp_path / "parts"), tmp_path / "saved")
    tiny.make_parts(tmp_path / "parts", seed=1)
    with pytest.raises(ValueError, match=r"llm of .*saved has hash .*, but the model was trained with"):
        load_salmonn(tmp_path / "saved")


def test_a_missing_llm_is_named(parts, tmp_path):
    model = tiny.make_teacher(parts)
    save_salmonn(model, tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text().replace(str(parts / "llm"), str(tmp_path / "gone"))
    (tmp_path / "saved" / "config.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"llm is .*gone, but it is no folder of a causal LM here"):
        load_salmonn(tmp_path / "saved")


def test_lora_on_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no layer named \['c_attn'\]"):
        add_lora_(model.llm, Lora(targets=("c_attn",)))


@pytest.fixture(scope="module")
def beats(parts):
    torch.manual_seed(0)
    torch.save(make_official(BeatsEar.from_config(TINY_BEATS)), parts / "beats.pt")
    return {"second": str(parts / "beats.pt"), "second_kind": "beats"}


def test_frozen_parts_stay_in_evaluation_mode_while_a_model_trains(parts, beats):
    model = tiny.make_teacher(parts, qformer_dropout=0.5, **beats)
    model.second.requires_grad_(False)
    model.llm.config.attention_dropout = 0.5
    model.train()
    frozen = [module for part in (model.whisper, model.second, model.llm) for module in part.modules()]
    assert model.training and model.qformer.training and not any(module.training for module in frozen)
    model.qformer.requires_grad_(False)
    model.train()
    assert not any(module.training for module in model.qformer.modules())
    batch = model.collate(SAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch)[0], model(batch)[0])
    tuned = tiny.make_teacher(parts, lora=True).train()
    assert any(module.training for module in tuned.llm.modules() if module is not tuned.llm)


def test_a_students_training_leaves_its_online_teacher_alone(parts, beats):
    teacher = OnlineTeacher(tiny.make_teacher(parts, qformer_dropout=0.5, **beats))
    student = build_student(teacher.model, str(parts / "student-llm"), lora=Lora(rank=4, dropout=0.5),
                            quantization="none", connector=Connector(dropout=0.5)).train()  # fmt: skip
    assert student.second is teacher.model.second and student.qformer.training
    assert not any(module.training for module in teacher.model.modules())
    batch = teacher.model.collate(SAMPLES)
    first, second = (teacher.targets(batch).distribution.logprobs_SK for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("windows", ["all", "audio"])
def test_a_clip_under_one_second_is_heard_as_one_that_was_padded_to_it_alone_and_in_a_batch(parts, beats, windows):
    model = tiny.make_teacher(parts, windows=windows, **beats).eval()
    short = [tiny.make_sample(number, seconds=seconds) for number, seconds in enumerate((0.02, 0.2, 0.5, 0.99, 1.4))]
    lengths = [max(len(sample.waveform_N), SAMPLE_RATE) for sample in short]
    padded = [
        replace(sample, waveform_N=np.pad(sample.waveform_N, (0, length - len(sample.waveform_N))))
        for sample, length in zip(short, lengths)
    ]
    batch = model.collate(short)
    assert [row.num_audio_tokens for row in batch.rows] == [row.num_audio_tokens for row in model.collate(padded).rows]
    with torch.no_grad():
        for own, by_hand in zip(model.frames(batch.waveforms_BN, batch.num_samples_B), hear(model, padded)):
            torch.testing.assert_close(own, by_hand)
        for sample, by_hand in zip(short, padded):
            assert torch.equal(hear(model, [sample])[1], hear(model, [by_hand])[1])
            assert num_frames_read(model, len(sample.waveform_N), "audio") == num_frames_read(
                model, len(by_hand.waveform_N), "audio"
            )
        torch.testing.assert_close(logits(model, short)[0], logits(model, padded)[0], atol=1e-5, rtol=1e-5)
    assert len(short[0].waveform_N) == 320  # what is trained on stays as it was packed


def test_features_are_float32_under_autocast(parts, beats):
    model = tiny.make_teacher(parts, **beats).eval()
    batch = model.collate(SAMPLES)
    expected = model.front_end(batch.waveforms_BN, batch.num_samples_B)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype), torch.no_grad():
            found = model.front_end(batch.waveforms_BN, batch.num_samples_B)
            frames = model.frames(batch.waveforms_BN, batch.num_samples_B)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert all(x.isfinite().all() for x in frames)


@torch.no_grad()
def test_bfloat16_logits_stay_within_two_hundredths(parts, beats):
    model = tiny.make_teacher(parts, **beats).eval()
    expected, batch = logits(model, SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch)[0]
    assert (found - expected).norm() < 2e-2 * expected.norm()


@torch.no_grad()
def test_one_front_end_is_exact_by_default_and_approximate_when_asked_with_its_error_printed(parts, beats, capsys):
    exact = tiny.make_teacher(parts, **beats).eval()
    batch = exact.collate(SAMPLES)
    frames = exact.frames(batch.waveforms_BN, batch.num_samples_B)
    for found, ear in zip(frames, (exact.whisper, exact.second)):
        assert torch.equal(found, ear(*exact.pad_short(batch.waveforms_BN, batch.num_samples_B))[0])
    assert "shared power spectrum" not in capsys.readouterr().err
    shared = tiny.make_teacher(parts, front_end="shared", **beats).eval()
    near = shared.frames(batch.waveforms_BN, batch.num_samples_B)
    assert torch.equal(near[0], frames[0])
    error = float((near[1] - frames[1]).norm() / frames[1].norm())
    printed = capsys.readouterr().err
    assert 0 < error < 0.5 and f"beats_frames_relative_error {error:.3g}" in printed
    shared.frames(batch.waveforms_BN, batch.num_samples_B)
    assert "shared power spectrum" not in capsys.readouterr().err


def test_a_shared_spectrum_without_beats_is_refused(parts):
    with pytest.raises(ValueError, match=r"front_end is 'shared', but second_kind is '' and only BEATs shares"):
        tiny.make_teacher(parts, front_end="shared")
    with pytest.raises(ValueError, match=r"front_end is 'near', but must be 'exact' or 'shared'"):
        tiny.make_teacher(parts, front_end="near")


def test_the_front_end_is_part_of_a_caches_fingerprint(parts, beats):
    identities = [describe_teacher(tiny.make_teacher(parts, front_end=kind, **beats), Config(precision="float32"))
                  for kind in ("exact", "exact", "shared")]  # fmt: skip
    first, again, shared = (identity.fingerprint for identity in identities)
    assert first == again != shared


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"model_type": "llama"}',
            r"config\.json is of model_type llama, but a folder that this library saved is needed",
        ),
        ('{"model": {"llm": "x"}}', r"config\.json is not one of ours \(.*whisper.*\), but a folder that this library"),
        ('{"model": {"llm": "x", "whisper": "y"}}', r"config\.json is not one of ours \('settings'\), but"),
        ('{"model": {', r"config\.json is not JSON \(.*\), but must be whole; restore it"),
        ("[]", r"config\.json holds a list, but an object is needed"),
    ],
)
@pytest.mark.parametrize("load", [load_salmonn, load_student, load_named])
def test_a_folder_of_something_else_is_refused_by_its_config(tmp_path, load, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("part", ["model/model.safetensors", "parts/llm/model.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 100, 0.5])
def test_cut_weights_are_refused_by_the_name_of_their_file(tmp_path, part, kept):
    tiny.make_parts(tmp_path / "parts")
    save_salmonn(tiny.make_teacher(tmp_path / "parts"), tmp_path / "model")
    data = (tmp_path / part).read_bytes()
    (tmp_path / part).write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    name = "model.safetensors" if part.startswith("model") else "llm"
    with pytest.raises(ValueError, match=rf"{name}(,| is).*damaged \(.*download it again"):
        load_salmonn(tmp_path / "model")


def test_a_model_is_saved_into_the_working_directory_over_what_is_there(parts, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("old")
    monkeypatch.chdir(tmp_path)
    model = tiny.make_teacher(parts).eval()
    save_salmonn(model, ".")
    assert torch.equal(logits(load_salmonn("."), SAMPLES[:1])[0], logits(model, SAMPLES[:1])[0])


def test_weights_that_are_not_there_are_named(parts, tmp_path):
    save_salmonn(tiny.make_teacher(parts), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is not there, but the weights are in it; restore it"):
        load_salmonn(tmp_path / "model")


def test_a_saved_teachers_parts_are_taken_from_where_the_config_says_they_lie_if_they_are_the_same(tmp_path):
    tiny.make_parts(tmp_path / "parts")
    model = tiny.make_teacher(tmp_path / "parts").eval()
    save_salmonn(model, tmp_path / "teacher")
    (tmp_path / "parts").rename(tmp_path / "moved")
    moved = {name: str(tmp_path / "moved" / name) for name in ("llm", "whisper")}
    loaded = load_named(tmp_path / "teacher", **moved)
    assert torch.equal(logits(loaded, SAMPLES)[0], logits(model, SAMPLES)[0])
    assert loaded.config.llm == moved["llm"]
    tiny.make_parts(tmp_path / "other", seed=1)
    for name in moved:
        with pytest.raises(ValueError, match=rf"{name} of .* has hash \w{{16}} \(.*other.*\), but .* \w{{16}}; put"):
            load_named(tmp_path / "teacher", **moved | {name: str(tmp_path / "other" / name)})
    with pytest.raises(ValueError, match=r"teacher\.second is 'beats\.pt', but .* was saved with '' and"):
        load_named(tmp_path / "teacher", second="beats.pt", **moved)
    with pytest.raises(ValueError, match=r"teacher\.second_kind is 'beats', but .* was saved with ''"):
        load_named(tmp_path / "teacher", second_kind="beats", **moved)


@pytest.mark.parametrize(
    "setting",
    [{"front_end": "shared"}, {"end_token": "<end>"}, {"prompts": "prompts.json"}],
    ids=lambda x: next(iter(x)),
)
def test_a_setting_that_a_saved_teacher_does_not_have_is_refused_by_name(parts, tmp_path, setting):
    save_salmonn(tiny.make_teacher(parts), tmp_path / "model")
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=rf"teacher\.{name} is '{value}', but \S*model was saved with '\w*' and such"):
        load_named(tmp_path / "model", **setting)


def test_settings_that_a_saved_teacher_has_may_be_named(parts, tmp_path):
    save_salmonn(tiny.make_teacher(parts, end_token="</s>"), tmp_path / "model")
    assert load_named(tmp_path / "model").config.end_token == "</s>"
    assert load_named(tmp_path / "model", end_token="</s>", front_end="exact").config.end_token == "</s>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["<SpeechHere> Say it."]', r'holds a list, but must be \{"task": \["prompt", …\], …\}; correct it'),
        ('{"asr": 3}', r"has 3 for 'asr', but must be"),
        ('{"asr": ["<SpeechHere>", 3]}', r"has \['<SpeechHere>', 3\] for 'asr', but must be"),
        ('{"asr": []}', r"task 'asr' has no prompt"),
        ("asr: x", r"is not JSON in UTF-8 \(.*\); correct it"),
    ],
)
def test_a_prompts_file_of_another_form_is_refused(tmp_path, text, message):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / "prompts.json", "{}")
