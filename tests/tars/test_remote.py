"""Shards and target cache behind a URL, named by a config: the losses of local ones, and nothing half-written."""

import functools
import http.server
import json
import shutil
import threading

import fsspec
import pytest
import tiny

from distill.cache import cache
from distill.config import load_config
from distill.run import run
from shards.targets.store import TargetReader
from shards.tars.archive import ShardError

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
