"""The exact, resumable stream of samples: the same global batches whatever the number of ranks and workers.

This is the one layer that splits data over ranks and workers: hand it to no DataLoader with workers and to no
`accelerator.prepare`, which would split it again. WebDataset's own pipelines are not used (FACTS: they end early on
damage without a word, repeat or halve the data across ranks, and cannot resume).

Memory: a worker holds at most 3 of its rank's batches of decoded audio (1.92 MB for 30 s); batches travel through a
pipe, so that /dev/shm stays empty.
"""

import hashlib
import json
import logging
import os
import signal
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.audio.augmentation import Augmentation
from shards.files.write import naming
from shards.parent import end_with_parent, is_in_main_thread
from shards.sample import MAX_SECONDS, Sample
from shards.streaming.catalog import open_catalog
from shards.streaming.order import Order, Plan, Position
from shards.streaming.reader import BadSample, Reader
from shards.tars.archive import MAX_MEMBER_BYTES
from shards.tars.localcopy import ShardCache

MIN_MAX_BAD = 10  # samples that may be bad however few were read
_STATE_VERSION = 1
_PREFETCH = 2  # batches ahead of the trainer, a worker
_log = logging.getLogger(__name__)


class ShardStream(IterableDataset):
    """This rank's part of each global batch, as lists of `Sample`.

    Rank r gets samples r, r + world_size, … of each global batch. The last batch of an epoch is completed with the
    first samples of the next, so that steps have constant size; only the very last batch may be short (a rank's part
    of it empty). A bad sample is left out, counted and logged; nothing takes its place.

    Args:
        shards: path, URL, brace range, glob or folder of audio shards, or several.
        batch_size: samples of a global batch, over all ranks; with batch_seconds, the most it may have.
        seed: of order and augmentation.
        shuffle: shuffle shards, and samples within window_shards of them, anew each epoch.
        epochs: passes over the data; None: without end.
        rank: of this process.
        world_size: number of ranks.
        num_workers: processes that read and decode; 0: in this one.
        targets: folder of a target cache to join by key.
        student_answers: folder of the student's answers with their targets, see `distill/answers.py`.
        student_share: share of the answered samples that come with the student's answer, drawn anew each epoch.
        tasks: those to read; None: all.
        labelled_share: share of the samples whose text is given out, chosen by key; the others come as unlabelled.
        labelled_only: leave unlabelled samples out.
        weights: task -> times an epoch each of its samples comes (1 where not named).
        sample_weights: key -> what the sample counts in the losses (1 where not named); 0 leaves it out.
        batch_seconds: most seconds of audio in a global batch, padding included.
        bucket_batches: sort by length within so many batches, so that a batch holds clips of like length; 0: do not.
            Without shuffle and with a large number, the longest clips of all come first.
        window_shards: see shuffle; remote shards are fetched about in this order.
        augmentation: of the training clips; None or one that does nothing: none.
        decode: read the audio; without, a clip is silence of its length, for runs that take cached frames instead.
        max_seconds: the longest clip that augmentation may make, when the ears take less than 30 s.
        max_bad: the share of bad samples to stop above, if they are over 10.
        bad_samples: a JSON Lines file to append bad samples to.
        max_member_bytes: the largest member allowed in a shard.
        cache: where remote shards are kept, and how many bytes of them.

    Raises:
        ShardError: see `shards.streaming.catalog.open_catalog`.
        ValueError: an option is out of its range, or a task is not in the data.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        targets: str | Path | None = None,
        student_answers: str | Path | None = None,
        student_share: float = 0.0,
        tasks: Sequence[str] | None = None,
        labelled_share: float = 1.0,
        labelled_only: bool = False,
        weights: Mapping[str, float] | None = None,
        sample_weights: Mapping[str, float] | None = None,
        batch_seconds: float | None = None,
        bucket_batches: int = 0,
        window_shards: int = 16,
        augmentation: Augmentation | None = None,
        decode: bool = True,
        max_seconds: float = MAX_SECONDS,
        max_bad: float = 0.001,
        bad_samples: str | Path | None = None,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        cache: ShardCache | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, but world_size is {world_size}; a rank is 0 to world_size - 1.")
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.max_bad, self.bad_samples = max_bad, bad_samples
        order = Order(
            batch_size, seed, shuffle, epochs, batch_seconds, bucket_batches, window_shards, dict(weights or {})
        )
        cache = cache or ShardCache()
        joined = {"targets": targets, "answers": student_answers}
        self.catalog = open_catalog(shards, tasks=tasks, cache=cache, max_member_bytes=max_member_bytes, **joined)
        self.student_share = student_share if student_answers is not None else 0.0
        self._check_tasks("tasks", tasks or ())
        self._check_tasks("weights", order.weights)
        self.tasks = sorted(self.catalog.tasks if tasks is None else set(tasks))
        self.labelled_share, self.labelled_only = labelled_share, labelled_only
        self.sample_weights = dict(sorted((sample_weights or {}).items()))
        groups = [(self._rows(task), order.weights.get(task, 1.0)) for task in self.tasks]
        self.plan = Plan(order, self.catalog.shards, self.catalog.seconds, groups)
        self.augmentation = augmentation if augmentation is not None and augmentation.is_active else None
        if self.augmentation is not None and not decode:
            raise ValueError("decode is False, but augmentation needs the audio; cache no frames, or augment nothing.")
        self._reader = Reader(self.catalog, cache, self.augmentation, seed, max_seconds, decode, self.student_share)
        self._position = Position()
        self.num_read = 0  # samples of this rank, good and bad, since it was made
        self.num_bad: Counter[str] = Counter()  # of them, by reason

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, over all ranks."""
        return self.plan.num_samples

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of an epoch; the last may be short, or reach into the next epoch."""
        return self.plan.batches_per_epoch

    @property
    def epoch(self) -> int:
        """The pass that the next batch begins in."""
        return self._position.epoch

    def __iter__(self) -> Iterator[list[Sample]]:
        """This rank's part of each global batch, from the current position on: nothing where the last epoch is over.

        Raises:
            ShardError: a shard is missing or changed.
            ValueError: too many bad samples.
        """
        if get_worker_info() is not None:
            raise ValueError("num_workers is set on a DataLoader around the stream, but it splits itself; set it here.")
        after: deque[Position] = deque()
        loader = DataLoader(
            self._reader,
            batch_sampler=self._places(after),
            num_workers=self.num_workers,
            collate_fn=_same,
            worker_init_fn=partial(_start_worker, os.getpid(), is_in_main_thread()),
            multiprocessing_context="fork" if self.num_workers else None,
            prefetch_factor=_PREFETCH if self.num_workers else None,
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            samples = [self._weigh(self._hide_text(sample)) for sample in batch if isinstance(sample, Sample)]
            self._account(batch)
            self._position = after.popleft()
            yield samples

    def state_dict(self) -> dict:
        """Where the stream stands and what its order is made of, in a few hundred bytes; equal on all ranks."""
        answers = self.catalog.answers_digest
        return {
            "version": _STATE_VERSION,
            "epoch": self._position.epoch,
            "offset": self._position.offset,
            "order": self.plan.order.options,
            "tasks": ",".join(self.tasks),
            "labels": f"{self.labelled_share:g} {'only' if self.labelled_only else 'and others'}",
            "augment": "none" if self.augmentation is None else asdict(self.augmentation),
            "sample_weights": _digest_weights(self.sample_weights),
            "student_answers": f"{self.student_share:g} of {answers[:16]}" if self.student_share else "none",
            "data": self.catalog.digest,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where another stream over the same data stood, whatever its number of ranks and workers.

        Raises:
            ValueError: the data, the tasks or the order differ.
        """
        mine = self.state_dict()
        # states of before they could be set have none
        state = {"augment": "none", "sample_weights": "none", "student_answers": "none", **state}
        for name, remedy in (
            ("version", "resume with the release that wrote it"),
            ("data", "restore the shards it was made with"),
            ("tasks", "choose the same tasks"),
            ("labels", "set labelled_share and labelled_only as they were"),
            ("augment", "set augment as it was"),
            ("sample_weights", "give the weights it had"),
            ("student_answers", "set on_policy as it was"),
            ("order", "set it as it was"),
        ):
            differences = _differences(name, state[name], mine[name])
            if differences:
                raise ValueError(f"the stream's state has {'; '.join(differences)}; {remedy}.")
        self._position = Position(int(state["epoch"]), int(state["offset"]))

    def _places(self, after: deque) -> Iterator[list[tuple[int, int]]]:
        """This rank's (epoch, row) pairs of each global batch; notes the position after each."""
        for batch, position in self.plan.batches(self._position):
            after.append(position)
            yield [(int(epoch), int(row)) for epoch, row in batch[self.rank :: self.world_size]]

    def _rows(self, task: str) -> np.ndarray:
        rows = self.catalog.task_rows(task)
        left_out = [key.encode() for key, weight in self.sample_weights.items() if weight == 0]
        rows = rows[~np.isin(self.catalog.keys[rows], left_out)] if left_out else rows
        if not self.labelled_only:
            return rows
        rows = rows[self.catalog.has_text[rows]]
        return rows[[self._shows_text(self.catalog.key(row)) for row in rows]] if self.labelled_share < 1 else rows

    def _shows_text(self, key: str) -> bool:
        return self.labelled_share >= 1 or zlib.crc32(key.encode()) < self.labelled_share * 2**32

    def _weigh(self, sample: Sample) -> Sample:
        return replace(sample, weight=self.sample_weights[sample.key]) if sample.key in self.sample_weights else sample

    def _hide_text(self, sample: Sample) -> Sample:
        return sample if self._shows_text(sample.key) else replace(sample, text=None)

    def _account(self, batch: list[Sample | BadSample]) -> None:
        bad = [sample for sample in batch if isinstance(sample, BadSample)]
        self.num_read += len(batch)
        self.num_bad.update(sample.reason for sample in bad)
        for sample in bad:
            _log.warning("left out: %s", sample.message)
        if bad and self.bad_samples is not None:
            with naming(Path(self.bad_samples)), open(self.bad_samples, "a") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)
        limit = max(MIN_MAX_BAD, self.max_bad * self.num_read)
        if self.num_bad.total() > limit:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.num_bad.most_common())
            raise ValueError(
                f"bad samples are {self.num_bad.total()} of {self.num_read} ({reasons}), but at most {limit:g} are "
                f"accepted; the last: {bad[-1].message} Run distill pack --verify, or raise max_bad."
            )

    def _check_tasks(self, name: str, tasks) -> None:
        for task in tasks:
            if task not in self.catalog.tasks:
                near = get_close_matches(task, self.catalog.tasks, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "choose one of them."
                raise ValueError(f"{name} names {task!r}, but the shards hold {', '.join(self.catalog.tasks)}; {hint}")


def _differences(name: str, old, new) -> list[str]:
    """What differs between two values of a state: fields by their names, where both have some."""
    old, new = (json.loads(json.dumps(value)) for value in (old, new))  # as a saved one's: lists for tuples
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old | new)
        return [part for field in names for part in _differences(f"{name}.{field}", old.get(field), new.get(field))]
    return [] if old == new else [f"{name} {old}, but this stream has {new}"]


def _digest_weights(weights: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16] if weights else "none"


def _same(batch):
    return batch


def _start_worker(parent: int, by_kernel: bool, worker: int) -> None:
    """Ctrl-C and preemption signal the whole process group, but the trainer ends its workers when it is ready.

    A trainer that was killed cannot, and a worker that waits to hand over a batch would outlive it for ever.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent, by_kernel=by_kernel)
