"""Names become shards or an error that says what is there; remote shards come whole, in a bounded cache."""

import http.server
import os
import threading

import pytest
from tars import make_key, write_shards

from shards.archive import ShardError
from shards.index import load_index
from shards.source import NUM_TRIES, ShardCache, expand_shards, retry
from shards.stream import ShardStream


def touch(folder, *names):
    for name in names:
        (folder / name).touch()


def test_folders_globs_braces_and_lists_stand_for_their_shards(tmp_path):
    names = [f"train-{n:06d}.tar" for n in range(12)]
    touch(tmp_path, *names, "valid-000000.tar", "train-000000.targets.tar", "index.json", "train-000000.tar.idx")
    paths = [str(tmp_path / name) for name in names]
    assert expand_shards(tmp_path) == [*paths, str(tmp_path / "valid-000000.tar")]
    assert expand_shards(f"{tmp_path}/train-*.tar") == paths
    assert expand_shards(f"{tmp_path}/train-{{000003..000011}}.tar") == paths[3:]
    assert expand_shards(f"{tmp_path}/{{train,valid}}-00000{{0..0}}.tar") == [
        paths[0],
        str(tmp_path / "valid-000000.tar"),
    ]
    assert expand_shards([paths[5], tmp_path / names[2]]) == [paths[5], paths[2]]
    assert expand_shards("https://host/a-{08..10}.tar") == [f"https://host/a-{n}.tar" for n in ("08", "09", "10")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train-000100.tar", r"no shard matches; \S+ has train-000001\.tar"),
        ("trian-*.tar", r"no shard matches; \S+ has train-000001\.tar"),
        ("train-{000001..000003}.tar", r"train-000002\.tar.*no shard matches; \S+ has train-000001\.tar"),
        ("no/where/x.tar", r"there is no folder \S+no/where"),
        ("{000005..000001}.tar", "counts upwards"),
        ("{1..9999999}.tar", "at most 1000000"),
        ("{x}.tar", "neither a range"),
    ],
)
def test_names_without_shards_are_refused_with_what_is_there(tmp_path, name, message):
    touch(tmp_path, "train-000001.tar")
    with pytest.raises(ShardError, match=message):
        expand_shards(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["pipe:cat x.tar", " pipe:touch y", "zip://a.tar::https://host/b.zip"])
def test_commands_and_chained_names_are_refused(name):
    with pytest.raises(ShardError, match="no command and no chained file system is opened"):
        expand_shards(name)


def test_a_shard_given_twice_is_refused(tmp_path):
    touch(tmp_path, "a.tar")
    with pytest.raises(ShardError, match=r"a\.tar is given more than once"):
        expand_shards([tmp_path / "a.tar", f"{tmp_path}/*.tar"])


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `failures` says what to do to the next requests instead, `requests` what was asked for."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.failures, self.requests = folder, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.server.folder / self.path[1:]
        span = self.headers["Range"]
        self.server.requests.append((self.path[1:], span))
        if not path.exists():
            return self.send_error(404)
        is_shard = path.suffix == ".tar"
        failure = self.server.failures.pop(0) if is_shard and self.server.failures else None
        if isinstance(failure, int):
            return self.send_error(failure)
        data = path.read_bytes()
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + 700] if failure == "cut" else data[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    with Server(folder) as server:
        yield server
        server.shutdown()


def keys_of(stream):
    return sorted(sample.key for batch in stream for sample in batch)


def test_shards_stream_over_http_through_cuts_and_errors(server, tmp_path):
    keys = write_shards(server.folder, [3, 2])
    server.failures = [503, "cut", "cut"]
    cache = ShardCache(tmp_path / "cache", first_wait_seconds=0.001)
    stream = ShardStream(
        f"{server.url}/train-{{000000..000001}}.tar", batch_size=2, epochs=1, cache=cache, num_workers=1
    )
    assert keys_of(stream) == keys
    assert any(span for _, span in server.requests)  # a cut download goes on where it stopped
    for name in ("train-000000.tar", "train-000001.tar"):
        (copy,) = (tmp_path / "cache").glob(f"*{name}")
        assert copy.read_bytes() == (server.folder / name).read_bytes()


def test_an_index_beside_a_remote_shard_spares_reading_the_shard(server, tmp_path):
    write_shards(server.folder, [3, 2])
    for path in server.folder.glob("*.tar"):
        load_index(path)
    cache = ShardCache(tmp_path / "cache")
    stream = ShardStream(f"{server.url}/train-{{000000..000001}}.tar", batch_size=1, shuffle=False, cache=cache)
    assert not [name for name, _ in server.requests if name.endswith(".tar")]
    assert next(iter(stream))[0].key == make_key(0)
    assert [name for name, _ in server.requests if name.endswith(".tar")] == ["train-000000.tar"]


def test_the_cache_stays_within_its_bytes_and_every_sample_still_comes(server, tmp_path):
    keys = write_shards(server.folder, [3, 3, 3, 3])
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    cache = ShardCache(tmp_path / "cache", max_bytes=2 * size)
    urls = [f"{server.url}/train-{n:06d}.tar" for n in range(4)]
    assert keys_of(ShardStream(urls, batch_size=2, epochs=1, cache=cache)) == keys
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 2 * size


def test_a_local_copy_in_use_is_not_evicted(server, tmp_path):
    write_shards(server.folder, [3, 3, 3])
    first, second, third = (f"{server.url}/train-{n:06d}.tar" for n in range(3))
    cache = ShardCache(tmp_path / "cache", max_bytes=1)
    with cache.local(first) as path:
        os.close(cache.open(second))
        assert path.exists()
    os.close(cache.open(third))
    assert not path.exists()


def test_a_missing_remote_shard_is_an_error_at_once(server, tmp_path):
    write_shards(server.folder, [1])
    with pytest.raises(ShardError, match=r"train-000001\.tar is missing"):
        ShardStream(f"{server.url}/train-{{000000..000001}}.tar", batch_size=1, cache=ShardCache(tmp_path / "cache"))
    assert [name for name, _ in server.requests].count("train-000001.tar") == 1


def test_refused_and_unreachable_addresses_are_named(server, tmp_path):
    write_shards(server.folder, [1])
    cache = ShardCache(tmp_path / "cache", first_wait_seconds=0.001)
    server.failures = [403]
    with pytest.raises(ShardError, match=r"train-000000\.tar is refused with status 403"):
        cache.open(f"{server.url}/train-000000.tar")
    server.failures = [500] * NUM_TRIES
    with pytest.raises(ShardError, match=rf"train-000000\.tar could not be read in {NUM_TRIES} tries: .*500"):
        cache.open(f"{server.url}/train-000000.tar")
    assert not list((tmp_path / "cache").glob("*.tar")) and not list((tmp_path / "cache").glob("*.tmp"))


def test_a_remote_shard_that_is_not_the_indexed_one_is_refused(server, tmp_path):
    write_shards(server.folder, [3])
    load_index(server.folder / "train-000000.tar")
    shard = server.folder / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-10240])
    stream = ShardStream(f"{server.url}/train-000000.tar", batch_size=1, cache=ShardCache(tmp_path / "cache"))
    with pytest.raises(ShardError, match=r"train-000000\.tar has \d+ bytes, but its index says"):
        next(iter(stream))


def test_fsspec_opens_shards_folders_and_globs(tmp_path):
    import fsspec

    keys = write_shards(tmp_path / "local", [2, 2])
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "local").glob("*.tar"):
        memory.pipe_file(f"/stream/{path.name}", path.read_bytes())
    cache = ShardCache(tmp_path / "cache")
    for shards in ("memory://stream/", "memory://stream/*.tar", "memory://stream/train-{000000..000001}.tar"):
        assert keys_of(ShardStream(shards, batch_size=2, epochs=1, cache=cache)) == keys
    with pytest.raises(ShardError, match="cannot be opened"):
        ShardStream("nosuch://bucket/a.tar", batch_size=1, cache=cache)


def test_a_missing_file_is_not_tried_again():
    calls = []

    def call():
        calls.append(1)
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError):
        retry(call, "x", first_wait_seconds=0.0)
    assert len(calls) == 1
