"""Qwen2-Audio as a teacher: transformers' own loss, logits and answers; a batch is its rows."""

import json

import pytest
import tiny
import torch
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from distill.cli import main
from distill.config import Config, TeacherConfig, load_config
from distill.demo.tokenizer import train_tokenizer
from distill.teacher import load_teacher
from students.hearing import Connector
from students.student import build_student
from teachers.ears.whisper import WhisperEar
from teachers.files.loading import hash_frozen_parts
from teachers.lora import Lora
from teachers.online import OnlineTeacher
from teachers.qwen2_audio import load_qwen2_audio

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
SAMPLES = [tiny.make_sample(1, text="one two", seconds=0.6), tiny.make_sample(2, text="six", seconds=1.33)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen2-Audio with random weights in the published format."""
    folder = tmp_path_factory.mktemp("qwen2_audio")
    tokenizer = train_tokenizer(
        [*tiny.WORDS, "You are a helpful assistant. user Audio 1: Recognize"], folder, vocab_size=400
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    audio = {"num_mel_bins": 128, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
             "encoder_ffn_dim": 64, "max_source_positions": 100}  # fmt: skip
    text = {"model_type": "qwen2", "vocab_size": len(tokenizer) + 3, "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    audio_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=audio_id)
    model = Qwen2AudioForConditionalGeneration(config)
    for parameter in model.parameters():  # biases and norms too, so that no missing tensor goes unseen
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    return load_qwen2_audio(folder)


@torch.no_grad()
def test_its_tower_hears_in_float32_beside_a_llm_of_16_bits(folder, teacher):
    other = load_qwen2_audio(folder, dtype=torch.bfloat16, ears="float32")
    assert {p.dtype for p in [*other.llm.parameters(), *other.project.parameters()]} == {torch.bfloat16}
    batch = teacher.collate(SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        found = other.frames(batch.waveforms_BN, batch.num_samples_B)[0]
        assert torch.isfinite(other(batch)[0]).all()
    assert torch.equal(found, teacher.frames(batch.waveforms_BN, batch.num_samples_B)[0])


def original_inputs(folder, teacher, sample, *, with_answer=True):
    """What transformers' own processor gives: expanded audio tokens, features and their mask."""
    num_tokens = teacher.num_audio_tokens(len(sample.waveform_N))
    row = teacher.rows.row(sample, with_answer=with_answer, first_prompt=True, num_audio_tokens=num_tokens)
    audio_id = teacher.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    ids = [*row.before, *[audio_id] * row.num_audio_tokens, *row.after, *row.answer]
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=2)
    features = extractor(sample.waveform_N, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt",
                         padding="max_length")  # fmt: skip
    return row, {
        "input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "input_features": features["input_features"], "feature_attention_mask": features["attention_mask"],
    }  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES, ids=["short", "longer"])
@torch.no_grad()
def test_loss_and_logits_are_transformers_own(folder, teacher, sample):
    original = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    row, inputs = original_inputs(folder, teacher, sample)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -len(row.answer) :] = torch.tensor(row.answer)
    output = original(**inputs, labels=labels)
    batch = teacher.collate([sample], first_prompt=True)
    logits_SV, _ = teacher(batch)
    expected = output.logits[0, -len(row.answer) - 1 : -1]
    assert (logits_SV - expected).norm() < 1e-5 * expected.norm()
    loss = torch.nn.functional.cross_entropy(logits_SV, batch.labels_S)
    assert float(loss) == pytest.approx(float(output.loss), rel=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_transformers_own(folder, teacher, num_beams):
    original = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    for sample in SAMPLES:
        _, inputs = original_inputs(folder, teacher, sample, with_answer=False)
        expected = original.generate(**inputs, max_new_tokens=8, num_beams=num_beams, do_sample=False, pad_token_id=0,
                                     eos_token_id=teacher.end_ids)[0, inputs["input_ids"].shape[1] :]  # fmt: skip
        batch = teacher.collate([sample], with_answer=False, first_prompt=True)
        assert teacher.generate_ids(batch, max_new_tokens=8, num_beams=num_beams)[0] == expected.tolist()


@torch.no_grad()
def test_a_batch_is_its_rows(teacher):
    batch = teacher.collate(SAMPLES)
    together, _ = teacher(batch)
    for b, sample in enumerate(SAMPLES):
        alone, _ = teacher(teacher.collate([sample]))
        torch.testing.assert_close(together[batch.row_S == b], alone, atol=1e-4, rtol=1e-4)
    assert teacher.generate(SAMPLES, max_new_tokens=5) == [teacher.generate([s], max_new_tokens=5)[0] for s in SAMPLES]


def test_the_prompt_is_its_chat(teacher):
    row = teacher.rows.row(SAMPLES[0], with_answer=True, first_prompt=True)
    text = teacher.tokenizer.decode(row.before) + "|" + teacher.tokenizer.decode(row.after + row.answer)
    assert "<|im_start|>user\nAudio 1: <|audio_bos|>|<|audio_eos|>\nTranscribe" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\none two<|im_end|>")


def test_its_targets_hold_logits_and_no_queries(teacher):
    online = OnlineTeacher(teacher, k=8)
    batch = teacher.collate(SAMPLES)
    targets = online.targets(batch)
    assert targets.queries_BWQE is None
    assert targets.distribution.ids_SK.shape[0] == batch.num_supervised


def test_a_config_loads_it_from_its_folder(folder, tmp_path):
    (tmp_path / "c.yaml").write_text(f"teacher:\n  path: {folder}\n")
    loaded = load_teacher(load_config(tmp_path / "c.yaml", ["precision=float32"]))
    assert loaded.llm.config.model_type == "qwen2" and not any(p.requires_grad for p in loaded.parameters())
    assert set(hash_frozen_parts(loaded)) >= {"llm", "whisper"}


@pytest.mark.parametrize(("name", "value"), [("front_end", "shared"), ("end_token", "</s>")])
def test_a_setting_that_it_does_not_take_is_refused_by_name(folder, name, value):
    config = Config(teacher=TeacherConfig(path=str(folder), **{name: value}))
    with pytest.raises(
        ValueError, match=rf"teacher\.{name} is '{value}', but .* was saved with '.*' and such a folder's"
    ):
        load_teacher(config)


def test_a_student_hears_with_its_tower(folder, teacher, tmp_path):
    tiny.make_parts(tmp_path)
    lora = Lora(rank=4, alpha=8)
    student = build_student(
        teacher, str(tmp_path / "student-llm"), lora=lora, quantization="none", connector=Connector("new")
    )
    own = WhisperEar.from_pretrained(folder)
    waveforms_BN, num_samples_B = torch.randn(1, 16_000), torch.tensor([16_000])
    expected = own(waveforms_BN, num_samples_B)[0]
    assert torch.equal(student.whisper(waveforms_BN, num_samples_B)[0], expected)
    assert student.whisper is teacher.whisper and student.generate([SAMPLES[0]], max_new_tokens=2)


def test_a_missing_tensor_or_token_is_refused(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("conv1.weight"))
    del weights[name]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cut has 1 missing keys \(.*conv1\.weight\), but every tensor must fit"):
        load_qwen2_audio(tmp_path / "cut")
    shutil.copytree(folder, tmp_path / "plain")
    text = (folder / "tokenizer.json").read_text().replace("<|audio_bos|>", "<|other|>")
    (tmp_path / "plain" / "tokenizer.json").write_text(text)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {k: v for k, v in settings.items() if "special_tokens" not in k and k != "added_tokens_decoder"}
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"plain has no token <\|audio_bos\|>, but Qwen2-Audio's chat needs it"):
        load_qwen2_audio(tmp_path / "plain")


def test_its_costs_are_listed_beside_its_students(folder, tmp_path, capsys):
    tiny.make_parts(tmp_path)
    (tmp_path / "c.yaml").write_text(f"teacher:\n  path: {folder}\nstudent:\n  llm: {tmp_path / 'student-llm'}\n")
    assert main(["stats", "model", str(tmp_path / "c.yaml"), "student.quantization=none"]) == 0
    teacher, student = capsys.readouterr().out.split("student (")
    assert "Q-Former" in student and "Q-Former" not in teacher and "Whisper encoder" in teacher


def test_its_cached_targets_train_a_student_of_another_tokenizer(folder, tmp_path, capsys):
    tiny.make_parts(tmp_path)
    tiny.make_shards(tmp_path / "data", num_samples=6)
    config = tiny.write_config(
        tmp_path / "c.yaml", tmp_path / "data", folder, tmp_path, precision="float32", student__quantization="none",
        loss__feature=0.0, loss__cross_tokenizer="chunk",
    )  # fmt: skip
    assert main(["cache", str(config)]) == 0
    assert main(["run", str(config)]) == 0
    steps = [json.loads(line) for line in (tmp_path / "runs/toy/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4 and all(step["chunk"] > 0 for step in steps)
