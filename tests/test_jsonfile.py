"""Every JSON that the product reads back, of every other shape: not done or refused by name, never a traceback."""

import json

import pytest
import tiny

from distill.caching.filter import load_weights
from distill.command import guard
from distill.demo.scratch import has_parts, is_done
from distill.evaluation.report import read_metrics
from distill.evaluation.scorecard import SCORECARD, read_scorecard
from distill.pipeline import read_record
from distill.training.checkpoint import damage
from shards.jsonfile import ShapeError, parse_object
from shards.packing.pack import pack
from shards.streaming.catalog import read_listing
from shards.targets.header import HEADER, IDENTITY_FIELDS, CacheHeader, read_header, write_header
from shards.targets.store import TargetWriter, done_path, read_done
from teachers.files.loading import CONFIG
from teachers.files.weights import read_json
from teachers.words.prompts import load_prompts

CACHE = CacheHeader(dict.fromkeys(IDENTITY_FIELDS, "x"))
SHAPES = ["", "{", "{}", "[]", "null", "3", '"text"', "[null]", "NaN", "\ufeff{}", "[" * 100_000, '{"a": {"b": null}}']
FIELDS = ["fingerprint", "identity", "shards", "weights", "step", "teacher", "sha256", "num_train", "rows"]
NULLS = [json.dumps(dict.fromkeys(FIELDS, value)) for value in (None, 1, [], {}, "x", [None])]


def check_checkpoint(folder, name):
    checkpoint = folder / "step-000001"
    (folder / name).rename(checkpoint / name) if checkpoint.mkdir() is None else None
    assert damage(checkpoint) is not None


def check_done(folder):
    (folder / "d").rename(done_path(folder, "train-000000"))
    assert read_done(folder, "train-000000") is None
    assert not TargetWriter(folder, CACHE).is_done("train-000000")


def check_header(folder):
    with pytest.raises(ValueError, match=r"cache\.json "):
        read_header(folder)
    write_header(folder, CACHE)  # the caching job writes it anew
    assert read_header(folder) == CACHE


READERS = {
    "manifest.json": lambda folder: check_checkpoint(folder, "manifest.json"),
    "state.json": lambda folder: check_checkpoint(folder, "state.json"),
    "d": check_done,
    HEADER: check_header,
    "cut.json": lambda folder: read_record(folder / "cut.json", {"sha256": str, "valid_share": float}) is None,
    "corpus.json": lambda folder: read_record(folder / "corpus.json", {"num_train": list}),
    "parts.json": lambda folder: has_parts(folder, "mark"),
    "teach.json": lambda folder: is_done(folder, "mark"),
    "weights.json": lambda folder: load_weights(folder / "weights.json", CACHE),
    SCORECARD: read_scorecard,
    "index.json": lambda folder: read_listing(folder / "index.json", (folder / "index.json").read_bytes()),
    CONFIG: lambda folder: read_json(folder / CONFIG, "model"),
    "metrics.jsonl": lambda folder: read_metrics(folder / "metrics.jsonl"),
    "prompts.json": lambda folder: load_prompts(folder / "prompts.json", "{}"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_shape_is_not_done_or_refused_by_its_name(tmp_path, capsys, name):
    for number, text in enumerate([*SHAPES, *NULLS]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(text)

        def work(folder=folder) -> int:
            READERS[name](folder)
            return 0

        code = guard(work, debug=False)  # what is no user's error is raised here
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == len(errors) and all(str(folder) in line or "prompts file" in line for line in errors), (
            text[:60],
            said,
        )


@pytest.mark.parametrize("text", [*SHAPES[:10], NULLS[0]])
def test_a_pack_does_not_go_on_from_a_record_of_another_shape(tmp_path, text):
    for name in ("index.json", "index.partial.json"):
        out = tiny.make_shards(tmp_path / name, num_samples=1)
        (out / "index.json").unlink()
        (out / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            pack(tmp_path / name / "train.json", out, name="train", workers=1)


def test_what_is_wrong_with_an_object_is_said():
    fields = {"name": str, "size": int, "share": float}
    good = {"name": "a", "size": 1, "share": 1}
    assert parse_object(json.dumps(good), fields) == good
    for change, problem in (
        ({"size": True}, r"has 'size' true, but a whole number is needed"),
        ({"size": 1.5}, r"has 'size' 1\.5, but a whole number"),
        ({"share": float("nan")}, r"has 'share' NaN, but a number"),
        ({"name": ["x" * 90]}, r"has 'name' \[\"x{38}…, but text is needed"),
    ):
        with pytest.raises(ShapeError, match=problem):
            parse_object(json.dumps(good | change), fields)
    with pytest.raises(ShapeError, match="has no 'share'"):
        parse_object('{"name": "a", "size": 1}', fields)
