"""What a stranger's file cannot do, and what no file of ours holds."""

import json
import os
import pickle
import shutil

import pytest
import tiny
import torch

from distill.cache import cache
from distill.config import load_config
from distill.run import run
from distill.sizes.costs import model_config
from teachers.files.loading import load_llm, load_salmonn

TOKEN = "hf_" + "aZ09" * 9


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    return folder


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("part", ["llm", "whisper"])
def test_a_pickle_in_a_model_folder_is_refused_and_never_run(toys, tmp_path, part):
    config = load_salmonn(toys / "teacher").config
    folder = tmp_path / part
    shutil.copytree(getattr(config, part), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    saved = tmp_path / "teacher"
    shutil.copytree(toys / "teacher", saved)
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text(text.replace(getattr(config, part), str(folder)))
    with pytest.raises(ValueError, match="safetensors"):
        load_salmonn(saved)
    assert not (tmp_path / "ran").exists()


def test_a_model_of_foreign_code_is_refused_without_a_question(tmp_path, capfd):
    """As deepseek-moe-16b is published: transformers would ask on the terminal whether to run what lies there."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    modules = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek", "auto_map": modules}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="a deepseek, which only code of its repository can run, but none is run here"):
        load_llm(str(folder), torch.float32)
    with pytest.raises(ValueError, match="a deepseek, which only code of its repository can run, but none is run here"):
        model_config(str(folder))
    assert "[y/N]" not in capfd.readouterr().out and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "teacher.trust_remote_code", "student.trust_remote_code"])
def test_no_config_can_trust_remote_code(toys, key):
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_config(toys / "toy.yaml", [f"{key}=true"])


def test_a_token_of_the_environment_is_in_no_file_and_no_line(toys, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = load_config(toys / "toy.yaml")
    cache(config)
    run(config)
    lines = capfd.readouterr()
    assert TOKEN not in lines.out + lines.err
    files = [path for path in toys.rglob("*") if path.is_file()]
    assert any(path.name == "metrics.jsonl" for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
