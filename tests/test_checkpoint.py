"""SALMONN's checkpoints: the reference's tiny model gives the reference's numbers, and ours load back identical."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from shards.sample import Sample
from teachers.checkpoint import load_checkpoint, save_checkpoint


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


def test_a_model_saved_in_salmonns_format_loads_back_to_identical_logits(tmp_path):
    tiny.make_parts(tmp_path)
    model = tiny.make_teacher(tmp_path, lora=True).eval()
    save_checkpoint(model, tmp_path / "salmonn.pth")
    loaded, report = load_checkpoint(
        tmp_path / "salmonn.pth", llm=str(tmp_path / "llm"), whisper=str(tmp_path / "whisper"), qformer_heads=2,
        lora_alpha=8,
    )  # fmt: skip
    batch = model.collate([tiny.make_sample(1), tiny.make_sample(2, text="nine")])
    with torch.no_grad():
        assert torch.equal(model(batch)[0], loaded(batch)[0])
    assert not report.leftover


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
