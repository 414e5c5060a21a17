"""SALMONN's checkpoints: the reference's tiny model gives the reference's numbers, and ours load back identical."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_beats import TINY as TINY_BEATS
from test_beats import make_official
from transformers import AutoTokenizer

from distill.caching.identity import describe_teacher
from distill.config import Config, TeacherConfig
from distill.demo.scratch import build_llm
from distill.demo.tokenizer import train_tokenizer
from distill.teacher import load_teacher
from shards.sample import Sample
from students.hearing import Connector
from students.student import build_student
from teachers.ears.beats import BeatsEar
from teachers.files.checkpoint import load_checkpoint, our_name, save_checkpoint, their_name
from teachers.files.loading import build_salmonn, load_salmonn, save_salmonn
from teachers.lora import Lora
from teachers.salmonn import Salmonn, SalmonnConfig


@pytest.fixture(scope="module")
def reference(shared: Path, tmp_path_factory):
    """The tiny SALMONN of the reference, its tensors and its scenarios."""
    folder = shared / "parity" / "salmonn"
    model, report = load_checkpoint(
        folder / "tiny_salmonn_checkpoint.pth", llm=str(folder / "tiny_llama"), whisper=str(folder / "tiny_whisper"),
        second=str(shared / "parity" / "beats" / "tiny_beats_finetuned.pt"), second_kind="beats", qformer_heads=4,
        prompts=str(folder / "prompts.json"),
    )  # fmt: skip
    scenarios = json.loads((folder / "scenarios.json").read_text())["scenarios"]
    return model, report, load_file(folder / "tiny_salmonn_io.safetensors"), scenarios


def samples_of(name: str, tensors, scenario) -> list[Sample]:
    clips = {"A0": ["gunshots"], "A1": ["mountain"], "B": ["gunshots", "duck"]}[name]
    waveforms = [tensors[f"pcm.{clip}"].float().numpy() / 32768 for clip in clips]
    rows = zip(waveforms, scenario["text"], scenario["task"])
    return [Sample(f"{name}{i}", w, text, task, None, "", "") for i, (w, text, task) in enumerate(rows)]


def relative(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.shared
@pytest.mark.parametrize("name", ["A0", "A1", "B"])
@torch.no_grad()
def test_loss_logits_and_audio_tokens_are_the_references(reference, name):
    model, _, tensors, scenarios = reference
    batch = model.collate(samples_of(name, tensors, scenarios[name]))
    heard = model.hear(batch)
    embeds_BLD = model.project(heard.queries_BWQE).flatten(1, 2)
    assert relative(embeds_BLD, tensors[f"{name}.speech_embeds"]) < 1e-5
    hidden_SD = model.answer_states(batch, heard)
    # the original adds a [PAD] row to the head, which takes part in its softmax
    logits_SV = torch.cat([model.llm.lm_head(hidden_SD), hidden_SD @ tensors["pad_row"].T], -1)
    for b, row in enumerate(scenarios[name]["rows"]):
        assert batch.rows[b].answer == row["target_ids"]
        assert relative(logits_SV[batch.row_S == b], tensors[f"{name}.answer_logits{b}"]) < 1e-4
    loss = torch.nn.functional.cross_entropy(logits_SV, batch.labels_S)
    assert float(loss) == pytest.approx(scenarios[name]["loss"], rel=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["A0", "A1", "B"])
def test_greedy_ids_are_the_references(reference, name):
    model, _, tensors, scenarios = reference
    batch = model.collate(samples_of(name, tensors, scenarios[name]), with_answer=False, first_prompt=True)
    assert model.generate_ids(batch, max_new_tokens=24) == scenarios[name]["greedy_eos_only"]


@pytest.mark.shared
def test_every_key_is_accounted_for(reference):
    report = reference[1]
    assert len(report.leftover) == 4
    assert len(report.frozen) == 3
    assert any("lora_A" in key for key in report.loaded)


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    torch.manual_seed(0)
    torch.save(make_official(BeatsEar.from_config(TINY_BEATS)), folder / "beats.pt")
    return folder


def make_salmonn(parts: Path, targets=("q_proj", "v_proj"), **settings) -> Salmonn:
    """A tiny SALMONN with LoRA whose matrices are not zero, on tiny ears of a second and a half."""
    torch.manual_seed(1)
    fields = {"qformer_width": 32, "qformer_layers": 1, "qformer_heads": 2, "qformer_ffn": 64, **settings}
    config = SalmonnConfig(llm=str(parts / "llm"), whisper=str(parts / "whisper"), **fields)
    model = build_salmonn(config, lora=Lora(rank=4, alpha=12, targets=targets) if targets else None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def logits_of(model: Salmonn) -> torch.Tensor:
    with torch.no_grad():
        return model(model.collate([tiny.make_sample(1), tiny.make_sample(2, text="nine", seconds=1.1)]))[0]


def names_of(parts: Path) -> dict[str, str]:
    return {"llm": str(parts / "llm"), "whisper": str(parts / "whisper")}


VARIANTS = {
    "speech alone": {},
    "without LoRA": {"targets": ()},
    "LoRA on seven": {"targets": SEVEN},
    "three queries": {"num_queries": 3},
    "overlapping windows": {"window_seconds": 0.5, "stride_seconds": 0.2},
    "no windows": {"window_seconds": 0.0, "stride_seconds": 0.0},
    "another template and end": {"template": "Q: {}\nA:", "end_token": "</s>", "max_answer_tokens": 3},
}


@pytest.mark.parametrize("beats", [False, True], ids=["whisper", "beats"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_alone_brings_a_model_back_with_identical_logits(parts, tmp_path, variant, beats):
    second = {"second": str(parts / "beats.pt"), "second_kind": "beats"} if beats else {}
    model = make_salmonn(parts, **VARIANTS[variant], **second)
    save_checkpoint(model, tmp_path / "salmonn.pth")
    loaded, report = load_checkpoint(tmp_path / "salmonn.pth", **names_of(parts), **second)
    end_token = model.config.end_token or model.tokenizer.eos_token
    assert loaded.config == dataclasses.replace(model.config, end_token=end_token)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert len(report.loaded) == sum(their_name(n) is not None for n, _ in model.named_parameters())


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), SEVEN], ids=["two", "seven"])
@pytest.mark.parametrize(("old", "new"), [(".default.weight", ".weight"), ("base_model.model.", "")])
def test_lora_loads_under_old_and_new_names_of_peft(parts, tmp_path, targets, old, new):
    model = make_salmonn(parts, targets)
    save_checkpoint(model, tmp_path / "salmonn.pth")
    content = torch.load(tmp_path / "salmonn.pth", weights_only=True)
    renamed = {key.replace(old, new) if "lora_" in key else key: x for key, x in content["model"].items()}
    assert renamed.keys() != content["model"].keys()
    torch.save({"model": renamed, "config": content["config"]}, tmp_path / "salmonn.pth")
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "salmonn.pth", **names_of(parts))[0]), logits_of(model))


def test_leftovers_of_the_trainer_are_named_and_not_loaded(parts, tmp_path):
    model = make_salmonn(parts)
    save_checkpoint(model, tmp_path / "salmonn.pth")
    content = torch.load(tmp_path / "salmonn.pth", weights_only=True)
    leftovers = ["speech_Qformer.bert.embeddings.position_ids", "llama_model.base_model.model.lm_head.weight",
                 "beats.encoder.layers.1.self_attn.relative_attention_bias.weight",
                 "llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"]  # fmt: skip
    content["model"] |= {key: torch.zeros(2) for key in leftovers}
    torch.save(content, tmp_path / "salmonn.pth")
    loaded, report = load_checkpoint(tmp_path / "salmonn.pth", **names_of(parts))
    assert report.leftover == leftovers and torch.equal(logits_of(loaded), logits_of(model))
    assert f"llm ({parts / 'llm'})" in str(report) and "4 leftovers" in str(report)


@pytest.mark.shared
def test_a_saved_checkpoint_has_the_references_names_and_shapes(reference, shared, tmp_path):
    save_checkpoint(reference[0], tmp_path / "salmonn.pth")
    saved = torch.load(tmp_path / "salmonn.pth", weights_only=True)["model"]
    theirs = torch.load(shared / "parity/salmonn/tiny_salmonn_checkpoint.pth", weights_only=True)["model"]
    assert saved.keys() == {key for key in theirs if our_name(key) is not None}
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in saved.items())


@pytest.mark.shared
@torch.no_grad()
def test_bfloat16_logits_stay_within_two_hundredths(reference):
    model, _, tensors, scenarios = reference
    batch = model.collate(samples_of("A1", tensors, scenarios["A1"]))
    expected = model(batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(batch)[0], expected) < 2e-2


def test_a_demo_teacher_saved_in_salmonns_format_loads_back_to_identical_logits(parts, tmp_path):
    model = tiny.make_teacher(parts, lora=True, windows="audio").eval()
    save_checkpoint(model, tmp_path / "salmonn.pth")
    loaded, _ = load_checkpoint(tmp_path / "salmonn.pth", **names_of(parts), windows="audio")
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"conv.weight": torch.zeros(2)}}, r"holds no SALMONN: speech_query_tokens is missing"),
        ({"weights": {}}, r"holds no SALMONN"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "other.pth", llm="", whisper="")


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    tiny.make_parts(tmp_path)
    save_checkpoint(tiny.make_teacher(tmp_path), tmp_path / "salmonn.pth")
    state = torch.load(tmp_path / "salmonn.pth", weights_only=True)
    state["model"]["speech_llama_proj2.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "salmonn.pth")
    with pytest.raises(ValueError, match=r"holds 1 tensors that no SALMONN has \(speech_llama_proj2\.weight\)"):
        load_checkpoint(tmp_path / "salmonn.pth", llm=str(tmp_path / "llm"), whisper=str(tmp_path / "whisper"))


class Boom:
    """What unpickling runs."""

    def __reduce__(self):
        return (Path("marker").touch, ())


def test_a_file_that_holds_code_is_refused_and_its_code_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"speech_query_tokens": Boom()}}, tmp_path / "salmonn.pth")
    with pytest.raises(ValueError, match=r"salmonn\.pth holds Python objects .*take the file from its authors"):
        load_checkpoint(tmp_path / "salmonn.pth", llm="", whisper="")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(parts, tmp_path, kept):
    save_checkpoint(make_salmonn(parts), tmp_path / "salmonn.pth")
    data = (tmp_path / "salmonn.pth").read_bytes()
    (tmp_path / "salmonn.pth").write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(
        ValueError, match=r"salmonn\.pth (is \d+ bytes, but .*download it again|holds Python objects or)"
    ):
        load_checkpoint(tmp_path / "salmonn.pth", **names_of(parts))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("ln_speech.weight", r"holds nothing for ln_speech\.weight, but these parts need \(64,\); check llm, whisper"),
        ("speech_Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", r"but every SALMONN's Q-Former has"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(parts, tmp_path, key, message):
    save_checkpoint(make_salmonn(parts), tmp_path / "salmonn.pth")
    content = torch.load(tmp_path / "salmonn.pth", weights_only=True)
    del content["model"][key]
    torch.save(content, tmp_path / "salmonn.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "salmonn.pth", **names_of(parts))


@pytest.mark.parametrize(
    ("lost", "added", "message"),
    [
        ("speech_query_tokens", "", r"holds no speech_query_tokens, as where .* frozen in training.* from first\.pth"),
        ("speech_llama_proj.weight", "", r"holds no speech_llama_proj\.weight, as where .* frozen in training"),
        ("", "speech_encoder.conv1.weight", r"holds tensors of Whisper, .*trained too, but ears are read from files"),
        ("", "beats.encoder.layer_norm.bias", r"holds tensors of BEATs, .*trained too, but ears are read from files"),
    ],
)
def test_a_training_that_froze_the_connector_or_trained_the_ears_is_refused_by_what_it_did(
    parts, tmp_path, lost, added, message
):
    save_checkpoint(make_salmonn(parts), tmp_path / "c.pth")
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    content["model"] = {key: x for key, x in content["model"].items() if key != lost} | (
        {added: torch.zeros(3)} if added else {}
    )
    content["config"]["model"]["ckpt"] = "first.pth"
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "c.pth", **names_of(parts))


def test_parts_of_another_width_are_refused(parts, tmp_path):
    save_checkpoint(make_salmonn(parts), tmp_path / "salmonn.pth")
    with pytest.raises(ValueError, match=r"holds \(4, 64\) for llm.*lora_A.*, but these parts need \(4, 32\)"):
        load_checkpoint(tmp_path / "salmonn.pth", llm=str(parts / "student-llm"), whisper=str(parts / "whisper"))
    with pytest.raises(ValueError, match=r"holds nothing for ln_audio\.bias, but these parts need"):
        load_checkpoint(
            tmp_path / "salmonn.pth", **names_of(parts), second=str(parts / "beats.pt"), second_kind="beats"
        )


def test_a_whisper_of_another_mel_count_than_the_trained_one_is_refused(parts, tmp_path):
    save_checkpoint(make_salmonn(parts), tmp_path / "salmonn.pth")
    content = torch.load(tmp_path / "salmonn.pth", weights_only=True)
    content["config"]["model"]["whisper_path"] = "openai/whisper-large-v3-turbo"
    torch.save(content, tmp_path / "salmonn.pth")
    with pytest.raises(
        ValueError, match=r"whisper has 80 mel bins, but .* was trained on whisper-large-v3-turbo with 128"
    ):
        load_checkpoint(tmp_path / "salmonn.pth", **names_of(parts))


@pytest.fixture(scope="module")
def without_bos(parts):
    """The toys' LLM with a tokenizer that has no BOS, as Qwen's."""
    folder = parts / "llm-without-bos"
    shutil.copytree(parts / "llm", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    return {"llm": str(folder), "whisper": str(parts / "whisper")}


def test_a_file_that_does_not_say_its_bos_is_refused_where_its_llm_has_none(parts, without_bos, tmp_path):
    save_checkpoint(make_salmonn(parts), tmp_path / "theirs.pth")
    content = torch.load(tmp_path / "theirs.pth", weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "theirs.pth")
    sizes = {"qformer_heads": 2}
    with pytest.raises(
        ValueError, match=r"theirs\.pth does not say what begins .* set teacher\.bos_token .*, or to none"
    ):
        load_checkpoint(tmp_path / "theirs.pth", **without_bos, **sizes)
    assert "prompts begin with <s> (from the tokenizer)" in str(
        load_checkpoint(tmp_path / "theirs.pth", **names_of(parts), **sizes)[1]
    )
    sample, pad = tiny.make_sample(1), AutoTokenizer.from_pretrained(without_bos["llm"]).pad_token
    for bos_token, said in ((pad, f"{pad} (from teacher.bos_token)"), ("none", "no BOS (from teacher.bos_token)")):
        model, report = load_checkpoint(tmp_path / "theirs.pth", **without_bos, **sizes, bos_token=bos_token)
        assert f"prompts begin with {said}" in str(report)
        before = model.rows.row(sample, with_answer=True, first_prompt=True).before
        assert (before[0] == model.tokenizer.pad_token_id) == (bos_token == pad)
        save_checkpoint(model, tmp_path / "ours.pth")
        again = load_checkpoint(tmp_path / "ours.pth", **without_bos)[0]
        assert again.config.bos_token == bos_token and torch.equal(logits_of(again), logits_of(model))
    with pytest.raises(ValueError, match=r"bos_token is '<bos>', but .* has no such token; set teacher\.bos_token"):
        load_checkpoint(tmp_path / "theirs.pth", **without_bos, **sizes, bos_token="<bos>")


def test_a_forced_bos_is_part_of_a_saved_teacher_and_of_its_cache_and_of_a_student_of_the_same_tokens(
    parts, without_bos, tmp_path
):
    model = make_salmonn(parts, ())
    model = build_salmonn(dataclasses.replace(model.config, llm=without_bos["llm"], bos_token="none")).eval()
    pad = model.tokenizer.pad_token
    other = train_tokenizer(["USER: zero ASSISTANT: a low tone"] * 9, tmp_path / "other", vocab_size=300)
    build_llm(len(other), 32, 1, other).save_pretrained(tmp_path / "other")
    headers = []
    for bos_token in ("none", pad):
        model = build_salmonn(dataclasses.replace(model.config, bos_token=bos_token))
        save_salmonn(model, tmp_path / "saved")
        assert load_salmonn(tmp_path / "saved").config.bos_token == bos_token
        headers.append(describe_teacher(model, Config()).identity["teacher_config"]["bos_token"])
        alike = build_student(model, without_bos["llm"], quantization="none", connector=Connector("new"))
        assert alike.config.bos_token == bos_token and alike.rows.bos_ids == model.rows.bos_ids
        student = build_student(model, str(tmp_path / "other"), quantization="none", connector=Connector("new"))
        assert student.rows.bos_ids == [other.bos_token_id]
    assert headers == ["none", pad]


def test_a_beats_file_is_no_salmonn(parts):
    with pytest.raises(ValueError, match=r"beats\.pt holds no SALMONN: speech_query_tokens is missing under 'model'"):
        load_checkpoint(parts / "beats.pt", **names_of(parts))


def test_a_checkpoint_that_a_full_disk_does_not_take_leaves_nothing(parts, tmp_path):
    with (
        tiny.full_disk(20_000),
        pytest.raises(OSError, match=r"salmonn\.pth cannot be written \(File too large\), but .*; free space"),
    ):
        save_checkpoint(make_salmonn(parts), tmp_path / "salmonn.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", range(0, 256, 5))
def test_garbage_is_refused_whatever_it_begins_with(tmp_path, first):
    data = bytes([first]) + random.Random(first).randbytes(200)
    (tmp_path / "salmonn.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"salmonn\.pth (is 201 bytes, but|holds)"):
        load_checkpoint(tmp_path / "salmonn.pth", llm="", whisper="")


@pytest.mark.parametrize("name", ["llm", "whisper"])
def test_a_checkpoint_whose_frozen_parts_are_not_named_is_refused(parts, tmp_path, name):
    save_checkpoint(make_salmonn(parts), tmp_path / "salmonn.pth")
    teacher = TeacherConfig(path=str(tmp_path / "salmonn.pth"), **{**names_of(parts), name: ""})
    with pytest.raises(ValueError, match=rf"teacher\.{name} is empty, but \S*salmonn\.pth is a checkpoint without its"):
        load_teacher(Config(teacher=teacher))
