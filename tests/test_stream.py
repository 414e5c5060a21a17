"""The stream gives every sample once an epoch, in batches that no rank, worker or crash changes."""

import gc
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import select
import signal
import subprocess
import tarfile

import numpy as np
import pytest
import soundfile
from tars import TASKS, make_key, make_members, make_waveform, write_shard, write_shards
from torch.utils.data import DataLoader

from shards.archive import ShardError
from shards.audio import encode_flac, hash_waveform
from shards.augmentation import Augmentation
from shards.plan import Order, Plan, Position
from shards.stream import ShardStream
from shards.tarwriter import TarWriter

SIZES = [5, 1, 9, 3, 7]  # 25 samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, SIZES)
    return folder


def keys_of(stream, num_batches=None):
    return [[(s.key, s.epoch) for s in batch] for batch in itertools.islice(stream, num_batches)]


def plan_rows(plan, num_batches=None):
    return [
        [tuple(pair) for pair in batch.tolist()] for batch, _ in itertools.islice(plan.batches(Position()), num_batches)
    ]


def make_plan(sizes, seconds=None, weights=(1.0,), **options):
    num_samples = sum(sizes)
    seconds = np.random.default_rng(0).uniform(0.1, 30, num_samples) if seconds is None else seconds
    groups = [(np.arange(num_samples)[start :: len(weights)], weight) for start, weight in enumerate(weights)]
    return Plan(Order(**options), np.repeat(np.arange(len(sizes)), sizes), seconds, groups)


@pytest.mark.parametrize("sizes", [[1], [7], [25], [5, 1, 9, 3, 7], [1] * 7, [2, 2, 2], [30, 1], [1, 64, 2]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_batches": 2},
        {"shuffle": False},
        {"batch_seconds": 70.0},
        {"batch_seconds": 70.0, "bucket_batches": 3},
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4, 6, 40])
def test_every_sample_is_planned_once_an_epoch(sizes, options, batch_size):
    rows = plan_rows(make_plan(sizes, batch_size=batch_size, epochs=3, window_shards=2, **options))
    given = [pair for batch in rows for pair in batch]
    assert sorted(given) == [(epoch, row) for epoch in range(3) for row in range(sum(sizes))]
    assert [epoch for epoch, _ in given] == sorted(epoch for epoch, _ in given)
    if "batch_seconds" not in options:
        assert {len(batch) for batch in rows[:-1]} <= {batch_size}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_every_sample_is_read_once_by_any_number_of_ranks_and_workers(folder, world_size, num_workers):
    parts = [
        keys_of(ShardStream(folder, batch_size=4, epochs=2, rank=rank, world_size=world_size, num_workers=num_workers))
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1  # no rank runs dry before another
    read = [pair for part in parts for batch in part for pair in batch]
    assert sorted(read) == sorted((make_key(n), epoch) for n in range(sum(SIZES)) for epoch in range(2))
    alone = keys_of(ShardStream(folder, batch_size=4, epochs=2))
    together = [[None] * len(batch) for batch in alone]
    for rank, part in enumerate(parts):
        for batch, rank_batch in zip(together, part):
            batch[rank::world_size] = rank_batch
    assert together == alone


@pytest.mark.parametrize("sizes", [[1], [2, 5], [1] * 6])
def test_fewer_samples_than_ranks_or_workers_still_come_once(tmp_path, sizes):
    keys = write_shards(tmp_path, sizes)
    parts = [
        keys_of(ShardStream(tmp_path, batch_size=4, epochs=1, rank=r, world_size=4, num_workers=2)) for r in range(4)
    ]
    assert sorted(key for part in parts for batch in part for key, _ in batch) == keys
    assert len({len(part) for part in parts}) == 1


def full(batches):
    """Everything a trainer sees of a batch."""
    return [
        [
            (s.key, s.epoch, s.text, s.task, s.waveform_N.tobytes(), None if s.clean_N is None else s.clean_N.tobytes())
            for s in b
        ]
        for b in batches
    ]


AUGMENTATION = Augmentation(speed_share=0.5, noise_share=0.5, gain_share=0.5, room_share=0.2)


@pytest.mark.parametrize("options", [{}, {"bucket_batches": 2}, {"batch_seconds": 0.9, "bucket_batches": 2}])
def test_resumed_at_twenty_random_points_equals_uninterrupted(folder, options):
    options = {"batch_size": 4, "seed": 3, "augmentation": AUGMENTATION, **options}
    states, batches = [], []
    stream = ShardStream(folder, **options)
    for batch in itertools.islice(stream, 40):
        batches.append(batch)
        states.append(json.dumps(stream.state_dict()))
    assert len(states[-1]) < 500
    expected = full(batches)
    for step in random.Random(0).sample(range(38), 20):
        resumed = ShardStream(folder, **options)
        resumed.load_state_dict(json.loads(states[step]))
        assert full(itertools.islice(resumed, 2)) == expected[step + 1 : step + 3]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (3, 1), (4, 0)])
def test_resumed_on_other_ranks_and_workers_gives_the_same_global_batches(folder, world_size, num_workers):
    stream = ShardStream(folder, batch_size=6, epochs=3, world_size=2, num_workers=1)
    before = keys_of(stream, 5)
    del before
    alone = keys_of(ShardStream(folder, batch_size=6, epochs=3))
    merged = [[None] * len(batch) for batch in alone[5:]]
    for rank in range(world_size):
        resumed = ShardStream(folder, batch_size=6, epochs=3, rank=rank, world_size=world_size, num_workers=num_workers)
        resumed.load_state_dict(stream.state_dict())
        for batch, part in zip(merged, keys_of(resumed), strict=True):
            batch[rank::world_size] = part
    assert merged == alone[5:]


def write_ledger(folder, ledger, num_steps, kill_at):
    """Append each step's state and keys to a file; die by SIGKILL at a step, with the next batches already fetched."""
    stream = ShardStream(folder, batch_size=4, num_workers=1)
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    if lines:
        stream.load_state_dict(json.loads(lines[-1])["state"])
    for step, batch in enumerate(itertools.islice(stream, num_steps - len(lines)), start=len(lines)):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(ledger, "a") as file:
            file.write(json.dumps({"state": stream.state_dict(), "keys": [s.key for s in batch]}) + "\n")


def test_a_run_killed_twice_reads_what_an_uninterrupted_one_reads(folder, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    for kill_at, exit_code in ((3, -9), (11, -9), (None, 0)):
        process = multiprocessing.get_context("fork").Process(target=write_ledger, args=(folder, ledger, 16, kill_at))
        process.start()
        process.join()
        assert process.exitcode == exit_code
    read = [json.loads(line)["keys"] for line in ledger.read_text().splitlines()]
    assert read == [[key for key, _ in batch] for batch in keys_of(ShardStream(folder, batch_size=4), 16)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 5}, "order"),
        ({"seed": 1}, "order"),
        ({"bucket_batches": 1}, "order"),
        ({"tasks": ["asr"]}, "tasks"),
    ],
)
def test_resuming_another_order_is_refused(folder, changes, named):
    state = ShardStream(folder, batch_size=4).state_dict()
    with pytest.raises(ValueError, match=f"the stream's state has {named}"):
        ShardStream(folder, **({"batch_size": 4} | changes)).load_state_dict(state)


def test_resuming_on_changed_data_is_refused(folder, tmp_path):
    write_shards(tmp_path, [*SIZES[:-1], SIZES[-1] + 1])
    state = ShardStream(folder, batch_size=4).state_dict()
    with pytest.raises(ValueError, match=r"the stream's state has data .* restore the shards"):
        ShardStream(tmp_path, batch_size=4).load_state_dict(state)


def test_epochs_differ_and_seeds_differ(folder):
    stream = ShardStream(folder, batch_size=25, epochs=2)
    first, second = keys_of(stream)
    assert [key for key, _ in first] != [key for key, _ in second]
    assert keys_of(ShardStream(folder, batch_size=25, epochs=1, seed=1))[0] != first


def test_shuffled_reads_stay_within_a_window_of_shards():
    plan = make_plan([10] * 12, batch_size=10, epochs=1, window_shards=3)
    shards = [[row // 10 for _, row in batch] for batch in plan_rows(plan)]
    for start in range(0, 12, 3):
        assert len({shard for batch in shards[start : start + 3] for shard in batch}) == 3
    assert len(set(shards[0])) > 1


def test_evaluation_goes_in_order_and_ends_short(folder):
    stream = ShardStream(folder, batch_size=8, epochs=1, shuffle=False, rank=3, world_size=4)
    batches = keys_of(stream)
    assert [len(batch) for batch in batches] == [2, 2, 2, 0]
    assert batches[0] == [(make_key(3), 0), (make_key(7), 0)]
    assert stream.num_samples == 25 and stream.batches_per_epoch == 4


def test_sorted_evaluation_begins_with_the_longest_clips(folder):
    stream = ShardStream(folder, batch_size=4, epochs=1, shuffle=False, bucket_batches=1000)
    lengths = [sample.duration for batch in stream for sample in batch]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 25


def padded_share(plan, seconds):
    batches = [[seconds[row] for _, row in batch] for batch in plan_rows(plan)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


def test_buckets_cut_padding_to_a_quarter():
    seconds = np.random.default_rng(1).uniform(1, 30, 1000)
    options = {"batch_size": 8, "epochs": 1}
    bucketed, plain = (make_plan([100] * 10, seconds, bucket_batches=n, **options) for n in (20, 0))
    assert padded_share(bucketed, seconds) < 0.25 * padded_share(plain, seconds)
    lengths = [max(seconds[row] for _, row in batch) for batch in plan_rows(bucketed)[:20]]
    assert lengths != sorted(lengths, reverse=True)  # whole batches are shuffled again


def test_batches_by_seconds_hold_at_most_that_with_padding():
    seconds = np.random.default_rng(2).uniform(1, 30, 500)
    for bucket_batches in (0, 10):
        plan = make_plan([500], seconds, batch_size=64, epochs=1, batch_seconds=120.0, bucket_batches=bucket_batches)
        padded = [max(seconds[row] for _, row in batch) * len(batch) for batch in plan_rows(plan)]
        assert max(padded) <= 120
        assert plan.batches_per_epoch == len(padded)


def test_a_clip_longer_than_batch_seconds_is_refused():
    with pytest.raises(ValueError, match=r"batch_seconds is 5, but the longest clip has 9\.0 s"):
        make_plan([2], np.array([9.0, 1.0]), batch_size=2, batch_seconds=5.0)


def test_weights_repeat_and_thin_tasks_evenly(folder):
    stream = ShardStream(folder, batch_size=5, epochs=4, weights={"asr": 2.0, "QA": 0.25})
    counts = {task: {} for task in TASKS}
    for sample in itertools.chain.from_iterable(stream):
        counts[sample.task][sample.key] = counts[sample.task].get(sample.key, 0) + 1
    assert set(counts["asr"].values()) == {8} and set(counts["audiocaption"].values()) == {4}
    assert set(counts["QA"].values()) == {1} and len(counts["QA"]) == 8
    assert stream.num_samples == 2 * 9 + 8 + 2


def test_chosen_tasks_come_alone_and_an_unknown_one_is_refused_with_a_hint(folder):
    stream = ShardStream(folder, batch_size=5, epochs=1, tasks=["asr", "QA"])
    assert {sample.task for batch in stream for sample in batch} == {"asr", "QA"} and stream.num_samples == 17
    with pytest.raises(ValueError, match=r"tasks names 'asrr', but the shards hold .* did you mean 'asr'"):
        ShardStream(folder, batch_size=5, tasks=["asrr"])


def test_a_share_of_the_labels_is_the_same_share_on_any_rank_and_resume(folder):
    def shown(**options):
        stream = ShardStream(folder, batch_size=5, epochs=1, labelled_share=0.5, **options)
        return {sample.key for batch in stream for sample in batch if sample.text is not None}

    keys = shown()
    assert 0 < len(keys) < 25
    assert shown(rank=0, world_size=2, seed=1) | shown(rank=1, world_size=2, seed=1) == keys
    only = ShardStream(folder, batch_size=5, epochs=1, labelled_share=0.5, labelled_only=True)
    assert {key for batch in keys_of(only) for key, _ in batch} == keys and only.num_samples == len(keys)
    with pytest.raises(ValueError, match="the stream's state has labels"):
        only.load_state_dict(ShardStream(folder, batch_size=5, epochs=1).state_dict())


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
    "cut": ({"flac": make_members(1)["flac"][:-300]}, "decode"),
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
    stream = ShardStream(tmp_path, batch_size=1, epochs=1, shuffle=False, bad_samples=log)
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
    stream = ShardStream(tmp_path, batch_size=1, epochs=1, num_workers=1)
    batches = []
    with pytest.raises(ValueError, match=r"bad samples are 11 of 11 \(11 decode\), but at most 10 are accepted"):
        batches.extend(stream)
    assert batches == [[]] * 10


def test_a_shard_that_vanishes_or_changes_during_a_run_is_an_error_not_a_skip(tmp_path):
    write_shards(tmp_path, [3, 3])
    for num_workers in (0, 1):
        stream = ShardStream(tmp_path, batch_size=1, epochs=1, shuffle=False, num_workers=num_workers)
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
        writer.add(f"{key}.targets.safetensors", f"what the teacher says of {key}".encode())
    writer.close()


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
        ShardStream(audio, batch_size=2, epochs=1, targets=cache, num_workers=1)
    ):
        assert sample.targets == f"what the teacher says of {sample.key}".encode()


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
            ShardStream(audio, batch_size=2, targets=cache)
    second.unlink()
    with pytest.raises(ShardError, match=r"train-000001\.targets\.tar is missing"):
        ShardStream(audio, batch_size=2, targets=cache)


def test_tasks_that_are_not_read_need_no_target(with_targets):
    audio, cache = with_targets
    write_targets(cache / "train-000001.targets.tar", [make_key(3)])  # 4 is of another task than 0 and 3
    stream = ShardStream(audio, batch_size=2, epochs=1, targets=cache, tasks=["asr"])
    assert sorted(key for batch in keys_of(stream) for key, _ in batch) == [make_key(0), make_key(3)]


def test_a_damaged_target_is_left_out_and_counted(with_targets):
    audio, cache = with_targets
    ShardStream(audio, batch_size=1, targets=cache)
    path = cache / "train-000001.targets.tar"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"says of clip-00004", b"says of clip-00009"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    stream = ShardStream(audio, batch_size=5, epochs=1, targets=cache)
    assert [len(batch) for batch in stream] == [4] and dict(stream.num_bad) == {"checksum": 1}


def test_a_dataloader_with_workers_around_the_stream_is_refused(folder):
    loader = DataLoader(ShardStream(folder, batch_size=2, epochs=1), batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="num_workers is set on a DataLoader around the stream"):
        list(loader)


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory):
    """32 clips of 30 s: 61 MB of waveforms."""
    folder = tmp_path_factory.mktemp("long")
    waveform_N = np.tile(make_waveform(0, 1.0), 30)
    flac = encode_flac(waveform_N)
    fields = make_members(0, duration=30.0, sha256=hash_waveform(waveform_N))["json"]
    writer = TarWriter(folder / "a.tar")
    for number in range(32):
        writer.add(f"{make_key(number)}.flac", flac)
        writer.add(f"{make_key(number)}.json", fields)
    writer.close()
    return folder


def read_without_shared_memory(folder):
    """No file may grow past 16 kB here, and shared memory is a file."""
    stream = ShardStream(folder, batch_size=8, epochs=1, num_workers=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))
    assert sum(len(batch) for batch in stream) == 32


def test_batches_of_any_size_travel_without_shared_memory(long_clips):
    process = multiprocessing.get_context("fork").Process(target=read_without_shared_memory, args=(long_clips,))
    process.start()
    process.join()
    assert process.exitcode == 0


def die_while_reading(folder, pids):
    batches = iter(ShardStream(folder, batch_size=8, num_workers=2))
    next(batches)
    os.write(pids, json.dumps([child.pid for child in multiprocessing.active_children()]).encode())
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_stream_that_is_gone_holds_no_shard_open(folder):
    def count_open() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd"))

    gc.collect()  # of streams of other tests
    before = count_open()
    stream = ShardStream(folder, batch_size=4, epochs=1)
    assert sum(map(len, stream)) == sum(SIZES)
    assert count_open() > before
    del stream
    gc.collect()
    assert count_open() == before


def test_a_killed_trainer_leaves_no_workers_behind(long_clips):
    reading_end, writing_end = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=die_while_reading, args=(long_clips, writing_end))
    process.start()
    pids = json.loads(os.read(reading_end, 1000))
    handles = [os.pidfd_open(pid) for pid in pids]
    process.join()
    for handle in handles:
        assert select.select([handle], [], [], 60)[0]  # readable once the process has ended
        os.close(handle)
    assert len(handles) == 2


def private_bytes(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(("Private_Dirty", "Swap:")))


@pytest.mark.parametrize(
    ("augmentation", "num_batches", "megabytes"),
    [(None, 6, 32), (Augmentation(noise_share=1, room_share=1, gain_share=1), 12, 96)],
)
def test_a_worker_holds_no_more_than_the_documents_say(long_clips, augmentation, num_batches, megabytes):
    batch_bytes = 2 * 30 * 16_000 * 4
    stream = ShardStream(long_clips, batch_size=2, epochs=1, num_workers=1, augmentation=augmentation)
    peaks = []
    for batch in stream:
        peaks += [private_bytes(child.pid) for child in multiprocessing.active_children()]
        del batch
    # Its two batches ahead, the one it decodes, their pickled copies, and what Python takes; and the clean clips.
    assert 0 < max(peaks) < num_batches * batch_bytes + megabytes * 2**20


def test_workers_leave_signals_to_the_trainer(folder):
    batches = iter(ShardStream(folder, batch_size=1, epochs=1, num_workers=1))
    read = [next(batches)]
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    read += list(batches)
    assert sum(map(len, read)) == sum(SIZES)


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
    assert sorted(key for batch in keys_of(ShardStream(tmp_path, batch_size=2, epochs=1)) for key, _ in batch) == [
        make_key(n) for n in range(5)
    ]
