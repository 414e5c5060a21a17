"""Shards are plain WebDataset: other libraries read ours, and the stream reads theirs."""

import json
import subprocess
import tarfile

import pytest
from tars import SIZES, keys_of, make_key, make_members, write_shard, write_shards

from shards.streaming.order import Order
from shards.streaming.stream import ShardStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, SIZES)
    return folder


def test_webdataset_tarfile_and_tar_read_the_shards(folder):
    import webdataset

    path = folder / "train-000002.tar"
    expected = {make_key(n): make_members(n) for n in range(6, 15)}
    read = {
        s["__key__"]: {k: s[k] for k in ("flac", "json")} for s in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert read == expected
    with tarfile.open(path) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == {
            f"{key}.{suffix}": data for key, members in expected.items() for suffix, data in members.items()
        }
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
    assert listed.stderr == "" and len(listed.stdout.splitlines()) == 18


@pytest.mark.parametrize("streaming", [True, False])
def test_the_datasets_library_reads_the_shards(folder, tmp_path, streaming):
    import datasets

    text, number = datasets.Value("string"), datasets.Value("float64")
    fields = dict.fromkeys(("text", "task", "Q", "source", "sha256"), text) | {"duration": number}
    # Without features, it wants torchcodec to look into the audio.
    features = {"__key__": text, "__url__": text, "flac": datasets.Value("binary"), "json": fields}
    rows = datasets.load_dataset("webdataset", data_files=str(folder / "*.tar"), split="train", streaming=streaming,
                                 features=datasets.Features(features), cache_dir=str(tmp_path))  # fmt: skip
    expected = {make_key(n): make_members(n) for n in range(sum(SIZES))}
    read = {row["__key__"]: {"flac": row["flac"], "json": row["json"]} for row in rows}
    assert read == {key: members | {"json": json.loads(members["json"])} for key, members in expected.items()}


def test_shards_of_webdatasets_writer_are_read(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": make_key(number), **make_members(number)})
    write_shard(tmp_path / "b.tar", [4])
    assert sorted(
        key for batch in keys_of(ShardStream(tmp_path, Order(batch_size=2, epochs=1))) for key, _ in batch
    ) == [make_key(n) for n in range(5)]
