"""An exported student answers as the trained one did, wherever its folder is moved."""

import json
import re
from pathlib import Path

import pytest
import soundfile
import tiny
import torch

from distill.cli import main
from distill.config import load_config
from distill.evaluation.metrics.scores import TaskScore
from distill.evaluation.scorecard import ModelFigures, Scorecard, write_scorecard
from distill.export import export, place_parts
from distill.run import run
from students.hearing import Connector
from students.student import build_student, load_student, save_student
from teachers.files.checkpoint import load_checkpoint
from teachers.files.loading import load_salmonn, save_salmonn
from teachers.lora import Lora
from teachers.salmonn import SalmonnConfig

SAMPLES = [tiny.make_sample(1), tiny.make_sample(2, seconds=1.1)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with a 4-bit student whose projector was trained."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_parts(folder / "parts")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    tiny.make_shards(folder / "data", num_samples=6)
    path = tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts",
                             loss__hidden=1.0, loss__hidden_kind="mse", teacher__online=True,
                             train__learning_rate=0.02)  # fmt: skip
    config = load_config(path)
    assert run(config) == 0
    return config.run_folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(model.collate(SAMPLES))[0]


def test_an_export_with_lora_is_the_student_without_what_training_needed(finished, tmp_path):
    assert main(["export", str(finished), str(tmp_path / "out"), "--salmonn"]) == 0
    student, exported = load_student(finished / "student"), load_student(tmp_path / "out")
    assert torch.equal(logits(exported), logits(student))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "salmonn.pth", "tokenizer"}


def test_a_merged_export_has_the_students_logits_and_can_be_moved(finished, tmp_path):
    export(finished, tmp_path / "out", merge=True)
    (tmp_path / "out").rename(tmp_path / "moved")
    student, exported = load_student(finished / "student"), load_student(tmp_path / "moved")
    torch.testing.assert_close(logits(exported), logits(student), atol=1e-4, rtol=1e-4)
    names = [name for name, _ in exported.named_parameters()]
    assert not any("lora" in name for name in names)
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["model"]["llm"] == "./llm"


@pytest.mark.parametrize("words", [["--whole"], ["--whole", "--merge"], []], ids=["whole", "whole-merged", "named"])
def test_an_export_answers_in_another_folder_under_another_home(finished, tmp_path, monkeypatch, capsys, words):
    toys = finished.parents[1]
    hidden = toys.with_name(f"{toys.name}-hidden")
    monkeypatch.chdir(toys)
    assert main(["export", str(finished), str(tmp_path / "out"), *words]) == 0
    expected = logits(load_student(finished / "student"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    soundfile.write("a.wav", tiny.tone(1), 16_000)
    if words:  # all of the machine that made it is gone
        toys.rename(hidden)
    try:
        torch.testing.assert_close(logits(load_student("../moved")), expected, atol=1e-4, rtol=1e-4)
        assert main(["transcribe", "../moved", "a.wav"]) == 0
    finally:
        if words:
            hidden.rename(toys)
    names = json.loads((tmp_path / "moved" / "config.json").read_text())["model"]
    assert [Path(names[part]).is_absolute() for part in ("llm", "whisper")] == [not words] * 2


def test_a_whole_export_holds_a_second_ear_of_one_file_and_the_prompts(tmp_path):
    (tmp_path / "beats.pt").write_bytes(b"weights")
    (tmp_path / "prompts.json").write_text("{}")
    out, prompts = tmp_path / "out", str(tmp_path / "prompts.json")
    config = SalmonnConfig("", "", second=str(tmp_path / "beats.pt"), second_kind="beats", prompts=prompts,
                           eval_prompts=prompts)  # fmt: skip
    placed = place_parts(config, out, whole=True)
    assert (placed.second, placed.prompts) == (str(out / "second/beats.pt"), str(out / "prompts/prompts.json"))
    assert placed.eval_prompts == str(out / "eval_prompts/prompts.json")
    assert (out / "second/beats.pt").read_bytes() == b"weights"


def test_a_folders_own_relative_names_are_of_the_folder_it_was_trained_in(finished, tmp_path, monkeypatch):
    """`student.llm=./llm` is a place below where training began, no part inside the saved folder."""
    monkeypatch.chdir(finished.parents[1] / "parts")
    teacher = load_salmonn(finished.parents[1] / "teacher")
    student = build_student(teacher, "./student-llm", lora=Lora(rank=4), connector=Connector("new"))
    save_student(student, tmp_path / "student", lora=Lora(rank=4), quantization="nf4")
    assert load_student(tmp_path / "student").config.llm == "student-llm"


def test_salmonns_own_format_gives_the_students_connector_back(finished, tmp_path):
    export(finished, tmp_path / "out", merge=True, salmonn=True)
    student = load_student(finished / "student")
    again, _ = load_checkpoint(tmp_path / "out" / "salmonn.pth", llm=str(tmp_path / "out" / "llm"),
                               whisper=student.config.whisper)  # fmt: skip
    torch.testing.assert_close(again.project.weight, student.project.weight)


def test_the_model_card_shows_the_scores_beside_the_teachers(finished, tmp_path):
    score = {"asr": TaskScore(metric="wer", value=0.125, low=0.1, high=0.15, num_samples=40)}
    card = Scorecard("toy", ModelFigures("teacher", 10, score), ModelFigures("student", 5, score))
    write_scorecard(card, finished)
    text = (export(finished, tmp_path / "out") / "README.md").read_text()
    (finished / "scorecard.json").unlink()
    assert "| asr: WER ↓ | 12.5% [10.0, 15.0] | 12.5% [10.0, 15.0] |" in text and "asr 40" in text


def test_the_card_of_an_export_says_how_it_is_loaded(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_clip(tmp_path / "recording.wav")
    folder = export(finished, tmp_path / "out")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("path/to/this/folder", "out"), names)
    assert capsys.readouterr().out == f"{names['student'].transcribe('recording.wav').text}\n"


def test_an_export_does_not_write_over_files_and_needs_a_finished_run(finished, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="an export starts empty"):
        export(finished, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("merge", [False, True])
def test_ears_that_the_teacher_trained_are_saved_with_the_student(finished, tmp_path, merge):
    parts = finished.parents[1] / "parts"
    teacher = tiny.make_teacher(parts)
    teacher.whisper.requires_grad_(True)
    with torch.no_grad():
        for parameter in teacher.whisper.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_salmonn(teacher, tmp_path / "teacher")
    lora = Lora(rank=4)
    student = build_student(
        load_salmonn(tmp_path / "teacher"), str(parts / "student-llm"), lora=lora, connector=Connector("new")
    )
    save_student(student.eval(), tmp_path / "run" / "student", lora=lora, quantization="nf4")
    exported = load_student(export(tmp_path / "run", tmp_path / "out", merge=merge))
    torch.testing.assert_close(logits(exported), logits(student), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(3_000, ["--merge", "--salmonn"]), (100_000, ["--merge", "--salmonn"]), (3_000, ["--whole"])],
    ids=["LLM", "connector", "part"],
)
def test_an_export_that_a_full_disk_does_not_take_leaves_nothing_and_can_be_repeated(
    finished, tmp_path, capsys, num_bytes, words
):
    command = ["export", str(finished), str(tmp_path / "out"), *words]
    with tiny.full_disk(num_bytes):
        assert main(command) == 1
    assert re.search(
        r"(?m)^error: \S*out\S* cannot be written \(File too large\), but .*; free space", capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
    assert main(command) == 0
