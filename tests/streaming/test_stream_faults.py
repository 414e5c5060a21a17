"""What the stream does with bad samples, changed shards and targets that do not fit."""

import io
import itertools
import json
import os

import numpy as np
import pytest
import soundfile
from tars import keys_of, make_key, make_members, make_waveform, write_shards

from shards.audio.decode import encode_flac
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.record import TargetRecord
from shards.tars.archive import ShardError
from shards.tars.tarwriter import TarWriter


def wav(samples, subtype="PCM_16", rate=16_000):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


NAN = make_waveform(1).copy()
NAN[7] = np.nan
BAD = {
    "html": ({"flac": b"<html>404</html>"}, "decode"),
    "empty": ({"flac": b""}, "decode"),
    "header only": ({"flac": encode_flac(make_waveform(1))[:42]}, "decode"),
    "cut": ({"flac": make_members(1)["flac"][:-300]}, "truncated"),
    "one sample": ({"flac": encode_flac(make_waveform(1)[:1])}, "too_short"),
    "not a number": ({"flac": wav(NAN, "FLOAT")}, "nonfinite"),
    "45 s": ({"flac": encode_flac(np.tile(make_waveform(1, 1.0), 45))}, "too_long"),
    "other audio": ({"flac": encode_flac(make_waveform(2, 0.26))}, "changed"),
    "shorter audio": ({"flac": encode_flac(make_waveform(1, 0.2))}, "truncated"),
    "cut json": ({"json": b'{"text": "a", "ta'}, "json"),
    "zeros for json": ({"json": bytes(80)}, "json"),
    "list for json": ({"json": b"[1]"}, "json"),
    "deep json": ({"json": b"[" * 100_000}, "json"),
    "empty text": ({"json": make_members(1, text=" ")["json"]}, "json"),
    "text of another type": ({"json": make_members(1, text=3)["json"]}, "json"),
    "no task": ({"json": make_members(1)["json"].replace(b'"task"', b'"tusk"')}, "json"),
    "NaN duration": ({"json": make_members(1, duration=float("nan"))["json"]}, "truncated"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_left_out_counted_and_logged(tmp_path, name):
    changes, reason = BAD[name]
    writer = TarWriter(tmp_path / "a.tar")
    for number in range(3):
        for suffix, data in (make_members(number) | (changes if number == 1 else {})).items():
            writer.add(f"{make_key(number)}.{suffix}", data)
    writer.close()
    log = tmp_path / "bad_samples.jsonl"
    stream = ShardStream(tmp_path, Order(batch_size=1, epochs=1, shuffle=False), limits=Limits(bad_samples=log))
    assert keys_of(stream) == [[(make_key(0), 0)], [], [(make_key(2), 0)]]  # steps stay
    assert dict(stream.num_bad) == {reason: 1}
    (entry,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (entry["key"], entry["reason"], entry["shard"]) == (make_key(1), reason, str(tmp_path / "a.tar"))
    assert "a.tar: clip-00001" in entry["message"]


def test_more_bad_samples_than_allowed_end_the_run(tmp_path):
    writer = TarWriter(tmp_path / "a.tar")
    for number in range(12):
        writer.add(f"{make_key(number)}.flac", b"nothing")
        writer.add(f"{make_key(number)}.json", make_members(number)["json"])
    writer.close()
    stream = ShardStream(tmp_path, Order(batch_size=1, epochs=1), limits=Limits(workers=1))
    batches = []
    with pytest.raises(ValueError, match=r"bad samples are 11 of 11 \(11 decode\), but at most 10 are accepted"):
        batches.extend(stream)
    assert batches == [[]] * 10


def test_a_shard_that_vanishes_or_changes_during_a_run_is_an_error_not_a_skip(tmp_path):
    write_shards(tmp_path, [3, 3])
    for num_workers in (0, 1):
        stream = ShardStream(tmp_path, Order(batch_size=1, epochs=1, shuffle=False), limits=Limits(workers=num_workers))
        second = tmp_path / "train-000001.tar"
        data = second.read_bytes()
        second.write_bytes(data[:-512])
        with pytest.raises(ShardError, match=r"^\S*train-000001\.tar has \d+ bytes, but its index says"):
            list(stream)
        second.unlink()
        with pytest.raises(ShardError, match=r"^\S*train-000001\.tar is missing"):
            list(stream)
        second.write_bytes(data)


def write_targets(path, keys):
    writer = TarWriter(path)
    for key in keys:
        writer.add(f"{key}.targets.safetensors", make_record(key).pack())
    writer.close()


def make_record(key):
    of_each_S = np.zeros(2, np.float32)
    return TargetRecord(b"", of_each_S, of_each_S, of_each_S, of_each_S, f"what the teacher says of {key}", "label", "")


@pytest.fixture
def with_targets(tmp_path):
    write_shards(tmp_path / "audio", [3, 2])
    (tmp_path / "cache").mkdir()
    write_targets(tmp_path / "cache/train-000000.targets.tar", [make_key(n) for n in (2, 0, 1)])
    write_targets(tmp_path / "cache/train-000001.targets.tar", [make_key(n) for n in (3, 4)])
    return tmp_path / "audio", tmp_path / "cache"


def test_targets_are_joined_by_key(with_targets):
    audio, cache = with_targets
    for sample in itertools.chain.from_iterable(
        ShardStream(audio, Order(batch_size=2, epochs=1), Selection(targets=cache), Limits(workers=1))
    ):
        assert sample.targets.answer == f"what the teacher says of {sample.key}"


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_that_are_no_record_are_named(with_targets, workers):
    audio, cache = with_targets
    writer = TarWriter(cache / "train-000001.targets.tar")
    for number in (3, 4):
        writer.add(f"{make_key(number)}.targets.safetensors", b"of another program")
    writer.close()
    stream = ShardStream(audio, Order(batch_size=5, epochs=1), Selection(targets=cache), Limits(workers=workers))
    with pytest.raises(ShardError, match=r"000001\.targets\.tar: clip-0000\d: record of 18 bytes is not a safetensors"):
        list(stream)


def test_missing_and_foreign_targets_are_refused_by_name(with_targets):
    audio, cache = with_targets
    second = cache / "train-000001.targets.tar"
    for keys, message in (
        ([3], r"train-000001\.targets\.tar holds no target of clip-00004"),
        ([3, 4, 7], r"train-000001\.targets\.tar holds a target of clip-00007"),
    ):
        write_targets(second, [make_key(n) for n in keys])
        second.with_name(second.name + ".idx").unlink(missing_ok=True)
        with pytest.raises(ShardError, match=message):
            ShardStream(audio, Order(batch_size=2), Selection(targets=cache))
    second.unlink()
    with pytest.raises(ShardError, match=r"train-000001\.targets\.tar is missing"):
        ShardStream(audio, Order(batch_size=2), Selection(targets=cache))


def test_tasks_that_are_not_read_need_no_target(with_targets):
    audio, cache = with_targets
    write_targets(cache / "train-000001.targets.tar", [make_key(3)])  # 4 is of another task than 0 and 3
    stream = ShardStream(audio, Order(batch_size=2, epochs=1), Selection(targets=cache, tasks=["asr"]))
    assert sorted(key for batch in keys_of(stream) for key, _ in batch) == [make_key(0), make_key(3)]


def test_a_damaged_target_is_left_out_and_counted(with_targets):
    audio, cache = with_targets
    ShardStream(audio, Order(batch_size=1), Selection(targets=cache))
    path = cache / "train-000001.targets.tar"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"says of clip-00004", b"says of clip-00009"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    stream = ShardStream(audio, Order(batch_size=5, epochs=1), Selection(targets=cache))
    assert [len(batch) for batch in stream] == [4] and dict(stream.num_bad) == {"checksum": 1}
