"""Names become shards or an error that says what is there; remote shards come whole, in a bounded cache."""

import http.server
import multiprocessing
import os
import resource
import threading

import pytest
from tars import make_key, write_shard, write_shards

from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from shards.tars.archive import ShardError
from shards.tars.index import load_index
from shards.tars.localcopy import ShardCache
from shards.tars.source import NUM_TRIES, expand_shards, read_small, retry


def test_a_hub_that_is_offline_is_said_on_one_line_with_the_shards_name_and_tried_once(monkeypatch):
    class OfflineModeIsEnabled(ConnectionError):
        pass

    tries = []

    def refuse(*_):
        tries.append(1)
        raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.\n\nUnset HF_HUB_OFFLINE.")

    filesystem = type("Hub", (), {"glob": refuse, "open": refuse, "info": refuse})()
    monkeypatch.setattr("shards.tars.source.open_filesystem", lambda name: (filesystem, name))
    with pytest.raises(
        ShardError, match=r"^shards is 'hf://datasets/a/b/', but .* \(Cannot reach .*FLINE\.\); look"
    ) as e:
        expand_shards("hf://datasets/a/b/")
    assert "\n" not in str(e.value)
    with pytest.raises(ShardError, match=r"hf://datasets/a/b/index\.json could not be read: Cannot reach the hub"):
        read_small("hf://datasets/a/b/index.json")
    assert len(tries) == 2


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
        f"{server.url}/train-{{000000..000001}}.tar",
        Order(batch_size=2, epochs=1),
        limits=Limits(cache=cache, workers=1),
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
    stream = ShardStream(
        f"{server.url}/train-{{000000..000001}}.tar", Order(batch_size=1, shuffle=False), limits=Limits(cache=cache)
    )
    assert not [name for name, _ in server.requests if name.endswith(".tar")]
    assert next(iter(stream))[0].key == make_key(0)
    assert [name for name, _ in server.requests if name.endswith(".tar")] == ["train-000000.tar"]


def test_the_cache_stays_within_its_bytes_and_every_sample_still_comes(server, tmp_path):
    keys = write_shards(server.folder, [3, 3, 3, 3])
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    cache = ShardCache(tmp_path / "cache", max_bytes=2 * size)
    urls = [f"{server.url}/train-{n:06d}.tar" for n in range(4)]
    assert keys_of(ShardStream(urls, Order(batch_size=2, epochs=1), limits=Limits(cache=cache))) == keys
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    copies = {name for name in left if name.endswith(".tar")}
    assert 1 <= len(copies) <= 2
    assert left - copies <= {f"{name}.idx" for name in copies}  # no locks, no parts, no index of an evicted shard


def test_a_local_copy_in_use_is_not_evicted(server, tmp_path):
    write_shards(server.folder, [3, 3, 3])
    first, second, third = (f"{server.url}/train-{n:06d}.tar" for n in range(3))
    cache = ShardCache(tmp_path / "cache", max_bytes=1)
    with cache.local(first) as path:
        os.close(cache.open(second))
        assert path.exists()
    os.close(cache.open(third))
    assert not path.exists()


def test_addresses_that_differ_in_a_slash_have_copies_of_their_own(server, tmp_path):
    write_shards(server.folder / "a", [1])
    write_shard(server.folder / "a_train-000000.tar", [7])
    cache = ShardCache(tmp_path / "cache")
    for name, number in (("a/train-000000.tar", 0), ("a_train-000000.tar", 7)):
        assert keys_of(
            ShardStream(f"{server.url}/{name}", Order(batch_size=1, epochs=1), limits=Limits(cache=cache))
        ) == [make_key(number)]


def open_and_leave(cache, url):
    os.close(cache.open(url))


def test_processes_that_want_the_same_shard_fetch_it_once(server, tmp_path):
    write_shards(server.folder, [3])
    cache, url = ShardCache(tmp_path / "cache"), f"{server.url}/train-000000.tar"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_and_leave, args=(cache, url)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [name for name, _ in server.requests] == ["train-000000.tar"]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".tar"]


def test_what_a_killed_process_left_is_cleared(server, tmp_path):
    write_shards(server.folder, [3, 3])
    cache, folder = ShardCache(tmp_path / "cache"), tmp_path / "cache"
    first, second = (f"{server.url}/train-{n:06d}.tar" for n in range(2))
    folder.mkdir()
    for url in (first, f"{server.url}/never-again.tar"):
        for suffix in (".part", ".lock"):
            (folder / f"{cache._path(url).name}{suffix}").write_bytes(b"half of it")
    assert keys_of(ShardStream([first, second], Order(batch_size=2, epochs=1), limits=Limits(cache=cache))) == [
        make_key(n) for n in range(6)
    ]
    assert {path.suffix for path in folder.iterdir()} == {".tar", ".idx"}


def fetch_on_a_full_disk(cache, url):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a write past it fails, as one to a full disk does
    with pytest.raises(ShardError, match=r"cache has [0-9,]+ bytes free, but http.*train-000000\.tar needs more"):
        cache.open(url)


def test_a_full_disk_is_named_at_once_and_nothing_stays(server, tmp_path):
    write_shards(server.folder, [3])
    cache = ShardCache(tmp_path / "cache")
    arguments = (cache, f"{server.url}/train-000000.tar")
    process = multiprocessing.get_context("fork").Process(target=fetch_on_a_full_disk, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0 and len(server.requests) == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_remote_shard_is_an_error_at_once(server, tmp_path):
    write_shards(server.folder, [1])
    with pytest.raises(ShardError, match=r"train-000001\.tar is missing"):
        ShardStream(
            f"{server.url}/train-{{000000..000001}}.tar",
            Order(batch_size=1),
            limits=Limits(cache=ShardCache(tmp_path / "cache")),
        )
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
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_remote_shard_that_is_not_the_indexed_one_is_refused(server, tmp_path):
    write_shards(server.folder, [3])
    load_index(server.folder / "train-000000.tar")
    shard = server.folder / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-10240])
    stream = ShardStream(
        f"{server.url}/train-000000.tar", Order(batch_size=1), limits=Limits(cache=ShardCache(tmp_path / "cache"))
    )
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
        assert keys_of(ShardStream(shards, Order(batch_size=2, epochs=1), limits=Limits(cache=cache))) == keys
    with pytest.raises(ShardError, match="cannot be opened"):
        ShardStream("nosuch://bucket/a.tar", Order(batch_size=1), limits=Limits(cache=cache))


def test_a_missing_file_is_not_tried_again():
    calls = []

    def call():
        calls.append(1)
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError):
        retry(call, "x", first_wait_seconds=0.0)
    assert len(calls) == 1
