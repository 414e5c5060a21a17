"""The pipeline: what it uses again is of this very config, and its stages end with it."""

import json

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
