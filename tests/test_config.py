"""Configs: every recipe loads, a wrong key, type, choice or a credential is refused with its name."""

from pathlib import Path

import pytest

from distill.cli import main
from distill.config import load_config, to_yaml

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


def write(folder: Path, **files: str) -> Path:
    """YAML files by name; the folder."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_is_read_over_its_base_and_words_over_both(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, whole="name: whole\nseed: 1\ntrain:\n  steps: 5\n  batch_size: 6\n")
    write(tmp_path / "sub", own="base: ../whole.yaml\nname: own\ntrain:\n  steps: 7\n")
    config = load_config(tmp_path / "sub" / "own.yaml", ["train.batch_size=8"])
    assert (config.name, config.seed, config.train.steps, config.train.batch_size) == ("own", 1, 7, 8)


def test_a_resolved_config_is_complete_without_its_base(tmp_path):
    write(tmp_path, whole="seed: 3\nloss:\n  schedules:\n    kl: cosine 0.1\n", own="base: whole.yaml\nname: own\n")
    config = load_config(tmp_path / "own.yaml")
    (tmp_path / "moved").mkdir()
    write(tmp_path / "moved", config=to_yaml(config))
    assert "base" not in to_yaml(config) and load_config(tmp_path / "moved" / "config.yaml") == config


@pytest.mark.parametrize(
    ("whole", "own", "error", "message"),
    [
        (
            "",
            "base: gone.yaml",
            FileNotFoundError,
            r"base of .*own\.yaml is .*gone\.yaml, but there is no such",
        ),
        ("base: other.yaml", "base: whole.yaml", ValueError, r"whole\.yaml, but that has the base other\.yaml itself"),
        (
            "",
            "base: own.yaml",
            ValueError,
            r"base of .*own\.yaml is .*own\.yaml, but that has the base",
        ),
        ("trian: 1", "base: whole.yaml", ValueError, r"whole\.yaml: trian: Key 'trian' not in 'Config'"),
        ("hub_token: x", "base: whole.yaml", ValueError, r"whole\.yaml: hub_token looks like a credential"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused_by_its_name(tmp_path, whole, own, error, message):
    with pytest.raises(error, match=message):
        load_config(write(tmp_path, whole=whole, own=own) / "own.yaml")


def test_a_base_is_no_word_of_the_command_line():
    with pytest.raises(ValueError, match=r"Key 'base' not in 'Config'"):
        load_config(RECIPES[0], ["base=demo.yaml"])


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
