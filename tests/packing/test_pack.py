"""Packing: the same bytes whatever the workers and interruptions, nothing replaced, nothing half-written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from clips import to_bytes, tone, write_annotation, write_clips

from distill.cli import main
from shards.audio.decode import decode_audio, hash_waveform, load_audio
from shards.audio.limits import AudioLimits
from shards.files.lock import FileLock
from shards.files.space import check_space
from shards.manifests.manifest import KnownTasks, read_manifest
from shards.packing import pack as pack_module
from shards.packing import space
from shards.packing.audit import audit
from shards.packing.encode import EncodeOptions, StopPacking
from shards.packing.folder import ShardSize
from shards.packing.pack import LOCK, pack
from shards.packing.verify import verify
from shards.pool import IN_FLIGHT, map_in_order
from shards.streaming.catalog import check_channels
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream


@pytest.fixture
def manifest(tmp_path) -> Path:
    return write_annotation(tmp_path / "train.json", write_clips(tmp_path, 40))


def test_a_second_pack_into_one_folder_is_refused_by_the_firsts_process_and_a_killed_one_is_not(tmp_path):
    tiny.make_shards(tmp_path, num_samples=2)
    lock = FileLock.acquire(tmp_path / "train" / LOCK)
    told = rf"train is being packed by .*\(process {os.getpid()} on .*since .*\), but a folder takes one pack at a time"
    with pytest.raises(FileExistsError, match=told):
        pack(tmp_path / "train.json", tmp_path / "train", name="train", workers=1)
    lock.release()
    assert (
        pack(tmp_path / "train.json", tmp_path / "train", name="train", size=ShardSize(5), workers=1).num_samples == 2
    )


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_while_packing_is_one_line_with_the_files_name(tmp_path, capsys, limit):
    tiny.make_shards(tmp_path, num_samples=4)
    with tiny.full_disk(limit):
        assert main(["pack", str(tmp_path / "train.json"), str(tmp_path / "out"), "--workers", "1"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"error: {tmp_path}/out/train" in errors[0] and "(File too large)" in errors[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_samples(folder: Path) -> list[tuple[str, dict, bytes]]:
    """Key, JSON and FLAC of every sample, in order, by tarfile alone."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert [Path(member.name).suffix for member in members] == [".flac", ".json"] * (len(members) // 2)
            for flac, fields in zip(members[::2], members[1::2]):
                assert flac.name.partition(".")[0] == fields.name.partition(".")[0]
                read = tar.extractfile(fields).read(), tar.extractfile(flac).read()
                samples.append((flac.name.removesuffix(".flac"), json.loads(read[0]), read[1]))
    return samples


def test_every_row_becomes_a_sample_with_its_own_audio_and_text(manifest, tmp_path):
    report = pack(manifest, tmp_path / "out", size=ShardSize(15), workers=1)
    entries = list(read_manifest(manifest))
    assert (report.num_shards, report.num_samples, report.bad) == (3, 40, ())
    for entry, (key, fields, flac) in zip(entries, read_samples(tmp_path / "out"), strict=True):
        waveform_N = load_audio(entry.paths)
        assert key == entry.key
        assert hash_waveform(decode_audio(flac, name=key)) == hash_waveform(waveform_N)
        assert fields == {
            "text": entry.text,
            "task": "asr",
            "Q": None,
            "source": tmp_path.name,
            "duration": len(waveform_N) / 16_000,
            "sha256": hash_waveform(waveform_N),
        }


def test_the_index_says_what_the_shards_are(manifest, tmp_path):
    report = pack(manifest, tmp_path / "out", size=ShardSize(15), workers=1)
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [shard["name"] for shard in index["shards"]] == [f"train-{number:06d}.tar" for number in range(3)]
    assert [shard["samples"] for shard in index["shards"]] == [15, 15, 10]
    assert [shard["bytes"] for shard in index["shards"]] == [
        (tmp_path / "out" / shard["name"]).stat().st_size for shard in index["shards"]
    ]
    seconds = sum(fields["duration"] for _, fields, _ in read_samples(tmp_path / "out"))
    assert index["seconds"] == pytest.approx(seconds) == pytest.approx(report.seconds)


def test_packing_gives_the_same_bytes_whatever_the_workers(manifest, tmp_path):
    pack(manifest, tmp_path / "one", size=ShardSize(9), workers=1)
    pack(manifest, tmp_path / "two", size=ShardSize(9), workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_shard_holds_at_most_its_bytes(manifest, tmp_path):
    pack(manifest, tmp_path / "out", size=ShardSize(bytes=100_000), workers=1)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert len(sizes) > 2
    assert max(sizes) <= 100_000 + 10_240  # the end of an archive is padded to a record


def test_a_clip_larger_than_a_shard_has_one_of_its_own(manifest, tmp_path):
    report = pack(manifest, tmp_path / "out", size=ShardSize(bytes=1_000), workers=1)
    assert report.num_shards == report.num_samples == 40


def test_a_run_that_was_interrupted_goes_on_and_ends_with_the_same_bytes(manifest, tmp_path):
    pack(manifest, tmp_path / "whole", size=ShardSize(9), workers=1)
    pack(manifest, tmp_path / "out", size=ShardSize(9), workers=1)
    out = tmp_path / "out"
    record = json.loads((out / "index.json").read_text())
    record["shards"] = record["shards"][:2]
    (out / "index.partial.json").write_text(json.dumps(record))
    (out / "index.json").unlink()
    for number in (2, 3, 4):
        (out / f"train-{number:06d}.tar").unlink()
    (out / ".train-000002.tar.tmp").write_bytes(b"half a shard")
    before = (out / "train-000001.tar").stat().st_mtime_ns
    report = pack(manifest, out, size=ShardSize(9), workers=1)
    assert report.num_resumed == 2
    assert (out / "train-000001.tar").stat().st_mtime_ns == before
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_pack_is_left_alone_and_a_damaged_shard_is_made_again(manifest, tmp_path):
    out = tmp_path / "out"
    pack(manifest, out, size=ShardSize(9), workers=1)
    before = contents(out)
    assert pack(manifest, out, size=ShardSize(9), workers=1).num_resumed == 5
    damaged = bytearray(before["train-000003.tar"])
    damaged[5_000] ^= 1
    (out / "train-000003.tar").write_bytes(damaged)
    assert pack(manifest, out, size=ShardSize(9), workers=1).num_resumed == 3
    assert contents(out) == before


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_whole_shards_only_and_the_next_run_ends_the_work(tmp_path, kill):
    rows = write_clips(tmp_path, 8, seconds=2.0) * 20
    manifest, out = write_annotation(tmp_path / "train.json", rows), tmp_path / "out"
    program = (
        "import sys; from shards.packing.pack import ShardSize, pack; "
        "pack(sys.argv[1], sys.argv[2], size=ShardSize(4), workers=2)"
    )
    script = tmp_path / "run.py"
    script.write_text(f"if __name__ == '__main__':\n    {program}\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, script, manifest, out], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(list(out.glob("*.tar")) if out.exists() else []) < 2:
        assert process.poll() is None, "packing ended before it could be interrupted"
        time.sleep(0.005)
    os.killpg(process.pid, kill)
    process.wait(timeout=60)
    shards = sorted(out.glob("*.tar"))
    record = json.loads((out / "index.partial.json").read_text())
    assert not (out / "index.json").exists()
    for path in shards:
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == 8
    if kill == signal.SIGINT:
        assert not list(out.glob(".*"))
    report = pack(manifest, out, size=ShardSize(4), workers=1)
    assert report.num_resumed == len(record["shards"]) >= 1
    assert report.num_samples == 160
    assert not list(out.glob(".*"))
    assert verify(out, workers=1).num_samples == 160


def test_a_folder_of_another_pack_is_refused_with_both_values(manifest, tmp_path):
    pack(manifest, tmp_path / "out", size=ShardSize(9), workers=1)
    with pytest.raises(ValueError, match="shard_samples 9, but this run's is 10"):
        pack(manifest, tmp_path / "out", size=ShardSize(10), workers=1)
    write_annotation(manifest, write_clips(tmp_path, 39))
    with pytest.raises(ValueError, match="has manifest_sha256"):
        pack(manifest, tmp_path / "out", size=ShardSize(9), workers=1)


def test_bad_samples_are_left_out_counted_and_written_down_with_their_reason(tmp_path):
    rows = write_clips(tmp_path, 12)
    (tmp_path / "clip003.wav").write_bytes(b"")
    (tmp_path / "clip004.wav").write_bytes(to_bytes(tone(3.0))[:9_000])
    (tmp_path / "clip005.wav").write_bytes(to_bytes(np.zeros(16_000, np.float32)))
    (tmp_path / "clip006.wav").write_bytes(to_bytes(tone(31.0)))
    rows[7] = {**rows[7], "text": ""}
    (tmp_path / "clip008.wav").unlink()
    (tmp_path / "clip008.wav").mkdir()
    manifest = write_annotation(tmp_path / "train.json", rows)
    report = pack(manifest, tmp_path / "out", size=ShardSize(4), workers=1)
    lines = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    reasons = {3: "decode", 4: "truncated", 5: "silent", 6: "too_long", 7: "empty_text", 8: "unreadable"}
    assert {line["number"]: line["reason"] for line in lines} == reasons
    assert lines[0]["path"] == str(tmp_path / "clip003.wav")
    assert lines[1]["numbers"]["missing"] == 96_044 - 9_000
    assert lines[4]["numbers"] == {"field": "annotation[7].text"}
    texts = [fields["text"] for _, fields, _ in read_samples(tmp_path / "out")]
    assert texts == [f"tone {number}" for number in (0, 1, 2, 9, 10, 11)]
    assert "6 bad" in str(report)
    assert pack(manifest, tmp_path / "out", size=ShardSize(4), workers=1).bad == report.bad


def test_a_row_whose_task_asks_for_a_question_is_left_out_without_one(tmp_path):
    rows = [{**row, "task": "QA"} for row in write_clips(tmp_path, 3)]
    rows[0]["Q"], rows[2]["Q"] = "Which tone?", ""
    manifest = write_annotation(tmp_path / "m.json", rows)
    report = pack(manifest, tmp_path / "out", tasks=KnownTasks(questions={"QA"}), workers=1)
    assert [(bad.number, bad.reason) for bad in report.bad] == [(1, "missing_question"), (2, "missing_question")]
    assert "annotation[1].Q is missing, but the prompt of task 'QA' is the row's" in report.bad[0].message
    assert report.num_samples == 1 and pack(manifest, tmp_path / "any", workers=1).num_samples == 3


def test_too_many_bad_samples_end_the_run_with_the_reasons(tmp_path):
    rows = write_clips(tmp_path, 30)
    for number in range(11):
        (tmp_path / f"clip{number:03d}.wav").write_bytes(b"<html>")
    manifest = write_annotation(tmp_path / "train.json", rows)
    with pytest.raises(ValueError, match=r"bad samples are 11 of 30 \(11 decode\), but 10 are accepted at most"):
        pack(manifest, tmp_path / "out", workers=1)
    assert len((tmp_path / "out/bad_samples.jsonl").read_text().splitlines()) == 11
    assert not list((tmp_path / "out").glob("*.tar"))
    assert pack(manifest, tmp_path / "out", workers=1, max_bad_share=0.5).num_samples == 19


def test_unknown_tasks_and_missing_files_are_refused_before_any_work(manifest, tmp_path):
    with pytest.raises(ValueError, match=r"is 'asr', but there are prompts for QA alone"):
        pack(manifest, tmp_path / "out", tasks=KnownTasks({"QA"}), workers=1)
    (tmp_path / "clip010.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation\[10\]\.path is .*; nearest in"):
        pack(manifest, tmp_path / "out", workers=1)
    with pytest.raises(FileNotFoundError, match=r"nearest in .*train\.json"):
        pack(tmp_path / "trian.json", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "text", "too_long", "expected"),
    [
        ("asr", "words", "auto", []),
        ("asr", None, "auto", [30.0]),
        ("audiocaption", "a tone", "auto", [30.0]),
        ("asr", "words", "cut", [30.0]),
        ("audiocaption", "a tone", "skip", []),
        ("asr", None, "chunk", [30.0, 30.0, 15.0]),
        ("asr", "words", "chunk", []),
    ],
)
def test_a_clip_over_thirty_seconds_is_treated_as_its_label_allows(tmp_path, task, text, too_long, expected):
    rows = write_clips(tmp_path, 1)
    (tmp_path / "long.wav").write_bytes(to_bytes(tone(75.0)))
    rows.append({"path": "long.wav", "text": text, "task": task})
    manifest = write_annotation(tmp_path / "train.json", rows)
    report = pack(manifest, tmp_path / "out", options=EncodeOptions(too_long), workers=1)
    samples = read_samples(tmp_path / "out")[1:]
    assert [fields["duration"] for _, fields, _ in samples] == expected
    assert [bad.reason for bad in report.bad] == ([] if expected else ["too_long"])
    assert len({key for key, _, _ in samples}) == len(samples)
    assert verify(tmp_path / "out", workers=1).num_samples == 1 + len(expected)


def test_a_silent_piece_of_a_chunked_recording_is_left_out_by_itself(tmp_path):
    clip = np.concatenate([tone(30.0), np.zeros(480_000, np.float32), tone(10.5, frequency=300.0)])
    (tmp_path / "long.wav").write_bytes(to_bytes(clip))
    manifest = write_annotation(tmp_path / "m.json", [{"path": "long.wav", "task": "asr"}])
    report = pack(manifest, tmp_path / "out", options=EncodeOptions("chunk"), workers=1)
    (first, _, first_flac), (last, fields, last_flac) = read_samples(tmp_path / "out")
    assert [first[-5:], last[-5:]] == ["-0000", "-0002"]
    assert fields["duration"] == 10.5
    whole_N = decode_audio(to_bytes(clip), name="long", limits=AudioLimits(max_seconds=100.0))
    np.testing.assert_array_equal(decode_audio(first_flac, name="first"), whole_N[:480_000])
    np.testing.assert_array_equal(decode_audio(last_flac, name="last"), whole_N[960_000:])
    assert [bad.reason for bad in report.bad] == ["silent"]


def test_a_clip_over_thirty_seconds_can_end_the_run(tmp_path):
    (tmp_path / "long.wav").write_bytes(to_bytes(tone(31.0)))
    manifest = write_annotation(tmp_path / "m.json", [{"path": "long.wav", "text": "words", "task": "asr"}])
    with pytest.raises(StopPacking, match=r"has 31\.0 s, but at most 30 s"):
        pack(manifest, tmp_path / "out", options=EncodeOptions("error"), workers=1)
    with pytest.raises(ValueError, match="too_long is 'shorten', but must be one of"):
        EncodeOptions("shorten")


@pytest.mark.parametrize(
    ("task", "text", "is_kept"),
    [("audiocaption", "complete silence in a room", True), ("audiocaption", "a dog", False), ("asr", "silence", False)],
)
def test_a_silent_clip_is_kept_only_where_the_label_says_so(tmp_path, task, text, is_kept):
    rows = write_clips(tmp_path, 1)
    (tmp_path / "silent.wav").write_bytes(to_bytes(np.zeros(16_000, np.float32)))
    manifest = write_annotation(tmp_path / "m.json", [*rows, {"path": "silent.wav", "text": text, "task": task}])
    report = pack(manifest, tmp_path / "out", workers=1)
    assert report.num_samples == 1 + is_kept
    assert [bad.reason for bad in report.bad] == ([] if is_kept else ["silent"])


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_folder_with_a_damaged_record_is_refused_by_its_name(manifest, tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"index\.json cannot be read as the record of a pack \(.*\), but .*; remove it"
    ):
        pack(manifest, tmp_path, workers=1)


def test_unlabelled_rows_are_packed_with_a_null_text(tmp_path):
    rows = [{"path": row["path"], "task": "asr"} for row in write_clips(tmp_path, 2)]
    pack(write_annotation(tmp_path / "m.json", rows), tmp_path / "out", workers=1)
    assert [fields["text"] for _, fields, _ in read_samples(tmp_path / "out")] == [None, None]


@pytest.mark.parametrize("change", ["flip", "cut", "swap", "remove"])
def test_verify_finds_what_changed_and_names_it(manifest, tmp_path, change):
    out = tmp_path / "out"
    pack(manifest, out, size=ShardSize(20), workers=1)
    assert verify(out, workers=1).num_samples == 40
    shard = out / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    if change == "flip":
        data[3_000] ^= 4
        shard.write_bytes(data)
    elif change == "cut":
        shard.write_bytes(data[:-20_000])
    elif change == "swap":
        shutil.copy(out / "train-000000.tar", shard)
    else:
        shard.unlink()
    with pytest.raises(ValueError, match=r"not as it was packed: .*train-000001\.tar"):
        verify(out, workers=1)


def test_verify_finds_a_wrong_sample_even_where_every_hash_of_the_index_agrees(manifest, tmp_path):
    out = tmp_path / "out"
    pack(manifest, out, workers=1)
    entries = read_samples(out)
    from shards.files.hash import hash_file
    from shards.tars.tarwriter import TarWriter

    writer = TarWriter(out / "train-000000.tar")
    for number, (key, fields, flac) in enumerate(entries):
        writer.add(f"{key}.flac", entries[0][2] if number == 7 else flac)
        writer.add(f"{key}.json", json.dumps(fields).encode())
    writer.close()
    index = json.loads((out / "index.json").read_text())
    index["shards"][0]["sha256"] = hash_file(out / "train-000000.tar")
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{entries[7][0]} decodes to other samples than were packed"):
        verify(out, workers=1)


def test_webdataset_and_tar_read_the_shards(manifest, tmp_path):
    import webdataset

    out = tmp_path / "out"
    pack(manifest, out, size=ShardSize(40), workers=1)
    expected = read_samples(out)
    url = str(out / "train-000000.tar")
    plain = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [(row["__key__"], json.loads(row["json"]), row["flac"]) for row in plain] == expected
    listing = subprocess.run(["tar", "-tvf", url], check=True, capture_output=True, text=True)
    assert len(listing.stdout.splitlines()) == 80
    assert listing.stderr == ""
    subprocess.run(["tar", "-xf", url, "-C", tmp_path], check=True)
    samples_N, rate = soundfile.read(tmp_path / f"{expected[5][0]}.flac", dtype="float32")
    assert rate == 16_000
    np.testing.assert_array_equal(samples_N, load_audio([tmp_path / "clip005.wav"]))


def test_the_command_packs_verifies_and_counts(manifest, tmp_path, capsys):
    def run(*arguments) -> int:
        parser = ArgumentParser()
        pack_module.add_arguments(parser)
        return pack_module.main(parser.parse_args([str(argument) for argument in arguments]), tasks=KnownTasks({"asr"}))

    assert run(manifest, tmp_path / "out", "--workers", 1, "--shard-samples", 20, "--name", "digits") == 0
    assert "2 shards (0 were done), 40 samples" in capsys.readouterr().out
    assert (tmp_path / "out/digits-000001.tar").exists()
    assert run("--verify", tmp_path / "out", "--workers", 1) == 0
    assert "40 samples, 0.01 h, all as written" in capsys.readouterr().out
    with pytest.raises(ValueError, match="out is missing"):
        run(manifest)
    (tmp_path / "all").mkdir()
    (tmp_path / "out").rename(tmp_path / "all" / "out")
    with pytest.raises(FileNotFoundError, match=r"all is no packed folder, but .*all/out are; name one"):
        run("--verify", tmp_path / "all")


def test_a_full_disk_is_an_error_and_leaves_whole_shards_only(manifest, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a write past it fails, as one to a full disk does
    try:
        with pytest.raises(OSError, match="File too large"):
            pack(manifest, tmp_path / "out", size=ShardSize(20), workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out").iterdir()) == []
    assert pack(manifest, tmp_path / "out", size=ShardSize(20), workers=1).num_samples == 40


def test_a_disk_without_room_is_refused_before_any_work_with_both_numbers(tmp_path):
    rows = write_clips(tmp_path, 1, seconds=20.0) * 100
    manifest = write_annotation(tmp_path / "train.json", rows)
    num_rows, some = pack_module._survey(manifest, None, KnownTasks())
    report = pack(manifest, tmp_path / "out", workers=1)
    estimate = space.estimate_bytes(some, num_rows, longest=30.0)
    assert report.num_bytes / 4 < estimate < 4 * report.num_bytes  # a tone packs better than speech
    with pytest.raises(
        OSError, match=r"shards in .* need about 1\.2e\+\d+ GB, but the file system at / has [0-9.e+]+ GB free"
    ):
        check_space(tmp_path / "not" / "yet", 10**24, "shards", remedy="free some space")
    assert not (tmp_path / "not").exists()


def test_entries_are_chosen_evenly_from_a_stream_of_any_length():
    for count in (0, 1, 399, 400, 12_345):
        choice = space.EvenChoice()
        for number in range(count):
            choice.add(number)
        steps = np.diff(choice.chosen)
        assert len(choice.chosen) == count if count < 400 else 200 <= len(choice.chosen) < 400
        assert len(set(steps)) <= 1


def test_shards_come_with_the_index_that_the_stream_needs_and_it_is_verified(manifest, tmp_path):
    out = tmp_path / "out"
    pack(manifest, out, size=ShardSize(20), workers=1)
    before = contents(out)
    assert {name for name in before if name.endswith(".idx")} == {f"train-00000{n}.tar.idx" for n in (0, 1)}
    assert ShardStream(out, Order(batch_size=1)).num_samples == 40
    assert contents(out) == before  # nothing was walked again and written
    shutil.copy(out / "train-000000.tar.idx", out / "train-000001.tar.idx")
    with pytest.raises(ValueError, match=r"train-000001\.tar\.idx is missing or not of this shard"):
        verify(out, workers=1)
    (out / "train-000001.tar.idx").unlink()
    assert pack(manifest, out, size=ShardSize(20), workers=1).num_resumed == 2
    assert contents(out) == before


def test_a_worker_that_dies_is_an_error_in_words():
    with pytest.raises(ValueError, match="a worker of 2 was killed, most likely for memory; use fewer workers"):
        list(map_in_order(os._exit, [1, 1], workers=2))


def test_work_is_taken_up_only_as_fast_as_it_is_done():
    taken = []
    results = map_in_order(abs, (taken.append(number) or -number for number in range(100)), workers=2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) <= 10 + IN_FLIGHT * 2
    results.close()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count"), [("fsdd/test", 400), ("kathleen/test", 100), ("esc10/test", 120), ("gender/all", 50)]
)
def test_real_data_goes_through_audit_pack_and_stream_with_its_counts(shared, tmp_path, name, count):
    audited = audit([shared / f"data/{name}.json"], tmp_path / "audited", workers=1)
    report = pack(audited.cleaned[0], tmp_path / "out", size=ShardSize(64), workers=1)
    assert (audited.num_kept, report.num_samples, report.bad) == (count, count, ())
    stream = ShardStream(tmp_path / "out", Order(batch_size=16, epochs=1, shuffle=False))
    samples = [sample for batch in stream for sample in batch]
    entries = read_manifest(shared / f"data/{name}.json")
    expected = [(entry.text, entry.task, entry.question, entry.source) for entry in entries]
    assert [(sample.text, sample.task, sample.question, sample.source) for sample in samples] == expected
    assert sum(sample.duration for sample in samples) == pytest.approx(report.seconds)


@pytest.mark.shared
def test_the_odd_files_that_do_not_decode_are_the_bad_samples(shared, tmp_path):
    files = json.loads((shared / "data/odd/files.json").read_text())
    rows = [{"path": str(shared / "data/odd" / file["path"]), "text": "odd", "task": "caption"} for file in files]
    report = pack(write_annotation(tmp_path / "odd.json", rows), tmp_path / "out", workers=1)
    assert [bad.number for bad in report.bad] == [i for i, file in enumerate(files) if "error" in file["status"]]
    assert report.num_samples == sum("error" not in file["status"] for file in files)


def test_the_left_channel_is_packed_unless_the_mean_is_asked_for_and_the_two_are_not_read_together(tmp_path):
    left_N, right_N = np.full(8_000, 0.5, np.float32), np.full(8_000, -0.25, np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left_N, right_N], 1), 16_000)
    (tmp_path / "m.json").write_text(json.dumps({"annotation": [{"path": "a.wav", "text": "a", "task": "asr"}]}))
    for channels, value in (("left", 0.5), ("mean", 0.125)):
        out = tmp_path / channels
        pack(tmp_path / "m.json", out, name=channels, options=EncodeOptions(channels=channels), workers=1)
        assert json.loads((out / "index.json").read_text())["options"]["channels"] == channels
        (sample,) = next(iter(ShardStream(out, Order(batch_size=1, epochs=1))))
        np.testing.assert_allclose(sample.waveform_N, value, atol=1e-4)
    with pytest.raises(ValueError, match=r"channels of .*left/ left, .*mean/ mean, but .* pack one of them again"):
        ShardStream([str(tmp_path / "left/*.tar"), str(tmp_path / "mean/*.tar")], Order(batch_size=1))
    with pytest.raises(ValueError, match=r"channels of .*left left, .*mean mean, but .* pack one of them again"):
        check_channels([tmp_path / "left", tmp_path / "none", tmp_path / "mean"])
    check_channels([tmp_path / "left", tmp_path / "none"])
    with pytest.raises(ValueError, match=r"another|options"):
        pack(tmp_path / "m.json", tmp_path / "left", name="left", options=EncodeOptions(channels="mean"), workers=1)
