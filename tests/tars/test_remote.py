"""Shards and target cache behind a URL, named by a config: the losses of local ones, and nothing half-written."""

import functools
import http.server
import json
import shutil
import threading
from functools import partial

import fsspec
import pytest
import tiny

from distill import Distiller, TrainConfig
from distill.cache import cache
from distill.cli import main
from distill.config import load_config
from distill.evaluation.answering import measure_cost
from distill.evaluation.evaluate import evaluate_run
from distill.run import run
from shards.targets.store import TargetReader
from shards.tars.archive import ShardError
from students import Student

PLACE = "memory://bucket"


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The toys with a local cache, and the losses of a run on it."""
    folder = tmp_path_factory.mktemp("toys")
    config = load_config(tiny.make_toys(folder), ["name=local"])
    cache(config)
    run(config)
    return folder


@pytest.fixture
def own_copies(tmp_path, monkeypatch):
    """Copies of remote files go into a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))


@pytest.fixture
def bucket(toys, own_copies):
    """The toys' shards behind `memory://`."""
    memory = fsspec.filesystem("memory")
    memory.put(str(toys / "data" / "train"), "/bucket/data/train", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def server(toys, own_copies):
    """The toys behind a local HTTP server."""
    handler = functools.partial(Quiet, directory=str(toys))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Say nothing."""


def losses(toys, name: str) -> list[float]:
    lines = (toys / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_shards_and_cache_in_a_bucket_give_the_losses_of_local_ones(toys, bucket, capsys):
    config = load_config(toys / "toy.yaml", ["name=bucket", f"data.folder={PLACE}/data", f"cache.folder={PLACE}/cache"])
    cache(config)
    run(config)
    assert losses(toys, "bucket") == losses(toys, "local")
    there = sorted(path.rpartition("/")[2] for path in bucket.find("/bucket/cache"))
    local = sorted(path.name for path in (toys / "data" / "cache").rglob("*") if path.is_file())
    assert [name for name in there if name != "files.json"] == local
    cache(config)
    assert "of all 3 shards, used again" in capsys.readouterr().err


def test_only_the_shard_that_a_bucket_lacks_is_cached_again(toys, bucket, tmp_path):
    config = load_config(toys / "toy.yaml", [f"data.folder={PLACE}/data", f"cache.folder={PLACE}/cache"])
    cache(config)
    whole = {path: bucket.cat_file(path) for path in bucket.find("/bucket/cache")}
    kept = bucket.created("/bucket/cache/train-000000.targets.tar")
    bucket.rm("/bucket/cache/train-000001.targets.tar")
    with pytest.raises(ShardError, match=r"lacks the targets of 1 of 1 shards \(train-000001\)"):
        TargetReader(f"{PLACE}/cache", None).check_shards(["train-000001"])
    shutil.rmtree(tmp_path / "copies")  # as from another machine
    cache(config)
    assert {path: bucket.cat_file(path) for path in bucket.find("/bucket/cache")} == whole
    assert bucket.created("/bucket/cache/train-000000.targets.tar") == kept


def test_a_published_cache_is_read_by_http_and_not_written(toys, server):
    words = [f"data.folder={server}/data", f"cache.folder={server}/published"]
    memory = fsspec.filesystem("memory")
    try:
        cache(load_config(toys / "toy.yaml", ["cache.folder=memory://published"]))
        memory.get("/published", str(toys / "published"), recursive=True)
    finally:
        memory.rm("/published", recursive=True)
    run(load_config(toys / "toy.yaml", ["name=http", *words]))
    assert losses(toys, "http") == losses(toys, "local")
    with pytest.raises(ShardError, match="but http\\(s\\) is only read; name a place that can be written"):
        cache(load_config(toys / "toy.yaml", [words[0], f"cache.folder={server}/new"]))


def test_the_home_folder_may_be_written_as_a_tilde_in_any_field(toys, monkeypatch):
    monkeypatch.setenv("HOME", str(toys))
    config = load_config("~/toy.yaml", ["data.folder=~/data", "teacher.path=~/teacher", "runs=~/runs"])
    assert (config.data.folder, config.teacher.path) == (f"{toys}/data", f"{toys}/teacher")
    assert config.run_folder == toys / "runs" / "toy"
    (toys / "own.yaml").write_text("base: ~/toy.yaml")
    assert load_config("~/own.yaml") == load_config("~/toy.yaml")


def test_the_home_folder_may_be_written_as_a_tilde_in_python_and_where_a_shell_leaves_it(toys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(toys))
    monkeypatch.chdir(tmp_path)
    student, clip = "~/runs/local/student", "~/data/audio/train-000.wav"
    options = TrainConfig(steps=1, batch_size=4, trackers=())
    for teacher, name in (("~/teacher", "online"), ("~/data/cache", "cached")):
        run = Distiller(teacher, student, train="~/data/train", options=options, run=f"~/runs/{name}")
        assert len(run.fit().losses) == 1 and (toys / "runs" / name / "metrics.jsonl").exists()
    listener = Student.from_pretrained(student)
    assert listener.save_pretrained("~/copy") == toys / "copy" and listener.transcribe(clip, max_new_tokens=2).segments
    assert main(["export", "~/runs/local", "~/export"]) == 0
    assert main(["transcribe", "~/export", clip, "--out=~/said", "--max-new-tokens", "2"]) == 0
    assert (toys / "said" / "train-000.txt").exists() and list(tmp_path.iterdir()) == []


def test_a_student_of_remote_shards_and_a_remote_cache_is_evaluated_and_its_teachers_answers_are_kept_here(
    toys, bucket, monkeypatch, capsys
):
    monkeypatch.setattr("distill.evaluation.evaluate.measure_cost", partial(measure_cost, runs=1))
    tiny.make_shards(toys / "held-out", split="test", num_samples=2)
    bucket.put(str(toys / "held-out" / "test"), "/bucket/data/test", recursive=True)
    config = load_config(toys / "toy.yaml", ["name=local", f"data.folder={PLACE}/data", "eval.max_new_tokens=2"])
    first = evaluate_run(config)
    assert first.student.scores and evaluate_run(config).teacher == first.teacher
    assert "teacher: its answers are in " in capsys.readouterr().err


def test_a_remote_cache_teaches_in_python(toys, bucket, tmp_path):
    cache(load_config(toys / "toy.yaml", [f"data.folder={PLACE}/data", f"cache.folder={PLACE}/cache"]))
    options = TrainConfig(steps=1, batch_size=4, trackers=())
    run = Distiller(f"{PLACE}/cache", toys / "runs/local/student", train=f"{PLACE}/data/train/", options=options,
                    run=tmp_path)  # fmt: skip
    assert len(run.fit().losses) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=s3://bucket/runs"], "runs is s3://bucket/runs, but a run's folder is on this machine"),
        (
            ["cache.folder=s3://b/c", "on_policy.round=1", "on_policy.share=0.5", "student.start=x"],
            "kept in a local cache",
        ),
    ],
)
def test_what_only_this_machine_can_hold_is_refused_behind_a_url(toys, words, message):
    with pytest.raises(ValueError, match=message):
        load_config(toys / "toy.yaml", words)
