"""Configs: every recipe loads, a wrong key, type, choice or a credential is refused with its name."""

from pathlib import Path

import pytest

from distill.cli import main
from distill.config import load_config

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    assert load_config(path).name


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.stepz=3", r"Key 'stepz' not in 'TrainConfig'. Did you mean: 'steps'"),
        ("train.steps=many", r"train\.steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("train.steps=0", r"train\.steps is 0, but must be above 0"),
        ("cache.codec=zip", r"cache\.codec is 'zip', but must be one of topk, "),
        ("data.labelled_share=2", r"data\.labelled_share is 2\.0, but is a share from 0 to 1"),
        ("hub_token=x", r"hub_token looks like a credential"),
        ("name=hf_abcdefghijklmnopqrstuvwx", r"name looks like a credential"),
        ("steps", r"override is 'steps', but must read section\.key=value"),
    ],
)
def test_a_wrong_override_is_refused(word, message):
    with pytest.raises(ValueError, match=message):
        load_config(RECIPES[0], [word])


def test_numbers_in_scientific_notation_are_numbers():
    assert load_config(RECIPES[0], ["train.learning_rate=1e-4"]).train.learning_rate == 1e-4


def test_a_missing_config_names_those_beside_it(tmp_path):
    (tmp_path / "there.yaml").write_text("name: x")
    with pytest.raises(
        FileNotFoundError, match=r"gone\.yaml, but there is no such file; YAML files beside it: .*there"
    ):
        load_config(tmp_path / "gone.yaml")


def test_an_error_is_one_line_and_exit_code_1(capsys):
    assert main(["run", "nowhere/gone.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: config is nowhere/gone.yaml") and captured.err.count("\n") == 1


def test_help_names_every_stage_in_order(capsys):
    main([])
    text = capsys.readouterr().out
    stages = ["audit", "pack", "cache", "run", "evaluate"]
    assert sorted(stages, key=text.index) == stages


def test_pack_refuses_an_unknown_task(tmp_path, capsys):
    (tmp_path / "m.json").write_text('{"annotation": [{"path": "a.wav", "text": "x", "task": "asrr"}]}')
    assert main(["pack", str(tmp_path / "m.json"), str(tmp_path / "out")]) == 1
    assert "did you mean 'asr'" in capsys.readouterr().err
