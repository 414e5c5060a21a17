"""The target cache: bytes come back, and whatever is stale, damaged, half written or of another sample is refused."""

import builtins
import errno
import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from shards.files.lock import FileLock, read_holder
from shards.targets import store as cache_module
from shards.targets.header import HEADER, IDENTITY_FIELDS, CacheHeader, read_header
from shards.targets.record import TargetRecord, identify_sample, pack_record, unpack_record
from shards.targets.store import TargetReader, TargetWriter, done_path, tar_path
from shards.tars.archive import ShardError

SHARD = "train-000017"
IDENTITY = {name: f"{name} of this test" for name in IDENTITY_FIELDS} | {
    "teacher_config": {"width": 64, "layers": {"audio": 2, "text": 3}},
    "codec": {"name": "topk", "version": 1, "k": 64},
}
CACHE = CacheHeader(IDENTITY)


def make_record(seed: int = 0, **changes) -> TargetRecord:
    rng = np.random.default_rng(seed)
    record = TargetRecord(
        payload=rng.bytes(100),
        answer_ids_S=np.arange(5, dtype=np.int32),
        label_logprobs_S=-rng.random(5, dtype=np.float32),
        entropy_S=rng.random(5).astype(np.float16).astype(np.float32),
        byte_ends_S=np.array([2, 4, 5, 9, 9], np.int32),
        answer="Äh, oui",
        answer_source="label",
        identity=identify_sample("ab" * 32, [1, 2], range(5)),
        features={"queries_WQE": rng.standard_normal((8, 1, 16), np.float32)},
        notes={"transcript": "eh oui", "wer": "0.5"},
    )
    return replace(record, **changes)


def write_shard(folder: Path, num_samples: int = 5, name: str = SHARD) -> None:
    with TargetWriter(folder, CACHE).claim(name) as shard:
        for row in range(num_samples):
            shard.add(f"clip-{row}", make_record(row).pack())


def read_files(folder: Path) -> dict[str, bytes]:
    """What a cache is: everything in its folder but the index, which holds the tar's time of change."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".idx"}


def start_child(function: Callable[[], None], error_end: int = 2) -> int:
    """Start a function in a process of its own, which writes its error to a descriptor; returns the process id."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os.write(error_end, traceback.format_exc().encode()[-4000:])
            os._exit(1)
    return child


def run_child(function: Callable[[], None]) -> tuple[int, str]:
    """Run a function in a process of its own; returns its exit status, -9 where it was killed, and its error."""
    read_end, write_end = os.pipe()
    child = start_child(function, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        error = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), error


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_dtype", ["int8", "float16"])
def test_a_record_comes_back(feature_dtype):
    record = make_record()
    read = TargetRecord.unpack(record.pack(feature_dtype))
    for name in ("payload", "answer", "answer_source", "identity", "notes"):
        assert getattr(read, name) == getattr(record, name)
    for name in ("answer_ids_S", "label_logprobs_S", "entropy_S", "byte_ends_S"):
        np.testing.assert_array_equal(getattr(read, name), getattr(record, name))
    assert read.teacher_ce == pytest.approx(-record.label_logprobs_S.mean())
    values = record.features["queries_WQE"]
    bound = np.abs(values).max(-1, keepdims=True) / 254 if feature_dtype == "int8" else np.abs(values) * 2**-11
    assert (np.abs(read.features["queries_WQE"] - values) <= bound * (1 + 1e-5)).all()


def test_other_programs_read_a_record():
    tensors = load(make_record().pack())
    np.testing.assert_array_equal(tensors["answer_ids_S"], np.arange(5))
    assert tensors["feature.queries_WQE.int8"].shape == (8, 1, 16)


def test_the_same_record_has_the_same_bytes_whatever_the_order_of_its_names():
    tensors = {"b": np.zeros(3, np.float32), "a": np.zeros((2, 2), np.int8), "c": np.zeros(0, np.uint8)}
    metadata = {"y": "ü", "x": "1"}
    packed = pack_record(tensors, metadata)
    assert packed == pack_record(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    read, read_metadata = unpack_record(packed)
    assert read_metadata == metadata and {name: array.shape for name, array in read.items()} == {
        "a": (2, 2),
        "b": (3,),
        "c": (0,),
    }


def test_every_cut_of_a_record_is_refused():
    data = make_record().pack()
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"record (is|of) \d+ bytes"):
            TargetRecord.unpack(data[:size])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy_S": np.zeros(4)}, "lengths are .*'entropy_S': 4"),
        ({"answer_source": "guess"}, "answer_source is 'guess', but must be one of label, teacher"),
        ({"features": {"queries_WQE": np.full((1, 2), np.nan)}}, "feature.queries_WQE is not finite"),
    ],
)
def test_a_record_that_makes_no_sense_is_not_written(changes, message):
    with pytest.raises(ValueError, match=message):
        make_record(**changes).pack()


@pytest.mark.parametrize(
    ("audio", "prompt_ids", "answer_ids", "part"),
    [
        ("cd" * 32, [1, 2], range(5), "audio"),
        ("ab" * 32, [1, 3], range(5), "prompt"),
        ("ab" * 32, [1, 2], [1, 2, 3, 4, 5], "answer"),
    ],
)
def test_targets_of_another_sample_are_refused_with_both_values(audio, prompt_ids, answer_ids, part):
    record = make_record()
    record.check(identify_sample("ab" * 32, [1, 2], range(5)), "here")
    other = identify_sample(audio, prompt_ids, answer_ids)
    with pytest.raises(
        ValueError, match=f"{SHARD}: clip-1 was cached as {record.identity} .* is {other}: another {part};"
    ):
        record.check(other, f"{SHARD}: clip-1")


# --- the header ------------------------------------------------------------------------------------------------------

CHANGES = [(name, {name: "changed"}) for name in IDENTITY_FIELDS if isinstance(IDENTITY[name], str)] + [
    ("codec.k", {"codec": IDENTITY["codec"] | {"k": 32}}),
    ("codec.version", {"codec": IDENTITY["codec"] | {"version": 2}}),
    ("teacher_config.layers.audio", {"teacher_config": {"width": 64, "layers": {"audio": 4, "text": 3}}}),
    ("temperatures", {"temperatures": [1.0]}),
]


@pytest.mark.parametrize(("field", "change"), CHANGES, ids=[field for field, _ in CHANGES])
def test_a_cache_that_differs_in_one_field_is_refused_by_name_and_value(tmp_path, field, change):
    TargetWriter(tmp_path, CACHE)
    other = CacheHeader(IDENTITY | change)
    assert other.fingerprint != CACHE.fingerprint
    for use in (TargetReader, TargetWriter):
        with pytest.raises(ValueError) as refusal:
            use(tmp_path, other)
        lines = str(refusal.value).splitlines()
        assert CACHE.fingerprint[:16] in lines[0] and other.fingerprint[:16] in lines[0]
        assert [line.split(":")[0].strip() for line in lines[1:]] == [field]
    with pytest.raises(ValueError, match=other.fingerprint[:16]):
        TargetReader(tmp_path, other.fingerprint)


def test_the_fingerprint_depends_on_values_and_not_on_their_order(tmp_path):
    shuffled = CacheHeader(dict(reversed(IDENTITY.items())))
    assert shuffled.fingerprint == CACHE.fingerprint
    TargetWriter(tmp_path, CACHE)
    assert TargetReader(tmp_path, shuffled).header == read_header(tmp_path) == CACHE


def test_an_identity_without_a_field_is_refused():
    with pytest.raises(ValueError, match="identity is without tokenizer, but"):
        CacheHeader({name: value for name, value in IDENTITY.items() if name != "tokenizer"})


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"identity": 3}'])
def test_a_damaged_or_missing_header_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"holds no cache\.json"):
        TargetReader(tmp_path, CACHE)
    (tmp_path / HEADER).write_text(text)
    with pytest.raises(ValueError, match=r"cache\.json cannot be read"):
        TargetReader(tmp_path, CACHE)


def test_an_edited_header_is_refused(tmp_path):
    TargetWriter(tmp_path, CACHE)
    path = tmp_path / HEADER
    path.write_text(path.read_text().replace("tokenizer of this test", "tokenizer of another"))
    with pytest.raises(ValueError, match="but its fields hash to"):
        TargetReader(tmp_path, None)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_records_are_read_by_shard_and_key(tmp_path):
    write_shard(tmp_path)
    reader = TargetReader(tmp_path, CACHE.fingerprint)
    assert reader.keys(SHARD) == [f"clip-{row}" for row in range(5)]
    for row in (3, 0, 4):
        assert reader.read(f"/data/{SHARD}.tar", f"clip-{row}") == make_record(row).pack()
    record = reader.read_record(SHARD, "clip-1", make_record().identity)
    assert record.payload == make_record(1).payload
    with pytest.raises(ValueError, match=f"{SHARD}.targets.tar: clip-1 was cached as"):
        reader.read_record(SHARD, "clip-1", identify_sample("00", [], []))


def test_only_what_differs_is_listed_and_a_tuple_is_the_list_it_is_stored_as(tmp_path):
    def header(k):
        return CacheHeader(IDENTITY | {"codec": {"k": k, "temperatures": (1.0, 2.0)}})

    TargetWriter(tmp_path, header(8))
    with pytest.raises(ValueError, match=r"What differs:\n  codec\.k: cached 8, this run 16$"):
        TargetReader(tmp_path, header(16))


def test_a_cache_in_a_folder_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(
        ValueError, match=r"data/cache is to hold the cache, but .*data is not there; correct data\.folder"
    ):
        TargetReader(tmp_path / "data" / "cache", CACHE)
    with pytest.raises(ValueError, match=r"holds no cache\.json, but a cache has one; run `distill cache` first"):
        TargetReader(tmp_path / "cache", CACHE)


def test_a_finished_shard_is_not_claimed_again(tmp_path):
    write_shard(tmp_path)
    before = read_files(tmp_path)
    writer = TargetWriter(tmp_path, CACHE)
    assert writer.is_done(SHARD) and not writer.is_done("train-000018")
    with writer.claim(SHARD) as shard:
        assert shard is None
    assert read_files(tmp_path) == before


def test_figures_are_kept_in_the_done_record(tmp_path):
    with TargetWriter(tmp_path, CACHE).claim(SHARD) as shard:
        shard.add("clip", make_record().pack())
        shard.figures["tokens"] = 5
    done = json.loads(done_path(tmp_path, SHARD).read_text())
    assert done["rows"] == 1 and done["figures"] == {"tokens": 5} and done["fingerprint"] == CACHE.fingerprint


def test_a_shard_without_samples_is_a_shard(tmp_path):
    write_shard(tmp_path, num_samples=0)
    reader = TargetReader(tmp_path, CACHE)
    assert reader.keys(SHARD) == []
    with pytest.raises(ShardError, match="holds no targets of clip-0, but 0 others"):
        reader.read(SHARD, "clip-0")


def test_an_exception_while_writing_leaves_nothing(tmp_path):
    writer = TargetWriter(tmp_path, CACHE)
    before = read_files(tmp_path)
    with pytest.raises(RuntimeError, match="the teacher failed"), writer.claim(SHARD) as shard:
        shard.add("clip-0", make_record().pack())
        raise RuntimeError("the teacher failed")
    assert read_files(tmp_path) == before
    write_shard(tmp_path)
    assert writer.is_done(SHARD)


def test_missing_shards_are_named(tmp_path):
    write_shard(tmp_path)
    reader = TargetReader(tmp_path, CACHE)
    reader.check_shards([SHARD])
    with pytest.raises(ShardError, match=r"lacks the targets of 2 of 3 shards \(train-000018, train-000019\), but"):
        reader.check_shards([SHARD, "train-000018.tar", "train-000019.tar"])
    with pytest.raises(ShardError, match=r"lacks the targets of 1 of 1 shards \(train-000018\)"):
        reader.read("train-000018", "clip-0")
    tar_path(tmp_path, SHARD).unlink()
    with pytest.raises(ShardError, match="lacks the targets"):
        TargetReader(tmp_path, CACHE).read(SHARD, "clip-0")


def flip_bit(path: Path, offset: int) -> None:
    """Damage a file without a trace in its size or time."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_flipped_bit_is_refused_with_shard_and_key(tmp_path):
    write_shard(tmp_path)
    path = tar_path(tmp_path, SHARD)
    flip_bit(path, path.read_bytes().index(make_record(2).payload) + 50)
    reader = TargetReader(tmp_path, CACHE)
    assert reader.read(SHARD, "clip-1") == make_record(1).pack()
    with pytest.raises(
        ShardError, match=rf"{SHARD}\.targets\.tar: clip-2 has crc32 [0-9a-f]+ .*, but [0-9a-f]+ .* were written"
    ):
        reader.read(SHARD, "clip-2")


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("damage", ["cut", "flip", "swap"])
def test_a_shard_that_is_not_what_was_written_is_refused(tmp_path, damage, with_index):
    write_shard(tmp_path)
    path = tar_path(tmp_path, SHARD)
    data = path.read_bytes()
    if not with_index:
        path.with_name(path.name + ".idx").unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    else:
        write_shard(tmp_path / "other", num_samples=4)
        path.write_bytes(tar_path(tmp_path / "other", SHARD).read_bytes())
    with pytest.raises(ShardError, match=rf"{SHARD}\.targets\.tar"):
        TargetReader(tmp_path, CACHE).read(SHARD, "clip-0")


def test_a_cut_shard_is_not_done(tmp_path):
    write_shard(tmp_path)
    path = tar_path(tmp_path, SHARD)
    path.write_bytes(path.read_bytes()[:-512])
    assert not TargetWriter(tmp_path, CACHE).is_done(SHARD)


# --- processes and disks ---------------------------------------------------------------------------------------------


def kill_at(call: int) -> None:
    """Make this process die, as by kill -9, before its n-th call that changes a disk."""
    left = [call]

    def fatal(function):
        def wrapper(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for name in ("fsync", "replace", "link", "open", "ftruncate"):
        setattr(os, name, fatal(getattr(os, name)))
    builtins.open = fatal(builtins.open)
    Path.unlink = fatal(Path.unlink)
    cache_module.TarWriter.add = fatal(cache_module.TarWriter.add)


def test_kill_9_at_every_point_leaves_no_half_file_and_a_rerun_the_same_bytes(tmp_path):
    write_shard(tmp_path / "whole")
    expected = read_files(tmp_path / "whole")
    finished, call = False, 0
    while not finished:
        call += 1
        folder = tmp_path / f"killed-{call}"
        status, error = run_child(lambda call=call, folder=folder: (kill_at(call), write_shard(folder)))
        finished = status == 0
        assert status in (0, -signal.SIGKILL), error
        left = read_files(folder) if folder.exists() else {}
        for name in left.keys() & expected.keys():
            assert left[name] == expected[name], f"{name} is not whole after a kill at call {call}"
        assert all(name.startswith(".") for name in left.keys() - expected.keys())
        if f"{SHARD}.targets.json" not in left:
            write_shard(folder)
        visible = {name: data for name, data in read_files(folder).items() if not name.startswith(".")}
        assert visible == expected
        assert TargetReader(folder, CACHE).read(SHARD, "clip-4") == make_record(4).pack()
    assert call > 20


def test_a_shard_that_another_process_writes_is_left_to_it_until_it_dies(tmp_path):
    writer = TargetWriter(tmp_path, CACHE)
    lock_path = tmp_path / f".{SHARD}.targets.lock"
    ready_end, told_end = os.pipe()
    child = os.fork()
    if child == 0:
        with writer.claim(SHARD) as shard:
            shard.add("half", make_record().pack())
            os.write(told_end, b"x")
            signal.pause()
    os.read(ready_end, 1)
    try:
        assert f"(process {child} on " in read_holder(lock_path)
        with writer.claim(SHARD) as shard:
            assert shard is None
        with writer.claim("train-000018") as other:
            assert other is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert lock_path.exists()
    write_shard(tmp_path)
    assert TargetReader(tmp_path, CACHE).keys(SHARD) == [f"clip-{row}" for row in range(5)]
    assert not lock_path.exists() and read_holder(lock_path) == "nobody"


def test_a_released_lock_can_be_taken_again(tmp_path):
    first = FileLock.acquire(tmp_path / "lock")
    assert FileLock.acquire(tmp_path / "lock") is None
    first.release()
    second = FileLock.acquire(tmp_path / "lock")
    assert second is not None
    second.release()


def test_two_processes_share_a_cache_and_write_every_shard_once(tmp_path):
    names = [f"train-{number:06d}" for number in range(12)]

    def work():
        for name in names:
            with TargetWriter(tmp_path / "shared", CACHE).claim(name) as shard:
                if shard is not None:
                    shard.add(f"clip-{os.getpid()}", make_record().pack())
                    with open(tmp_path / "log", "a") as log:
                        log.write(f"{name}\n")

    children = [start_child(work) for _ in range(3)]
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert sorted((tmp_path / "log").read_text().split()) == names
    TargetReader(tmp_path / "shared", CACHE).check_shards(names)


@pytest.mark.parametrize("limit", [2_000, 9_000, 20_000])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, limit):
    write_shard(tmp_path, name="train-000000")
    before = read_files(tmp_path)

    def write_too_much():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write_shard(tmp_path, num_samples=20)

    status, error = run_child(write_too_much)
    assert status == 1
    assert f"disk of {tmp_path} is full" in error and f"the targets of {SHARD} need more" in error
    assert read_files(tmp_path) == before
    write_shard(tmp_path)


def test_a_shard_that_will_not_fit_is_not_begun(tmp_path):
    before = (TargetWriter(tmp_path, CACHE), read_files(tmp_path))[1]
    with (
        pytest.raises(
            OSError, match=r"the targets of .* need about 1\.2e\+09 GB, but .* GB free; free some space and start again"
        ) as refusal,
        TargetWriter(tmp_path, CACHE).claim(SHARD, expected_bytes=10**18),
    ):
        pytest.fail("the shard was begun")
    assert refusal.value.errno == errno.ENOSPC
    assert read_files(tmp_path) == before


def test_a_lock_has_one_holder_however_often_it_is_released(tmp_path):
    inside = tmp_path / "inside"

    def work():
        for _ in range(400):
            if lock := FileLock.acquire(tmp_path / "lock"):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another is inside
                inside.unlink()
                lock.release()

    children = [start_child(work) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
