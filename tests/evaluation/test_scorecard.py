"""The last stage: what is checked first, what is kept for the next student, and what does not stop it."""

import json
import tarfile
from functools import partial

import pytest
import tiny

from distill.cache import cache
from distill.cli import main
from distill.config import load_config
from distill.evaluation import evaluate as scorecard
from distill.evaluation.answer_cache import FOLDER
from distill.evaluation.evaluate import evaluate_run
from distill.run import run
from shards.status import QUIET
from shards.tars.tarwriter import TarWriter


def spoil_first_clip(folder) -> None:
    """Make the first clip of a split's only shard one that no decoder reads."""
    path = next(folder.glob("*.tar"))
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    for leftover in [*folder.glob("*.idx"), folder / "index.json", path]:
        leftover.unlink()
    writer = TarWriter(path)
    for number, (name, data) in enumerate(members):
        writer.add(name, bytes(len(data)) if number == 0 else data)
    writer.close()


@pytest.fixture(autouse=True)
def clocked_once(monkeypatch):
    monkeypatch.setattr(scorecard, "measure_cost", partial(scorecard.measure_cost, runs=1))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, student__quantization="none", train__steps=1, eval__max_new_tokens=3)
    tiny.make_shards(folder / "data", split="test", num_samples=3)
    spoil_first_clip(folder / "data" / "test")
    cache(load_config(folder / "toy.yaml"))
    for name in ("a", "b"):
        assert run(load_config(folder / "toy.yaml", [f"name={name}", f"seed={len(name)}"])) == 0
    return folder


def test_a_missing_student_is_said_before_the_teacher_is_loaded_or_a_folder_made(toys, monkeypatch):
    monkeypatch.setattr(scorecard, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    with pytest.raises(
        FileNotFoundError, match=r"runs/none/student, but there is no saved student; finish `distill run"
    ):
        evaluate_run(load_config(toys / "toy.yaml", ["name=none"]))
    assert not (toys / "runs" / "none").exists()


def test_the_next_student_meets_the_teachers_answers_again_and_with_other_options_it_answers_anew(
    toys, monkeypatch, capsys
):
    first = evaluate_run(load_config(toys / "toy.yaml", ["name=a"]))
    assert first.teacher.scores and "used again" not in capsys.readouterr().err
    loads, load = [], scorecard.load_teacher
    monkeypatch.setattr(scorecard, "load_teacher", lambda config: loads.append(config) or load(config))
    second = evaluate_run(load_config(toys / "toy.yaml", ["name=b"]))
    assert second.teacher == first.teacher and loads == []
    assert "teacher: its answers are in " in capsys.readouterr().err
    (kept,) = (toys / "data" / "cache" / FOLDER).glob("*.json")
    kept.write_text('{"answers": [null], "cost": {}}')  # damaged: made again
    assert evaluate_run(load_config(toys / "toy.yaml", ["name=b"])).teacher.scores == first.teacher.scores
    assert len(loads) == 1
    evaluate_run(load_config(toys / "toy.yaml", ["name=b", "eval.max_new_tokens=2"]))
    assert len(loads) == 2


def test_clips_that_cannot_be_read_are_left_out_of_the_answers(toys):
    evaluate_run(load_config(toys / "toy.yaml", ["name=a"]))
    lines = (toys / "runs" / "a" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == ["teacher", "teacher", "student", "student"]


@pytest.mark.parametrize("command, key", [("plan", "candidates"), ("doctor", "checks"), ("evaluate", "student")])
def test_a_script_reads_plan_doctor_and_evaluate_as_json_alone(toys, capfd, command, key):
    assert main([command, str(toys / "toy.yaml"), "name=a", f"runs={toys}/runs", "--json"]) == 0
    assert json.loads(capfd.readouterr().out, parse_constant=pytest.fail)[key]


def test_a_quiet_evaluation_prints_its_result_alone(toys, monkeypatch, capfd):
    monkeypatch.setenv(QUIET, "1")
    for _ in range(2):  # the second meets the teacher's answers again
        evaluate_run(load_config(toys / "toy.yaml", ["name=a"]))
        said = capfd.readouterr()
        assert said.err == "" and "student ÷ teacher" in said.out
