"""What can be added is one file and one line: a toy of each kind, put into the dict of its kind, does as the others do.

`benchmarks/house.py` counts the lines, the `monkeypatch.setitem` of each test.
"""

import json

import pytest
import tiny
import torch
import toys

from distill.cli import main
from distill.commandline.commands import COMMANDS, Command
from distill.config import Config, StudentConfig, TeacherConfig, TrainConfig
from distill.distiller import Distiller
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import METRICS, mean_error, retained_quality, score
from distill.evaluation.scorecard import ModelFigures, Scorecard, explain_scores, score_rows
from distill.sizes.costs import Blueprint, Usage, describe_teacher, measure
from distill.teacher import load_teacher
from shards.manifests.datasets.dataset import Dataset
from shards.manifests.datasets.table import DATASETS
from shards.manifests.manifest import read_manifest
from students.device.modules import list_pieces
from students.hearing import Hearing
from students.student import build_student
from teachers.ears.encoders import ENCODERS
from teachers.files.loading import load_salmonn, save_salmonn
from teachers.kinds import KINDS
from teachers.lora import Lora

OPTIONS = TrainConfig(steps=1, batch_size=4, micro_batch_size=4, warmup_steps=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adding")
    tiny.make_toys(folder)
    return folder


def train_a_step(folder, tmp_path, model, **hearing):
    """The losses of a step of a student of this teacher."""
    student = build_student(model, str(folder / "parts" / "student-llm"), lora=Lora(rank=4), hearing=Hearing(**hearing))
    data = folder / "data" / "train"
    return Distiller(model, student, train=data, options=OPTIONS, run=tmp_path / "run").fit().losses, student


def test_a_toy_encoder_is_one_line_and_is_heard_saved_and_counted(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, "toy", "toys:ToyEar")
    (tmp_path / "toy.pt").write_bytes(b"weights")
    ears = {"second": str(tmp_path / "toy.pt"), "second_kind": "toy"}
    assert StudentConfig(**ears).second_kind == "toy"
    losses, student = train_a_step(folder, tmp_path, load_salmonn(folder / "teacher"), **ears)
    assert losses[0] > 0 and isinstance(student.second, toys.ToyEar)
    teacher = tiny.make_teacher(folder / "parts", **ears)
    save_salmonn(teacher, tmp_path / "saved")
    assert torch.equal(load_salmonn(tmp_path / "saved").second.project.weight, teacher.second.project.weight)
    table = {part.name: part for part in measure(Blueprint(teacher.config, None, torch.float32), Usage())}
    assert table["Toy ear"].parameters == 320 * 8 + 8 and table["Toy ear"].flops > 0
    with pytest.raises(ValueError, match="second encoder of this student is Toy ear, but a graph is fed with a filter"):
        list(list_pieces(teacher))


def test_a_toy_metric_is_one_line_and_is_scored_retained_shown_and_chooses_the_best(monkeypatch):
    monkeypatch.setitem(METRICS, "first_word", toys.FIRST_WORD)
    texts = ["one two", "two one", "one six"]
    said = [Prediction(str(n), "toy_task", "toys", (text,), "one four") for n, text in enumerate(texts)]
    scores = score(said)
    assert scores["toy_task"].metric == "first_word" and scores["toy_task"].value == pytest.approx(2 / 3)
    assert mean_error(scores) == pytest.approx(1 / 3)
    assert retained_quality(said, said).keys() <= {"toy_task"}
    teacher, student = (ModelFigures(name, 1, scores) for name in ("teacher", "student"))
    card = Scorecard.from_json(Scorecard("toy", teacher, student).to_json())
    assert [row[:2] for row in score_rows(card)] == [("toy_task: first word ↑", "66.7% [0.0, 100.0]")]
    assert "toy_task" in "".join(explain_scores(card))


def test_a_toy_teacher_kind_is_one_line_and_teaches(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "toy", toys.ToyTeachers)
    (tmp_path / "teacher.toy").write_text(str(folder / "parts"))
    config = Config(teacher=TeacherConfig(path=str(tmp_path / "teacher.toy")))
    losses, _ = train_a_step(folder, tmp_path, load_teacher(config))
    assert losses[0] > 0
    assert describe_teacher(config)[0].kind == "toy"


def test_a_toy_data_set_is_one_line_and_becomes_a_manifest(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "toy", Dataset(toys.read_toy_dataset, ("asr",)))
    (tmp_path / "labels.txt").write_text("a.wav one two\n")
    words = ["manifest", "toy", str(tmp_path / "labels.txt"), str(tmp_path / "m.json"), "--audio", str(tmp_path)]
    assert main(words) == 0
    assert [entry.text for entry in read_manifest(tmp_path / "m.json")] == ["one two"]
    assert json.loads((tmp_path / "m.json").read_text())["annotation"][0]["task"] == "asr"


def test_a_toy_command_is_one_line_and_has_help_and_completion(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "toy", Command("toys", "says a word"))
    assert main(["toy", "hello"]) == 0 and "toy says hello" in capsys.readouterr().out
    main(["completion", "bash", "--", "to"])
    assert capsys.readouterr().out.split() == ["toy"]
    main(["--help"])
    assert "says a word" in capsys.readouterr().out
