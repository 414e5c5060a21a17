"""The stream's worker processes: what they hold, how batches travel, and how they end."""

import gc
import json
import multiprocessing
import os
import resource
import select
import signal

import numpy as np
import pytest
from tars import SIZES, make_key, make_members, make_waveform, write_shards
from torch.utils.data import DataLoader

from shards.audio.augmentation import Augmentation
from shards.audio.decode import encode_flac, hash_waveform
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from shards.tars.tarwriter import TarWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, SIZES)
    return folder


def test_a_dataloader_with_workers_around_the_stream_is_refused(folder):
    loader = DataLoader(ShardStream(folder, Order(batch_size=2, epochs=1)), batch_size=None, num_workers=1)
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
    stream = ShardStream(folder, Order(batch_size=8, epochs=1), limits=Limits(workers=2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))
    assert sum(len(batch) for batch in stream) == 32


def test_batches_of_any_size_travel_without_shared_memory(long_clips):
    process = multiprocessing.get_context("fork").Process(target=read_without_shared_memory, args=(long_clips,))
    process.start()
    process.join()
    assert process.exitcode == 0


def die_while_reading(folder, pids):
    batches = iter(ShardStream(folder, Order(batch_size=8), limits=Limits(workers=2)))
    next(batches)
    os.write(pids, json.dumps([child.pid for child in multiprocessing.active_children()]).encode())
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_stream_that_is_gone_holds_no_shard_open(folder):
    def count_open() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd"))

    gc.collect()  # of streams of other tests
    before = count_open()
    stream = ShardStream(folder, Order(batch_size=4, epochs=1))
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
    stream = ShardStream(long_clips, Order(batch_size=2, epochs=1), limits=Limits(workers=1), augmentation=augmentation)
    peaks = []
    for batch in stream:
        peaks += [private_bytes(child.pid) for child in multiprocessing.active_children()]
        del batch
    # Its two batches ahead, the one it decodes, their pickled copies, and what Python takes; and the clean clips.
    assert 0 < max(peaks) < num_batches * batch_bytes + megabytes * 2**20


def test_workers_leave_signals_to_the_trainer(folder):
    batches = iter(ShardStream(folder, Order(batch_size=1, epochs=1), limits=Limits(workers=1)))
    read = [next(batches)]
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    read += list(batches)
    assert sum(map(len, read)) == sum(SIZES)
