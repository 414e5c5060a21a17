"""Damage of every kind in a tar is an error or a counted skip that names it; nothing in a tar is ever executed."""

import io
import json
import os
import pickle
import random
import re
import shutil
import tarfile
from functools import partial

import numpy as np
import pytest
from tars import make_key, make_members, make_waveform, write_catalog, write_shard, write_shards

from shards.audio.decode import hash_waveform
from shards.packing.stats import measure
from shards.packing.verify import verify
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from shards.tars.archive import ShardError
from shards.tars.index import AS_WRITTEN, build_index, load_index, sidecar_path, write_index
from shards.tars.tarwriter import TarWriter

NUM_SAMPLES = 9
SAME_CLOCK = "sidecar, and the time of change is as it was"
KNOWN = ["nothing", "sidecar", "catalog", SAME_CLOCK]


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder of one shard, and what each key's audio hashes to."""
    folder = tmp_path_factory.mktemp("intact")
    write_shards(folder, [NUM_SAMPLES])
    hashes = {make_key(n): hash_waveform(make_waveform(n, 0.12 + 0.02 * (n * 7 % 11))) for n in range(NUM_SAMPLES)}
    return folder, hashes


def header_offsets(path):
    with tarfile.open(path) as tar:
        return [(member.offset, member.offset_data, member.size) for member in tar]


def damaged(intact, tmp_path, data, *, known):
    """The shard with other bytes; `known` is what was there before the damage."""
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(intact[0], folder)
    path = folder / "train-000000.tar"
    if known in ("sidecar", SAME_CLOCK):
        load_index(path)
    if known == "catalog":
        write_catalog(folder)
    status = path.stat()
    path.write_bytes(data)
    if known == SAME_CLOCK:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return folder


def assert_reported(folder, hashes):
    """Reading gives an error that names shard and key, or each sample, right or named among the bad."""
    log = folder / "bad_samples.jsonl"
    try:
        stream = ShardStream(folder, Order(batch_size=4, epochs=1, shuffle=False), limits=Limits(bad_samples=log))
        good = {sample.key: hash_waveform(sample.waveform_N) for batch in stream for sample in batch}
    except ShardError as error:
        assert "train-000000.tar" in str(error)
        assert re.search(r"clip-0000\d|after the start|\(9 samples\)|says", str(error))
        return "refused"
    bad = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    assert all("train-000000.tar" in entry["shard"] and entry["key"] in entry["message"] for entry in bad)
    assert good.keys() | {entry["key"] for entry in bad} == hashes.keys()
    assert all(hashes[key] == value for key, value in good.items())
    return "skipped" if bad else "unharmed"


@pytest.mark.parametrize("known", KNOWN)
def test_a_tar_cut_at_any_byte_is_reported(intact, tmp_path, known):
    data = (intact[0] / "train-000000.tar").read_bytes()
    end = header_offsets(intact[0] / "train-000000.tar")[-1]
    last_byte = end[1] + end[2]
    for cut in sorted(random.Random(1).sample(range(len(data)), 50)):
        verdict = assert_reported(damaged(intact, tmp_path, data[:cut], known=known), intact[1])
        # What is lost behind the last member is padding; without a record of the size nobody is owed it.
        assert verdict == "refused" or (known == "nothing" and cut >= last_byte)


@pytest.mark.parametrize("known", KNOWN)
def test_a_tail_of_zeros_is_reported(intact, tmp_path, known):
    data = (intact[0] / "train-000000.tar").read_bytes()
    borders = [start for start, _, _ in header_offsets(intact[0] / "train-000000.tar")]
    for start in [*borders[1:], *random.Random(2).sample(range(512, borders[-1]), 15)]:
        if known == "nothing" and len(data) - start <= 3 * 10240 and start in borders:
            continue  # byte for byte the end of a shorter shard
        tail = data[:start] + bytes(len(data) - start)
        assert assert_reported(damaged(intact, tmp_path, tail, known=known), intact[1]) != "unharmed"


@pytest.mark.parametrize("known", KNOWN)
def test_a_flipped_byte_in_a_header_is_reported_or_harmless(intact, tmp_path, known):
    data = (intact[0] / "train-000000.tar").read_bytes()
    offsets = [start for start, _, _ in header_offsets(intact[0] / "train-000000.tar")]
    draw = random.Random(3)
    for _ in range(50):
        flipped = bytearray(data)
        flipped[draw.choice(offsets) + draw.randrange(512)] ^= 1 << draw.randrange(8)
        verdict = assert_reported(damaged(intact, tmp_path, bytes(flipped), known=known), intact[1])
        assert verdict == ("unharmed" if known == SAME_CLOCK else "refused")  # data is found without headers


@pytest.mark.parametrize("known", KNOWN)
def test_a_flipped_byte_in_data_is_reported(intact, tmp_path, known):
    data = (intact[0] / "train-000000.tar").read_bytes()
    members = header_offsets(intact[0] / "train-000000.tar")
    draw = random.Random(4)
    for _ in range(50):
        _, start, size = draw.choice(members)
        flipped = bytearray(data)
        flipped[start + draw.randrange(size)] ^= 1 << draw.randrange(8)
        verdict = assert_reported(damaged(intact, tmp_path, bytes(flipped), known=known), intact[1])
        if known != "nothing":
            assert verdict == ("skipped" if known == SAME_CLOCK else "refused")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_where_tarfile_says(tmp_path, tar_format):
    path = tmp_path / "a.tar"
    names = [f"{folder}k{n}" for n, folder in enumerate(["", "part/", "x" * 60 + "/" + "y" * 60 + "/"])]
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            for suffix, data in make_members(number).items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size, member.mtime = len(data), 12.25 + number  # a fraction needs a pax header
                tar.addfile(member, io.BytesIO(data))
    index = load_index(path)
    with tarfile.open(path) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    assert index.keys == names
    for kind, suffix in (("audio", "flac"), ("json", "json")):
        assert [tuple(row[:2]) for row in index.members[kind].tolist()] == [expected[f"{n}.{suffix}"] for n in names]


class Boom:
    """Unpickling this makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name",
    ["k.pyd", "k.pkl", "k.pickle", "k.pth", "k.pt", "k.bin", "k.flac.gz", "k.pyd.gz", "k.pkl.gz", "k.PKL", "k.npy"],
)
def test_executable_members_are_refused_and_never_run(tmp_path, name):
    import gzip

    marker = tmp_path / "was-executed"
    payload = pickle.dumps(Boom(marker))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for member_name, data in {**{f"k.{s}": d for s, d in make_members(1).items()}, name: payload}.items():
            data = gzip.compress(data) if member_name.endswith("gz") else data
            member = tarfile.TarInfo(member_name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ShardError, match=r"a\.tar holds .* executable, pickled and compressed members are refused"):
        ShardStream(path, Order(batch_size=1))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../../x.flac", "/etc/x.flac", "a/../x.flac", "./x.flac", "._x.flac", "a.b.flac", "a b.flac"]
)
def test_names_that_leave_the_shard_or_hide_a_dot_are_refused(tmp_path, name):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ShardError, match=r"a\.tar holds"):
        load_index(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_folders_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("k.flac")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ShardError, match="plain files only"):
        load_index(path)


def write_names(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = make_members(1)[name.partition(".")[2]]
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.flac", "a.json", "b.flac"], "b has audio, but needs audio and json"),
        (["a.json"], "a has json, but needs audio and json"),
        (["a.flac", "a.json", "b.flac", "b.json", "a.flac", "a.json"], "a is there twice"),
        (["a.flac", "b.flac", "a.json", "b.json"], "a is there twice, or its members are not side by side"),
        (["a.flac", "a.flac", "a.json"], "a has two audio members"),
    ],
)
def test_incomplete_and_repeated_samples_are_refused_by_name(tmp_path, names, message):
    write_names(tmp_path / "a.tar", names)
    with pytest.raises(ShardError, match=message):
        load_index(tmp_path / "a.tar")


def test_a_key_in_two_shards_is_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [1, 2])
    write_shard(tmp_path / "b.tar", [3, 2])
    with pytest.raises(ShardError, match=r"clip-00002 is in .*a\.tar and in .*b\.tar"):
        ShardStream(tmp_path, Order(batch_size=1))


def test_an_oversized_member_is_refused_before_it_is_read(tmp_path):
    write_shard(tmp_path / "a.tar", [1])
    with pytest.raises(ShardError, match=r"clip-00001\.flac is \d+ bytes, but a member may have 1000"):
        ShardStream(tmp_path, Order(batch_size=1), limits=Limits(max_member_bytes=1000))


def test_json_that_no_sample_needs_is_refused_before_it_is_read(tmp_path):
    writer = TarWriter(tmp_path / "a.tar")
    writer.add("k.json", b"[" * (2**20 + 1))
    writer.close()
    with pytest.raises(ShardError, match=r"k\.json is 1048577 bytes, but a member may have 1048576"):
        load_index(tmp_path / "a.tar")


def test_headers_forged_with_a_right_checksum_raise_nothing_but_shard_errors(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for suffix, data in make_members(1).items():
            member = tarfile.TarInfo(f"k.{suffix}")
            member.size, member.mtime = len(data), 0.5
            tar.addfile(member, io.BytesIO(data))
    good = path.read_bytes()
    draw, num_refused = random.Random(5), 0
    for _ in range(300):
        forged = bytearray(good)
        start = draw.choice([0, 512, 1024])  # an extended header, its records, the member's header
        for _ in range(draw.randrange(1, 4)):
            forged[start + draw.randrange(160 if start != 512 else 30)] = draw.randrange(256)
        for header in (0, 1024):
            total = sum(forged[header : header + 512]) - sum(forged[header + 148 : header + 156]) + 8 * 32
            forged[header + 148 : header + 156] = b"%06o\0 " % total
        path.write_bytes(forged)
        try:
            build_index(path)
        except ShardError:
            num_refused += 1
    assert 0 < num_refused <= 300


def test_a_copied_shard_keeps_its_index_and_a_changed_one_is_refused(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(3))
    before = load_index(path)
    os.utime(path, ns=(1, 1))
    assert load_index(path).sha256 == before.sha256
    write_shard(path, range(1, 4))
    with pytest.raises(ShardError, match=r"a\.tar has .* but a\.tar\.idx was built from"):
        load_index(path)
    sidecar_path(path).unlink()
    assert load_index(path).keys == [make_key(n) for n in range(1, 4)]


def test_an_index_written_with_its_shard_is_believed_while_it_is_the_newer_file(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(3))
    written = write_index(path)
    (tmp_path / "b").mkdir()
    assert write_index(write_shard(tmp_path / "b" / "a.tar", range(3))).sha256 == written.sha256
    assert sidecar_path(path).read_bytes() == sidecar_path(tmp_path / "b" / "a.tar").read_bytes()
    assert load_index(path).mtime_ns == AS_WRITTEN
    newer = sidecar_path(path).stat().st_mtime_ns + 1
    os.utime(path, ns=(newer, newer))  # as a copy without its times
    assert load_index(path).mtime_ns == newer
    write_index(path)
    write_shard(path, range(1, 4))
    newer = sidecar_path(path).stat().st_mtime_ns + 1
    os.utime(path, ns=(newer, newer))
    with pytest.raises(ShardError, match=r"a\.tar has .* but a\.tar\.idx was built from"):
        load_index(path)


def test_a_shard_packed_again_is_taken_with_its_new_catalog(tmp_path):
    write_shards(tmp_path, [3])
    load_index(tmp_path / "train-000000.tar")
    write_shard(tmp_path / "train-000000.tar", range(5))
    write_catalog(tmp_path)
    assert ShardStream(tmp_path, Order(batch_size=1)).num_samples == 5


def test_a_damaged_sidecar_is_built_again(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(3))
    expected = load_index(path)
    sidecar = sidecar_path(path)
    good = sidecar.read_bytes()
    for place in range(0, len(good), 7):
        sidecar.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        index = load_index(path)
        assert index.keys == expected.keys
        assert all(np.array_equal(index.members[kind], rows) for kind, rows in expected.members.items())
    sidecar.write_bytes(good[: len(good) // 2])
    assert load_index(path).keys == expected.keys


def test_shards_that_the_catalog_does_not_describe_are_refused(tmp_path):
    write_shards(tmp_path, [3, 4])
    write_catalog(tmp_path)
    assert ShardStream(tmp_path, Order(batch_size=1)).num_samples == 7
    second = tmp_path / "train-000001.tar"
    write_shard(second, range(3, 6))
    with pytest.raises(
        ShardError, match=r"train-000001\.tar has 30720 bytes .* built from 40960 bytes .*\(4 samples\)"
    ):
        ShardStream(tmp_path, Order(batch_size=1))
    sidecar_path(second).unlink()
    with pytest.raises(ShardError, match=r"train-000001\.tar has samples 3, but index\.json beside it says 4"):
        ShardStream(tmp_path, Order(batch_size=1))
    second.unlink()
    with pytest.raises(ShardError, match=r"has 1 shards, but its index\.json lists 2: train-000001\.tar is missing"):
        ShardStream(tmp_path, Order(batch_size=1))
    write_shard(tmp_path / "train-000002.tar", [9])
    with pytest.raises(ShardError, match=r"train-000002\.tar is not one of the 2 shards"):
        ShardStream(tmp_path, Order(batch_size=1))


@pytest.mark.parametrize(
    "text", ['{"weight_map": {}}', "[1]", '{"shards": [{"name": "train-000000.tar"}]}', '{"shards": 3}', "{"]
)
@pytest.mark.parametrize(
    "read", [lambda shards: ShardStream(shards, Order(batch_size=1)), partial(verify, workers=1), measure]
)
def test_an_index_json_of_something_else_is_refused_by_its_name(tmp_path, read, text):
    write_shards(tmp_path, [3])
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(
        ShardError, match=r"index\.json cannot be read as what `distill pack` writes \(.*\), but .*pack"
    ):
        read(tmp_path)
