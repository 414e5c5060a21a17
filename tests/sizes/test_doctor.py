"""Doctor passes on sound runs, and finds each fault that trains silently."""

import dataclasses
import re
import weakref

import pytest
import tiny
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import distill.doctor.memory
import distill.doctor.objective
import distill.objective.fused
import distill.objective.losses
import distill.objective.weighing
import distill.training.microbatch
import teachers.salmonn
from distill.cache import cache
from distill.config import load_config
from distill.demo.tokenizer import train_byte_tokenizer
from distill.doctor.doctor import build_case, doctor, run_checks
from shards.targets.distributions import Distribution, Sparse
from teachers.ears.convolution import _InFloat32
from teachers.fourbit import FLAG


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, loss__temperature=2.0, loss__hidden=0.5, cache__hidden_layers="[-1]")
    cache(load_config(folder / "toy.yaml"))
    return folder


def faults(toys, *names: str) -> dict[str, str]:
    """What those of the named checks say that fail."""
    return failing(build_case(load_config(toys / "toy.yaml")), *names)


def failing(case, *names: str) -> dict[str, str]:
    return {name: text for name, is_right, text in run_checks(case, names) if not is_right}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["loss.kl_kind=jsd", "loss.kl_parameter=0.3", "loss.schedules.kl=cosine 0.1", "student.quantization=none"],
        ["loss.kl_kind=reverse_kl", "loss.temperature=1", "loss.feature_kind=relation", "teacher.online=true"],
    ],
)
def test_a_sound_run_passes(toys, words, capsys):
    code = doctor(load_config(toys / "toy.yaml", words))
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and len(lines) == 16
    assert all(line.startswith("pass") for line in lines)


@pytest.mark.parametrize("kind", ["int8", "float16"])
def test_a_sound_run_on_cached_frames_passes(toys, tmp_path, kind, capsys):
    config = load_config(toys / "toy.yaml", [f"cache.folder={tmp_path}/cache", f"cache.frames={kind}"])
    cache(config)
    code = doctor(config)
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, lines
    assert all(line.startswith("pass") for line in lines[-16:])


def test_a_cached_teacher_is_freed_when_it_has_been_asked_and_an_online_one_is_not(toys):
    case = build_case(load_config(toys / "toy.yaml"))
    teacher = weakref.ref(case.teacher.llm)
    assert [passed for _, passed, _ in run_checks(case)] == [True] * 15
    assert teacher() is None
    case = build_case(load_config(toys / "toy.yaml", ["teacher.online=true"]))
    assert all(passed for _, passed, _ in run_checks(case)) and case.teacher is not None


@pytest.mark.parametrize("words", [[], ["teacher.online=true"]])
def test_memory_is_that_of_a_whole_micro_batch_in_the_precision_of_the_run(toys, tmp_path, monkeypatch, words):
    words = ["train.batch_size=12", "train.micro_batch_size=10", "precision=bf16", f"cache.folder={tmp_path}", *words]
    config = load_config(toys / "toy.yaml", words)
    cache(config)
    case = build_case(config)
    assert (len(case.samples), len(case.micro_batch)) == (4, 6)  # 12 are cut into two halves
    assert " GB at 6 clips a micro-batch in bfloat16, of " in distill.doctor.memory.check_memory(case)
    monkeypatch.setattr(distill.doctor.memory, "MOST_SECONDS", 0.0)
    text = distill.doctor.memory.check_memory(case)
    assert " GB at 6 clips a micro-batch in bfloat16 (extrapolated from 4: all of them would take " in text


def test_a_micro_batch_that_does_not_fit_is_found(toys, monkeypatch):
    case = build_case(load_config(toys / "toy.yaml"))
    monkeypatch.setattr(distill.doctor.memory, "device_bytes", lambda case: 10**6)
    assert "but more is needed; lower train.micro_batch_size" in failing(case, "memory")["memory"]


def test_a_clip_that_cannot_be_read_does_not_stop_doctor_before_there_is_a_run(toys, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    for path in (toys / "data" / "train").glob("*.tar"):
        data = path.read_bytes()
        place = data.index(b"fLaC") + 200  # inside the first clip
        (tmp_path / "train" / path.name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    words = [f"data.folder={tmp_path}", f"runs={tmp_path}", "teacher.online=true", "loss.hidden=0"]
    assert doctor(load_config(toys / "toy.yaml", words)) == 0
    assert capsys.readouterr().out.startswith("pass  set up")


def test_a_sound_run_across_tokenizers_passes(toys, capsys):
    tokenizer = train_byte_tokenizer([*tiny.WORDS, "USER: what do you hear? ASSISTANT:"], toys / "qwen", vocab_size=300)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=1, num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id)
    ).save_pretrained(toys / "qwen")  # fmt: skip
    words = [f"student.llm={toys / 'qwen'}", "loss.cross_tokenizer=chunk", "loss.hidden=0"]
    assert doctor(load_config(toys / "toy.yaml", words)) == 0
    assert "alignment" in capsys.readouterr().out


def test_a_gradient_that_an_answer_changes_is_found(toys):
    case = build_case(load_config(toys / "toy.yaml"))
    for module in case.student.llm.modules():
        if hasattr(module, FLAG):
            setattr(module, FLAG, True)  # as bitsandbytes makes it on AVX512-BF16: an answer packs the layer
    assert failing(case, "after an answer")


def test_a_convolution_that_is_wrong_in_the_precision_of_the_run_is_found(toys, monkeypatch):
    true = _InFloat32._conv_forward
    monkeypatch.setattr(_InFloat32, "_conv_forward", lambda *args: true(*args) * (1.5 if args[1].itemsize < 8 else 1))
    text = faults(toys, "convolutions")["convolutions"]
    assert text.startswith("whisper.encoder.conv") and "is off by 50.0% in float32, but 2% is what" in text


def test_the_share_in_4_bits_is_said(toys):
    said = {name: text for name, _, text in run_checks(build_case(load_config(toys / "toy.yaml")), ["4 bits"])}
    assert re.match(r"\d+\.\d% of the LLM's weights are in 4 bits \(", said["4 bits"])


def plant_in_collate(monkeypatch, change):
    """Let every batch be changed after it was laid out."""
    true_collate = teachers.salmonn.collate
    monkeypatch.setattr(teachers.salmonn, "collate", lambda *args: change(true_collate(*args)))


def test_shifted_labels_are_found(toys, monkeypatch):
    plant_in_collate(monkeypatch, lambda batch: dataclasses.replace(batch, labels_S=batch.labels_S.roll(-1)))
    found = faults(toys, "rows", "fused = plain")
    assert "next token, neither shifted" in found["rows"]
    assert "fused = plain" in found


def test_a_mask_off_by_one_is_found(toys, monkeypatch):
    plant_in_collate(monkeypatch, lambda batch: dataclasses.replace(batch, predicting_S=batch.predicting_S + 1))
    found = faults(toys, "rows", "positions")
    assert "off by 1" in found["rows"] and "the mask is off" in found["positions"]


def test_a_missing_square_of_the_temperature_is_found(toys, monkeypatch):
    true = distill.objective.fused.bucket_divergence

    def without_square(student_SC, teacher, temperature, divergence):
        return true(student_SC, teacher, temperature, divergence) / temperature**2

    monkeypatch.setattr(distill.objective.fused, "bucket_divergence", without_square)
    assert "it lacks the factor T² = 4" in faults(toys, "fused = plain")["fused = plain"]


def test_a_mean_of_means_is_found(toys, monkeypatch):
    true = distill.objective.weighing.weigh

    def by_its_own_counts(terms, m, loss, weights, totals):
        return true(terms, m, loss, weights, distill.objective.weighing.count(terms, m))

    monkeypatch.setattr(distill.doctor.objective, "weigh", by_its_own_counts)
    assert "a mean is taken in each part" in faults(toys, "splits")["splits"]


def test_a_renormalized_tail_is_found_in_the_loss(toys, monkeypatch):
    def renormalized(student_SC, teacher, temperature, divergence):
        teacher_SK = teacher.logprobs_SK.log_softmax(-1)
        return temperature**2 * divergence(student_SC[:, :-1], teacher_SK).sum(-1)

    monkeypatch.setattr(distill.objective.fused, "bucket_divergence", renormalized)
    found = faults(toys, "KL(teacher‖teacher)", "fused = plain")
    assert "dropped or renormalized" in found["KL(teacher‖teacher)"]
    assert "look for renormalized targets" in found["fused = plain"]


def test_a_renormalized_tail_is_found_in_the_targets(toys, monkeypatch):
    true = Distribution.at

    def renormalized(self, temperature):
        ids_SK, logprobs_SK, residual_S = true(self, temperature)
        return Sparse(ids_SK, logprobs_SK.log_softmax(-1), torch.full_like(residual_S, -torch.inf))

    monkeypatch.setattr(Distribution, "at", renormalized)
    assert "the tail was renormalized" in faults(toys, "cache")["cache"]


def test_a_stale_cache_is_found(toys, tmp_path, capsys):
    tiny.make_parts(tmp_path / "parts", seed=5)
    tiny.save_teacher(tmp_path / "parts", tmp_path / "teacher")
    assert doctor(load_config(toys / "toy.yaml", [f"teacher.path={tmp_path / 'teacher'}"])) == 1
    line = capsys.readouterr().out
    assert line.startswith("FAIL  set up") and "was cached as" in line


def test_targets_that_are_another_teachers_are_found_though_the_header_agrees(toys):
    case = build_case(load_config(toys / "toy.yaml"))
    with torch.no_grad():
        case.teacher.project.weight.mul_(3.0)
        case.teacher.llm.lm_head.weight.mul_(3.0)
    found = failing(case, "cache")
    assert "the cache is stale or of another teacher" in found["cache"]


def test_a_frozen_lora_is_found(toys, monkeypatch):
    case = build_case(load_config(toys / "toy.yaml"))
    name, parameter = next((n, p) for n, p in case.student.named_parameters() if "lora_A" in n)
    parameter.requires_grad_(False)
    found = failing(case, "gradients")
    assert f"{name} is frozen" in found["gradients"]


@pytest.mark.parametrize(
    ("name", "num_queries", "is_zero"),
    [
        ("student.qformer.qformer.encoder.layer.0.attention.attention.query.weight", 1, True),
        ("student.qformer.qformer.encoder.layer.0.attention.attention.query.weight", 2, False),
        ("student.qformer.qformer.encoder.layer.0.attention.attention.value.weight", 1, False),
        ("student.qformer.qformer.encoder.layer.0.crossattention.attention.query.weight", 1, False),
        ("student.qformer.qformer.encoder.layer.0.crossattention.attention.key.bias", 2, True),
        ("student.llm.model.layers.0.self_attn.q_proj.lora_B.default.weight", 1, False),
    ],
)
def test_only_what_no_score_depends_on_may_have_no_gradient(name, num_queries, is_zero):
    assert distill.doctor.objective.is_zero_by_arithmetic(name, num_queries) == is_zero


def test_a_detached_lora_is_found(toys):
    case = build_case(load_config(toys / "toy.yaml"))
    name, parameter = next((n, p) for n, p in case.student.named_parameters() if "lora_B" in n)
    parameter.register_hook(torch.zeros_like)
    found = failing(case, "gradients")
    assert f"{name} is zero" in found["gradients"]


@pytest.mark.parametrize("pad_id, message", [(10_000, "the embeddings have"), (300, "a token of texts")])
def test_a_wrong_pad_id_is_found(toys, pad_id, message):
    case = build_case(load_config(toys / "toy.yaml"))
    case.student.rows.pad_id = pad_id
    found = failing(case, "padding")
    assert message in found["padding"]


def test_padding_that_is_attended_is_found(toys, monkeypatch):
    def attended(batch):
        return dataclasses.replace(batch, attention_mask_BT=torch.ones_like(batch.attention_mask_BT))

    plant_in_collate(monkeypatch, attended)
    assert "padding must not be attended" in faults(toys, "rows")["rows"]


def test_an_answer_without_its_end_token_is_found(toys, monkeypatch):
    def without_end(batch):
        is_end_S = batch.labels_S == batch.rows[0].answer[-1]
        return dataclasses.replace(batch, labels_S=batch.labels_S[~is_end_S], row_S=batch.row_S[~is_end_S],
                                   predicting_S=batch.predicting_S[~is_end_S])  # fmt: skip

    plant_in_collate(monkeypatch, without_end)
    assert "answers never end" in faults(toys, "end token")["end token"]
