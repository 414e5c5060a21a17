"""The command line: what is asked wrongly is answered at once, by what may have been meant."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import tiny

from distill.cli import main
from distill.commandline.commands import COMMANDS
from distill.config import list_fields, load_config, to_yaml
from distill.config.rules import value_at
from distill.config.suggestions import COMMANDS as OTHER_COMMANDS
from distill.config.suggestions import FIELDS
from shards.pool import progress_bar
from shards.status import QUIET, print_json, print_status

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("trian x", 2, "command is trian, but there is none of that name; did you mean run?"),
        ("--quiet evalute x", 2, "did you mean evaluate?"),
        ("train x", 2, "did you mean run?"),
        ("run demo steps=10", 1, "field is steps, but there is none of that name; did you mean train.steps or scratch"),
        ("run demo train.stepz=10", 1, "did you mean train.steps?"),
        ("run demo trian.steps=10", 1, "field is trian.steps, but there is none of that name; did you mean train.st"),
        ("run demo train.batch-size=10", 1, "did you mean train.batch_size?"),
        ("run demo Train.Steps=10", 1, "did you mean train.steps?"),
        ("run demo loss.learning_rate=1", 1, "did you mean train.learning_rate or scratch.learning_rate?"),
        ("run demo lr=1", 1, "did you mean train.learning_rate?"),
        ("run demo --train.steps=10", 2, "option is --train.steps=10, but a field is set without dashes; did you mean "
         "train.steps=10?"),
        ("run demo --train.steps 10", 2, "did you mean train.steps=…?"),
        ("run demo --steps 10", 2, "did you mean train.steps=… or scratch.steps=…?"),
        ("run demo train.steps 10", 1, "override is 'train.steps', but must read section.key=value in one word"),
        ("run demo =3", 1, "override is '=3', but must read section.key=value in one word"),
        ("run demo train..steps=3", 1, "override is 'train..steps=3', but must read section.key=value in one word"),
        ("filter demo --below 3", 2, "but `distill filter` has none of that name; see `distill filter --help`."),
        ("run demo cache.temperatures=1,2", 1, "but must be a list, of number each, in brackets; correct it."),
        ("pipeline demo --lauch x", 2, "but `distill pipeline` has none of that name; did you mean --launch?"),
        ("audit m.json --otu x", 2, "but `distill audit` has none of that name; did you mean --out?"),
        ("pipeline demo --launch two_gpu_zero2", 1, "did you mean two_gpus_zero2?"),
        ("run dmeo", 1, "config is dmeo, but there is nothing of that name; did you mean demo?"),
        ("run train.steps=4", 1, "that sets a field and the config to set it in is not named; write CONFIG "),
        ("run", 2, "the following arguments are required: CONFIG; see `distill run --help`."),
        ("run ./gone", 1, "config is gone, but there is nothing of that name"),
        ("transcribe gone a.wav", 1, "run is gone, but there is nothing of that name"),
        ("export gone out", 1, "run is gone, but there is nothing of that name"),
        ("cache demo teacher.path=gone", 1, "teacher.path is gone, but there is nothing; give the path of what is"),
        ("plan demo eval.prompts=gone", 1, "eval.prompts is gone, but there is nothing; give the path of what is"),
        ("run demo", 1, "shards is 'data/demo/train' ("),
        ("evaluate demo", 1, "student is runs/demo/student, but there is no saved student; finish `distill run` of"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_answered_in_one_line_with_what_may_be_meant(
    tmp_path, monkeypatch, capsys, words, code, message
):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == code
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_help_versions_wrong_words_and_configs_are_read_without_torch():
    program = """
import sys
from distill.cli import main
from distill.commandline.commands import COMMANDS

for name in COMMANDS:
    assert main([*name.split(), "--help"]) == 0
assert main(["--version"]) == 0
assert main(["trian"]) == 2 and main(["run", "gone"]) == 1 and main(["run", "demo", "steps=1"]) == 1
assert main(["doctor", "demo", "loss.kl_kind=jsd"]) == 1
assert main(["pipeline", "demo", "teacher.path=gone"]) == 1 and main(["cache", "demo", "teacher.path=gone"]) == 1
assert main(["doctor", "demo", "teacher.path=gone"]) == 1 and main(["prune", "x", "y", "--shards", "gone"]) == 1
assert main(["teach", "demo", "data.folder=gone"]) == 1
assert main(["run", "demo", "data.folder=gone"]) == 1 and main(["evaluate", "demo", "name=gone"]) == 1
heavy = {"torch", "transformers", "scipy", "matplotlib", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch 2." in done.stdout and "CONFIG" in done.stdout


def test_every_word_that_a_hint_leads_to_is_one():
    assert set(OTHER_COMMANDS.values()) <= set(COMMANDS) and not set(OTHER_COMMANDS) & set(COMMANDS)
    config = load_config("demo")
    for field in FIELDS.values():
        value_at(config, field)


def test_a_config_is_named_by_its_file_its_run_or_its_recipe_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("demo", ["seed=7"])
    (tmp_path / "runs" / "own").mkdir(parents=True)
    (tmp_path / "runs" / "own" / "config.yaml").write_text(to_yaml(config))
    assert load_config("runs/own") == load_config("~/runs/own/config.yaml") == config
    (tmp_path / "demo").mkdir()  # a folder that is no run does not hide the recipe
    assert load_config("demo").name == "demo"
    with pytest.raises(FileNotFoundError, match=r"config is runs, but that folder holds no config\.yaml; name a YAML"):
        load_config("runs")


def test_a_run_is_named_by_its_config_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "demo"]) == 1
    assert "run is that of demo, runs/demo, but there is no such folder; train it first" in capsys.readouterr().err
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert main(["report", "demo"]) == 0
    assert (tmp_path / "runs" / "demo" / "report.html").exists()


def test_words_of_a_config_come_in_any_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "train.steps=0", "demo"]) == 1
    assert "demo.yaml: train.steps is 0, but must be above 0" in capsys.readouterr().err


def test_a_starter_is_its_recipe_with_every_field_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for recipe in ("salmonn_3b_to_1b", "demo"):
        assert main(["new", recipe, f"{recipe}.yaml"]) == 0
        assert load_config(f"{recipe}.yaml") == load_config(recipe)
    text = (tmp_path / "demo.yaml").read_text()
    for field in list_fields():
        name = field.rpartition(".")[2]
        assert re.search(rf"^ *(# )?{name}: .*  # \S|^ *# .*\n *(# )?{name}: ", text, re.MULTILINE), field
    assert main(["new", "demo", "demo.yaml"]) == 1
    assert "FILE is demo.yaml, but that exists and is not overwritten" in capsys.readouterr().err
    assert main(["new", "demo"]) == 1
    assert "write `distill new demo own.yaml`" in capsys.readouterr().err


def test_a_starter_without_a_recipe_asks_for_what_nobody_can_guess(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "own.yaml"]) == 0
    text = (tmp_path / "own.yaml").read_text()
    assert re.findall(r"^  (\w+): ''", text, re.MULTILINE) == ["train", "test", "path", "llm"]
    (tmp_path / "own.yaml").write_text(text.replace("  llm: ''", "  llm: some/llm"))
    assert load_config("own.yaml").student.llm == "some/llm"


@pytest.mark.parametrize("words", [["help", "split"], ["split", "--help"], ["split", "-h"]])
def test_help_may_stand_before_a_command_or_behind_it(words, capsys):
    assert main(words) == 0 and capsys.readouterr().out.startswith("usage: distill split ")


def test_a_starter_makes_the_folder_that_it_is_to_lie_in(tmp_path):
    assert main(["new", "demo", str(tmp_path / "own" / "my.yaml")]) == 0
    assert load_config(tmp_path / "own" / "my.yaml") == load_config("demo")


def test_a_bug_report_names_versions_and_processor_and_no_user(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 24)
    monkeypatch.setenv("HF_HOME", "/home/somebody/hub")
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^torch +2\.", said, re.MULTILINE) and re.search(r"^cpu +\S.* cores", said, re.MULTILINE)
    assert "HF_HOME" in said and "somebody" not in said and "hf_a" not in said


def test_a_script_reads_audit_and_stats_as_json_alone(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tiny.tone(1), 16_000)
    rows = [{"path": name, "text": "one", "task": "asr"} for name in ("a.wav", "gone.wav")]
    (tmp_path / "m.json").write_text(json.dumps({"annotation": rows}))
    assert main(["audit", str(tmp_path / "m.json"), "--out", str(tmp_path / "out"), "--json"]) == 0
    audited = json.loads(capsys.readouterr().out)
    assert (audited["rows"], audited["kept"], audited["dropped"]) == (2, 1, 1)
    assert audited["cleaned"] == [str(tmp_path / "out" / "m.json")] and audited["counts"][0]["verdict"] == "drop"
    assert main(["stats", audited["cleaned"][0], "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["total"]["samples"] == 1 and counted["total"]["seconds"] == pytest.approx(0.6)
    assert counted["rows"][0]["task"] == "asr" and sum(counted["total"]["bins"]) == 1


def test_a_result_that_is_no_number_is_null(capsys):
    print_json({"kl": float("inf"), "rows": [float("nan"), 1.0]})
    assert json.loads(capsys.readouterr().out) == {"kl": None, "rows": [None, 1.0]}


def test_a_quiet_command_and_the_processes_it_starts_say_nothing_but_results_and_errors(monkeypatch, capsys):
    monkeypatch.setenv(QUIET, "0")  # so that it is put back
    print_status("heard")
    monkeypatch.setenv(QUIET, "1")
    print_status("not heard")
    with progress_bar("packing", 1, show=True) as advance:
        advance(1)
    assert capsys.readouterr().err == "heard\n"
    assert main(["run", "gone"]) == 1 and "error: config is gone" in capsys.readouterr().err
