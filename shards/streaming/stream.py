"""The exact, resumable stream of samples: the same global batches whatever the number of ranks and workers.

This is the one layer that splits data over ranks and workers: hand it to no DataLoader with workers and to no
`accelerator.prepare`, which would split it again. WebDataset's own pipelines are not used (FACTS: they end early on
damage without a word, repeat or halve the data across ranks, and cannot resume).

Memory: a worker holds at most 3 of its rank's batches of decoded audio (1.92 MB for 30 s); batches travel through a
pipe, so that /dev/shm stays empty.
"""

import json
import logging
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.audio.augmentation import Augmentation
from shards.files.write import naming
from shards.parent_process import end_with_parent, is_in_main_thread
from shards.sample import MAX_SECONDS, Sample
from shards.streaming.catalog import open_catalog
from shards.streaming.limits import Limits
from shards.streaming.order import Order, Plan, Position
from shards.streaming.reader import BadSample, Reader
from shards.streaming.selection import Selection, check_tasks

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
        order: what decides the global batches.
        selection: which samples take part, and what each comes with.
        limits: processes, copies of remote shards, bad samples.
        rank: the rank of this process.
        world_size: number of ranks.
        augmentation: changes the training clips; None or one that does nothing: none are.
        decode: read the audio; without, a clip is silence of its length, for runs that take cached frames instead.
        max_seconds: the longest clip that augmentation may make, when the ears take less than 30 s.

    Raises:
        ShardError: see `shards.streaming.catalog.open_catalog`.
        ValueError: a task is not in the data, or no sample takes part.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        order: Order,
        selection: Selection | None = None,
        limits: Limits | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        augmentation: Augmentation | None = None,
        decode: bool = True,
        max_seconds: float = MAX_SECONDS,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, but world_size is {world_size}; a rank is 0 to world_size - 1.")
        self.augmentation = augmentation if augmentation is not None and augmentation.is_active else None
        if self.augmentation is not None and not decode:
            raise ValueError("decode is False, but augmentation needs the audio; cache no frames, or augment nothing.")
        self.rank, self.world_size = rank, world_size
        self.selection, self.limits = selection or Selection(), limits or Limits()
        self.catalog = open_catalog(shards, self.selection, self.limits)
        check_tasks("tasks", self.selection.tasks or (), self.catalog.tasks)
        check_tasks("task_weights", order.task_weights, self.catalog.tasks)
        self.tasks = sorted(self.catalog.tasks if self.selection.tasks is None else set(self.selection.tasks))
        groups = [
            (self.catalog.chosen_rows(task, self.selection), order.task_weights.get(task, 1.0)) for task in self.tasks
        ]
        self.plan = Plan(order, self.catalog.shards, self.catalog.seconds, groups)
        self._reader = Reader(
            self.catalog, self.limits.cache, self.augmentation, order.seed, max_seconds, decode,
            self.selection.answered_share,
        )  # fmt: skip
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
            raise ValueError("num_workers is set on a DataLoader around the stream, but it splits itself; set Limits.")
        after: deque[Position] = deque()
        loader = DataLoader(
            self._reader,
            batch_sampler=self._places(after),
            num_workers=self.limits.workers,
            collate_fn=_same,
            worker_init_fn=partial(_start_worker, os.getpid(), is_in_main_thread()),
            multiprocessing_context="fork" if self.limits.workers else None,
            prefetch_factor=_PREFETCH if self.limits.workers else None,
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            samples = [self.selection.dress(sample) for sample in batch if isinstance(sample, Sample)]
            self._account(batch)
            self._position = after.popleft()
            yield samples

    def state_dict(self) -> dict:
        """Where the stream stands and what its order is made of, in a few hundred bytes; equal on all ranks."""
        return {
            "version": _STATE_VERSION,
            "epoch": self._position.epoch,
            "offset": self._position.offset,
            "order": self.plan.order.options,
            "augment": "none" if self.augmentation is None else asdict(self.augmentation),
            "data": self.catalog.digest,
            "tasks": ",".join(self.tasks),
            **self.selection.describe(self.catalog.answers_digest),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where another stream over the same data stood, whatever its number of ranks and workers.

        Raises:
            ValueError: the data, the tasks or the order differ.
        """
        mine = self.state_dict()
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

    def _account(self, batch: list[Sample | BadSample]) -> None:
        bad = [sample for sample in batch if isinstance(sample, BadSample)]
        self.num_read += len(batch)
        self.num_bad.update(sample.reason for sample in bad)
        for sample in bad:
            _log.warning("left out: %s", sample.message)
        if bad and self.limits.bad_samples is not None:
            path = Path(self.limits.bad_samples)
            with naming(path), open(path, "a") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)
        limit = self.limits.allowed_bad(self.num_read)
        if self.num_bad.total() > limit:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.num_bad.most_common())
            raise ValueError(
                f"bad samples are {self.num_bad.total()} of {self.num_read} ({reasons}), but at most {limit:g} are "
                f"accepted; the last: {bad[-1].message} Run distill pack --verify, or raise max_bad."
            )


def _differences(name: str, old, new) -> list[str]:
    """What differs between two values of a state: fields by their names, where both have some."""
    old, new = (json.loads(json.dumps(value)) for value in (old, new))  # as a saved one's: lists for tuples
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old | new)
        return [part for field in names for part in _differences(f"{name}.{field}", old.get(field), new.get(field))]
    return [] if old == new else [f"{name} {old}, but this stream has {new}"]


def _same(batch):
    return batch


def _start_worker(parent: int, by_kernel: bool, worker: int) -> None:
    """Ctrl-C and preemption signal the whole process group, but the trainer ends its workers when it is ready.

    A trainer that was killed cannot, and a worker that waits to hand over a batch would outlive it for ever.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent, by_kernel=by_kernel)
