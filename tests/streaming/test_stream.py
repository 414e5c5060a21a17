"""The stream gives every sample once an epoch, in batches that no rank, worker or crash changes."""

import itertools
import json
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
from tars import SIZES, TASKS, keys_of, make_key, write_shards

from shards.audio.augmentation import Augmentation
from shards.streaming.limits import Limits
from shards.streaming.order import Order, Plan, Position
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, SIZES)
    return folder


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
        keys_of(
            ShardStream(
                folder,
                Order(batch_size=4, epochs=2),
                limits=Limits(workers=num_workers),
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1  # no rank runs dry before another
    read = [pair for part in parts for batch in part for pair in batch]
    assert sorted(read) == sorted((make_key(n), epoch) for n in range(sum(SIZES)) for epoch in range(2))
    alone = keys_of(ShardStream(folder, Order(batch_size=4, epochs=2)))
    together = [[None] * len(batch) for batch in alone]
    for rank, part in enumerate(parts):
        for batch, rank_batch in zip(together, part):
            batch[rank::world_size] = rank_batch
    assert together == alone


@pytest.mark.parametrize("sizes", [[1], [2, 5], [1] * 6])
def test_fewer_samples_than_ranks_or_workers_still_come_once(tmp_path, sizes):
    keys = write_shards(tmp_path, sizes)
    parts = [
        keys_of(ShardStream(tmp_path, Order(batch_size=4, epochs=1), limits=Limits(workers=2), rank=r, world_size=4))
        for r in range(4)
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
    order = Order(4, seed=3, **options)
    states, batches = [], []
    stream = ShardStream(folder, order, augmentation=AUGMENTATION)
    for batch in itertools.islice(stream, 40):
        batches.append(batch)
        states.append(json.dumps(stream.state_dict()))
    assert len(states[-1]) < 1000
    expected = full(batches)
    for step in random.Random(0).sample(range(38), 20):
        resumed = ShardStream(folder, order, augmentation=AUGMENTATION)
        resumed.load_state_dict(json.loads(states[step]))
        assert full(itertools.islice(resumed, 2)) == expected[step + 1 : step + 3]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (3, 1), (4, 0)])
def test_resumed_on_other_ranks_and_workers_gives_the_same_global_batches(folder, world_size, num_workers):
    stream = ShardStream(folder, Order(batch_size=6, epochs=3), limits=Limits(workers=1), world_size=2)
    before = keys_of(stream, 5)
    del before
    alone = keys_of(ShardStream(folder, Order(batch_size=6, epochs=3)))
    merged = [[None] * len(batch) for batch in alone[5:]]
    for rank in range(world_size):
        resumed = ShardStream(
            folder, Order(batch_size=6, epochs=3), limits=Limits(workers=num_workers), rank=rank, world_size=world_size
        )
        resumed.load_state_dict(stream.state_dict())
        for batch, part in zip(merged, keys_of(resumed), strict=True):
            batch[rank::world_size] = part
    assert merged == alone[5:]


def write_ledger(folder, ledger, num_steps, kill_at):
    """Append each step's state and keys to a file; die by SIGKILL at a step, with the next batches already fetched."""
    stream = ShardStream(folder, Order(batch_size=4), limits=Limits(workers=1))
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
    assert read == [[key for key, _ in batch] for batch in keys_of(ShardStream(folder, Order(batch_size=4)), 16)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 5}, "order.batch_size 4, but this stream has 5; set it as it was"),
        ({"seed": 1, "bucket_batches": 2}, "order.bucket_batches 0, but .* 2; order.seed 0, but this stream has 1"),
        ({"task_weights": {"asr": 2.0}}, "order.weights.asr None, but this stream has 2.0"),
    ],
)
def test_resuming_another_order_is_refused(folder, changes, named):
    state = ShardStream(folder, Order(batch_size=4)).state_dict()
    with pytest.raises(ValueError, match=f"the stream's state has {named}"):
        ShardStream(folder, Order(**({"batch_size": 4} | changes))).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tasks": ["asr"]}, "tasks"),
        ({"labelled_share": 0.5}, "labels 1 and others, but this stream has 0.5 and others"),
        ({"sample_weights": {"a": 2.0}}, "sample_weights none"),
    ],
)
def test_resuming_another_selection_is_refused(folder, changes, named):
    state = ShardStream(folder, Order(4)).state_dict()
    with pytest.raises(ValueError, match=f"the stream's state has {named}"):
        ShardStream(folder, Order(4), Selection(**changes)).load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        (Order, {"batch_size": 0}, "batch_size is 0, but it must be above 0"),
        (Selection, {"labelled_share": 1.5}, "labelled_share is 1.5, but a share is 0 to 1"),
        (Selection, {"student_share": float("nan")}, "student_share is nan"),
        (Selection, {"sample_weights": {"a": -1.0}}, r"sample_weights\['a'\] is -1.0, but what counts is 0 or more"),
        (Limits, {"workers": -1}, "workers is -1, but it must be 0"),
        (Limits, {"max_bad": 2}, "max_bad is 2, but a share is 0 to 1"),
        (Limits, {"max_member_bytes": 0}, "max_member_bytes is 0, but it must be above 0"),
    ],
)
def test_an_option_out_of_its_range_is_refused_before_a_shard_is_opened(kind, option, message):
    with pytest.raises(ValueError, match=message):
        kind(**option)


def test_resuming_on_changed_data_is_refused(folder, tmp_path):
    write_shards(tmp_path, [*SIZES[:-1], SIZES[-1] + 1])
    state = ShardStream(folder, Order(batch_size=4)).state_dict()
    with pytest.raises(ValueError, match=r"the stream's state has data .* restore the shards"):
        ShardStream(tmp_path, Order(batch_size=4)).load_state_dict(state)


def test_epochs_differ_and_seeds_differ(folder):
    stream = ShardStream(folder, Order(batch_size=25, epochs=2))
    first, second = keys_of(stream)
    assert [key for key, _ in first] != [key for key, _ in second]
    assert keys_of(ShardStream(folder, Order(batch_size=25, epochs=1, seed=1)))[0] != first


def test_shuffled_reads_stay_within_a_window_of_shards():
    plan = make_plan([10] * 12, batch_size=10, epochs=1, window_shards=3)
    shards = [[row // 10 for _, row in batch] for batch in plan_rows(plan)]
    for start in range(0, 12, 3):
        assert len({shard for batch in shards[start : start + 3] for shard in batch}) == 3
    assert len(set(shards[0])) > 1


def test_evaluation_goes_in_order_and_ends_short(folder):
    stream = ShardStream(folder, Order(batch_size=8, epochs=1, shuffle=False), rank=3, world_size=4)
    batches = keys_of(stream)
    assert [len(batch) for batch in batches] == [2, 2, 2, 0]
    assert batches[0] == [(make_key(3), 0), (make_key(7), 0)]
    assert stream.num_samples == 25 and stream.batches_per_epoch == 4


def test_sorted_evaluation_begins_with_the_longest_clips(folder):
    stream = ShardStream(folder, Order(batch_size=4, epochs=1, shuffle=False, bucket_batches=1000))
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
    stream = ShardStream(folder, Order(batch_size=5, epochs=4, task_weights={"asr": 2.0, "QA": 0.25}))
    counts = {task: {} for task in TASKS}
    for sample in itertools.chain.from_iterable(stream):
        counts[sample.task][sample.key] = counts[sample.task].get(sample.key, 0) + 1
    assert set(counts["asr"].values()) == {8} and set(counts["audiocaption"].values()) == {4}
    assert set(counts["QA"].values()) == {1} and len(counts["QA"]) == 8
    assert stream.num_samples == 2 * 9 + 8 + 2


def test_chosen_tasks_come_alone_and_an_unknown_one_is_refused_with_a_hint(folder):
    stream = ShardStream(folder, Order(batch_size=5, epochs=1), Selection(tasks=["asr", "QA"]))
    assert {sample.task for batch in stream for sample in batch} == {"asr", "QA"} and stream.num_samples == 17
    with pytest.raises(ValueError, match=r"tasks names 'asrr', but the shards hold .* did you mean 'asr'"):
        ShardStream(folder, Order(batch_size=5), Selection(tasks=["asrr"]))


def test_a_share_of_the_labels_is_the_same_share_on_any_rank_and_resume(folder):
    def shown(seed=0, **ranks):
        stream = ShardStream(folder, Order(5, seed=seed, epochs=1), Selection(labelled_share=0.5), **ranks)
        return {sample.key for batch in stream for sample in batch if sample.text is not None}

    keys = shown()
    assert 0 < len(keys) < 25
    assert shown(rank=0, world_size=2, seed=1) | shown(rank=1, world_size=2, seed=1) == keys
    only = ShardStream(folder, Order(batch_size=5, epochs=1), Selection(labelled_share=0.5, labelled_only=True))
    assert {key for batch in keys_of(only) for key, _ in batch} == keys and only.num_samples == len(keys)
    with pytest.raises(ValueError, match="the stream's state has labels"):
        only.load_state_dict(ShardStream(folder, Order(batch_size=5, epochs=1)).state_dict())
