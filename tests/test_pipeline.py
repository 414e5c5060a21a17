"""The pipeline: what it uses again is of this very config, and its stages end with it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import tiny

from distill.config import Config, load_config
from distill.pipeline import make_shards
from shards.manifest import read_manifest
from shards.sample import SAMPLE_RATE


def write_corpus(folder, num_clips: int = 8) -> None:
    """Clips of tones, and the manifest `all.json` of them."""
    rows = []
    for number in range(num_clips):
        soundfile.write(folder / f"{number}.wav", tiny.tone(number), SAMPLE_RATE, subtype="PCM_16")
        rows.append({"path": f"{folder}/{number}.wav", "text": tiny.WORDS[number], "task": "asr"})
    (folder / "all.json").write_text(json.dumps({"annotation": rows}))


def configure(folder, *words: str) -> Config:
    (folder / "own.yaml").write_text(f"{{data: {{folder: {folder}/data}}, corpus: {{train: {folder}/all.json}}}}")
    return load_config(folder / "own.yaml", ["corpus.valid_share=0.25", *words])


def test_a_changed_manifest_or_share_is_not_trained_on_from_the_old_cut(tmp_path):
    write_corpus(tmp_path)
    make_shards(configure(tmp_path))
    make_shards(configure(tmp_path))
    with pytest.raises(ValueError, match=r"and corpus\.valid_share 0\.5, but .*manifests was cut from .* with 0\.25;"):
        make_shards(configure(tmp_path, "corpus.valid_share=0.5"))
    write_corpus(tmp_path, num_clips=9)
    with pytest.raises(
        ValueError, match=r"corpus\.train is .*all\.json with sha256 \w{16} and .*choose another data\."
    ):
        make_shards(configure(tmp_path))
    assert len(list(read_manifest(tmp_path / "data/manifests/train.json"))) == 6


def test_a_cut_that_was_interrupted_is_made_again(tmp_path):
    write_corpus(tmp_path)
    config = configure(tmp_path)
    config.manifest("train").parent.mkdir(parents=True)
    for name in ("train", "valid"):
        config.manifest(name).write_text('{"annotation": []}')
    make_shards(config)
    assert len(list(read_manifest(config.manifest("train")))) == 6


STAGE = """
import os, signal, sys

def stop(number, frame):
    open(sys.argv[1] + "/stopped", "w").write(str(number))
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + "/ready", "w").close()
signal.pause()
"""
LAUNCHER = """
import subprocess, sys

subprocess.Popen([sys.executable, "-m", "stage", *sys.argv[1:]]).wait()
"""  # as that of accelerate for one process: a signal ends it at once


@pytest.mark.parametrize("module", ["stage", "launcher"])
def test_sigterm_stops_the_running_stage_in_order_and_leaves_no_process(tmp_path, module):
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    os.mkfifo(tmp_path / "ready")
    program = f"from distill.pipeline import launch_stage; launch_stage({module!r}, {str(tmp_path)!r}, [], None)"
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"}
    pipeline = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    (tmp_path / "ready").read_text()  # returns when the stage is there
    pipeline.send_signal(signal.SIGTERM)
    _, said = pipeline.communicate(timeout=60)  # ends when nobody holds stderr any more
    assert pipeline.returncode == 143 and "the same command goes on" in said
    assert (tmp_path / "stopped").read_text() == str(int(signal.SIGTERM))
