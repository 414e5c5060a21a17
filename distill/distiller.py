"""The training loop: `Distiller(teacher, student, train=…).fit()`. Knows no file format and no command line.

One step: collate every micro-batch, count what each term has over all ranks, and only then go forward, each element
weighted by its term's weight over that count. So the gradient of a step does not depend on how it was split.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.config import Config, EvalConfig, LossConfig, OnPolicyConfig, TrainConfig
from distill.config.rules import check_terms
from distill.evaluation.metrics.scores import OwnMetric
from distill.evaluation.validation import Best, check_is_there, check_split, validate
from distill.inputs import as_shards, as_student, as_teacher, check_cached, check_clips, check_heard_alike
from distill.objective.crossteacher import match_vocab
from distill.objective.module import Objective
from distill.objective.schedule import build_schedules
from distill.objective.terms import TERMS
from distill.objective.terms.needs import check_student
from distill.objective.terms.term import Term
from distill.objective.weighing import (
    MicroBatch,
    active_terms,
    check_own,
    check_tasks,
    count,
    weigh,
    without_teacher,
)
from distill.training import checkpoint as ckpt
from distill.training.identity import AVERAGED, UPDATE, WEIGHTS, find_start, identify_fit
from distill.training.microbatch import Collator, check_frames, split, trains_ears
from distill.training.monitoring.callbacks import Callbacks
from distill.training.monitoring.mfu import Utilization
from distill.training.monitoring.progress import Progress
from distill.training.monitoring.runlog import RunLog, read_table
from distill.training.monitoring.steplog import StepLog, rates
from distill.training.monitoring.trackers import Trackers, check_trackers
from distill.training.onpolicy import AnswerCost, answer_within, cost_of_answers, identify_step_answers
from distill.training.optimizer import build_optimizer
from distill.training.ranks import (
    build_accelerator,
    gather,
    is_deepspeed,
    refuse_other_splits,
    resolve_precision,
    say,
    splits_frozen,
    sum_over_ranks,
    unwrap,
)
from distill.training.recompute import keep_outputs_, recompute_blocks_
from distill.training.resuming import check_changes, identify_training
from distill.training.runlock import RunLock
from distill.training.sharding import find_sharded, shard_frozen_
from distill.training.stopping import HangWatch, StopRequest, warn_of_slow_save
from distill.training.update.spikes import BadStepsError, is_good
from distill.training.update.update import Update
from distill.training.zero import (
    check_options,
    configure_deepspeed,
    describe_build_locks,
    gathered,
    hide_frozen_,
    is_sharded,
    is_zero3,
    join_,
    report_build_locks,
)
from shards.field_types import to_path
from shards.sample import SAMPLE_RATE, Sample
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.tars.source import expand_shards
from students.kernels import check_kernels, drop_kernels_, use_kernels_
from students.pretrained import Student
from teachers.files.loading import hash_tensors, own_tensors
from teachers.salmonn import Salmonn
from teachers.teacher import Teacher

DEFAULTS = Config()


@dataclass(frozen=True)
class FitResult:
    """What a run ended with."""

    run_folder: Path
    steps: int
    metrics: list[dict[str, float]]  # a record a step of the whole run, with `valid/…` where one was: a pandas table
    scores: dict = field(default_factory=dict)  # of the best validation, by task
    best_step: int = 0  # after which that was, and whose weights the student has now; 0: there was none
    preempted: bool = False  # a signal or a callback ended the run before its last step

    @property
    def losses(self) -> list[float]:
        """The loss of every step of the whole run, also of those before it was resumed."""
        return [record["loss"] for record in self.metrics]


class Step(NamedTuple):
    """A step that was made, or left out."""

    record: dict[str, float]  # of the log
    must_stop: bool  # a signal or a callback ends the run here
    goes_back: bool  # it was one bad step too many


@dataclass(frozen=True)
class Run:
    """Where and how a run takes place.

    Attributes:
        folder: where metrics and checkpoints go.
        seed: decides the order of samples and dropout.
        precision: "auto", "float32", "bf16" or "fp16".
        accelerator: the processes; None: those of the environment.
        identity: what else must not change between a run and its resumption, as plain data.
        on_policy: its `step_share` of each step's clips is answered by the student first, see docs/rounds.md.
    """

    folder: str | Path = DEFAULTS.run_folder
    seed: int = DEFAULTS.seed
    precision: str = DEFAULTS.precision
    accelerator: Accelerator | None = None
    identity: dict = field(default_factory=dict)
    on_policy: OnPolicyConfig = DEFAULTS.on_policy


@dataclass(frozen=True)
class Own:
    """Parts of one's own, beside the library's.

    Attributes:
        terms: loss terms, by name.
        metrics: those of validation, by task: functions of a `Prediction` to its quality, 1 the best.
    """

    terms: Mapping[str, Term] = field(default_factory=dict)
    metrics: Mapping[str, OwnMetric] = field(default_factory=dict)


RUN, OWN = Run(), Own()  # where nothing else is said


class Distiller:
    """Trains a student on a teacher's targets.

    Args:
        teacher: a loaded model, the path of a saved one, of a Qwen2-Audio or of a cache, a `TeacherConfig` (for a
            checkpoint with its frozen parts), an object of one's own (docs/extending.md), or None for cross-entropy
            alone.
        student: a model, of which whatever requires gradients is trained, or the folder of a saved one.
        train: shards (folder, pattern, URL), a manifest, a `ShardStream` of global batches, a Hugging Face data set, or
            any iterable with an end of samples (see `shards.packing.items`); what is not shards yet is packed into
            `data/` of the run's folder, once.
        valid: as train; the student answers it every `options.eval_every` steps and at the end, and keeps the weights
            of the step whose answers were best.
        loss: weights of the terms.
        options: steps, batch sizes, learning rate, checkpoints.
        answers: how validation answers are made and counted.
        run: the run's folder, or a `Run`: the folder with seed, precision and processes.
        callbacks: are told of steps, validations and checkpoints, see `distill.training.monitoring.callbacks`.
        own: loss terms and metrics of one's own.

    Raises:
        ValueError: no shard is where it should be, validation has nothing to score or was heard otherwise than the
            training clips, teacher and student have other vocabularies, nothing is trainable, or the run folder is of
            a run with other settings or data.
        FileNotFoundError, FileExistsError: `options.resume` forbids to start anew, or to go on.
    """

    def __init__(self, teacher, student: Salmonn | Student | str | Path, *, train, valid=None,
                 loss: LossConfig | None = None, options: TrainConfig | None = None, answers: EvalConfig | None = None,
                 run: Run | str | Path = RUN, callbacks: Sequence = (), own: Own = OWN):  # fmt: skip
        run = run if isinstance(run, Run) else Run(run)
        loss, self.options, self.answers = loss or LossConfig(), options or TrainConfig(), answers or EvalConfig()
        self.loss, self.metrics = without_teacher(loss) if teacher is None else loss, own.metrics
        check_own(own.terms)
        check_terms(self.loss, self.options.steps, own.terms)
        self.callbacks = Callbacks(self, callbacks).callbacks
        check_trackers(self.options.trackers)
        self.on_policy = run.on_policy
        self.run_folder, self.seed, self.dtype = to_path(run.folder), run.seed, resolve_precision(run.precision)
        teacher, self.student = as_teacher(teacher, self.loss, run.precision), as_student(student, self.dtype)
        vocab_size = self._match(teacher)
        self._place(run.accelerator, teacher.model)
        self.lock = RunLock(self.run_folder).acquire()
        self.stream = train if isinstance(train, ShardStream) else self._open(train)
        self._choose_terms(own.terms, vocab_size)
        self.step_answers = answer_within(self.on_policy, self.loss, self.teacher, self.student, num_shared=vocab_size,
                                          is_sharded=is_sharded(self.accelerator), seed=self.seed)  # fmt: skip
        check_cached(teacher, self.loss, self.terms, self.student, self.stream)
        teacher.ask_as(self.student.rows.prompts.template)
        self.valid = self._open_valid(valid)
        self.identity = {"seed": self.seed, **identify_training(self.options), **identify_step_answers(self.on_policy)}
        self.identity |= identify_fit(self.student, teacher, self.loss, own.terms, run.identity, self.dtype)
        explain = describe_build_locks if is_deepspeed(self.accelerator) else str
        self.hang_watch = HangWatch(self.options.hang_minutes, explain)
        self._find_start()

    # What a run begins with

    def _match(self, teacher: Teacher) -> int | None:
        """Let the teacher speak the student's tokens; the number of ids that they share."""
        check_tasks(self.loss.task_weights, self.student.rows.prompts.by_task)
        check_frames(teacher.header, self.student)
        self.teacher, vocab_size = match_vocab(teacher, self.student, self.loss.cross_tokenizer, self.loss.temperature)
        return vocab_size

    def _place(self, accelerator: Accelerator | None, model: nn.Module | None) -> None:
        """Move the student, and a teacher that runs, to this process' device."""
        if accelerator is not None:
            refuse_other_splits(accelerator)
        self.accelerator = accelerator or build_accelerator()
        check_options(self.accelerator, self.options, self.dtype)
        if self.options.kernels != "none":
            check_kernels(self.student.llm, self.accelerator.device)
        for one in (self.student, model):
            if one is not None:
                one.to(self.accelerator.device)

    def _choose_terms(self, own: Mapping[str, Term], vocab_size: int | None) -> None:
        """The terms that have a weight, the objective that they make, and the tensors that it trains."""
        terms = {**TERMS, **own}
        self.schedules = build_schedules(terms, self.loss, self.options.steps)
        self.terms = active_terms(terms, self.schedules, self.teacher)
        check_student(self.terms, self.student)
        widths = self.teacher.widths
        self.objective = Objective(
            self.student, self.loss, self.dtype, self.terms, vocab_size=vocab_size, widths=widths, seed=self.seed
        )
        self.projectors = {f"projectors.{name}": p for name, p in self.objective.projectors.named_parameters()}
        self.named = {name: p for name, p in self.student.named_parameters() if p.requires_grad} | self.projectors
        if not self.named:
            raise ValueError("trainable tensors are none, but fit() needs some; build the student with LoRA.")

    def _open_valid(self, samples) -> str | Path | None:
        """The validation split as shards; a wrong one is an error now, not after the first steps."""
        if samples is None:
            check_is_there(self.options)
            return None
        valid = self._shards(samples, "valid")
        check_heard_alike(self.stream, valid)
        check_clips(ShardStream(valid, Order(batch_size=1, shuffle=False, epochs=1)), self.student)
        check_split(valid, self.metrics, self.options.best_metric)
        return valid

    def _find_start(self) -> None:
        """Find the checkpoint that the run goes on from, and put the stream where it stood."""
        self.is_prepared = False
        self.stop, self.best = StopRequest(self.options.max_minutes), Best()
        tell = partial(say, self.accelerator)
        own = self.identity["student"]["own"]
        self.identity["student"]["own"] = find_start(self.run_folder, own)
        self.saved = ckpt.find_resumable(self.run_folder, self.options.resume, tell)
        if self.saved is not None:
            check_changes(
                self.saved.state["identity"],
                self.identity,
                checkpoint=self.saved.folder,
                done=self.saved.step,
                options=self.options,
                has_schedules=bool(self.loss.schedules),
                say=tell,
            )
            self.stream.load_state_dict(self.saved.state["stream"])
            self.best = Best(**self.saved.state["best"])

    def _shards(self, samples, name: str) -> str | Path:
        """A split as shards; one process packs what is none yet."""
        tell, most = partial(say, self.accelerator), self.student.max_samples / SAMPLE_RATE
        with self.accelerator.main_process_first():
            return as_shards(samples, self.run_folder / "data", name, self.student, most, tell)

    def _open(self, samples) -> ShardStream:
        teacher, shards = self.teacher, self._shards(samples, "train")
        teacher.check_shards(expand_shards(shards))
        share = teacher.labelled_share
        stream = ShardStream(
            shards,
            Order(batch_size=self.options.batch_size, seed=self.seed),
            Selection(
                targets=teacher.cache_folder,
                labelled_share=DEFAULTS.data.labelled_share if share is None else share,
            ),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            decode=teacher.needs_audio or trains_ears(self.student) or self.on_policy.step_share > 0,
            max_seconds=self.student.max_samples / SAMPLE_RATE,
        )
        check_clips(stream, self.student, teacher)
        return stream

    # The run

    def fit(self) -> FitResult:
        """Train until the last step, or until a signal or a callback asks to stop, from the last checkpoint on.

        A run that is done is not trained again: its student gets its weights back, and its result is read.
        """
        with self.lock, self.hang_watch("training"):
            if self.is_prepared:
                self._find_start()
            with self.hang_watch("preparation"):
                start = self._prepare()
            if self._is_over(start):
                self._finish(start)
                return self._result(min(start, self.options.steps))
            return self._fit(start)

    def request_stop(self) -> None:
        """Let the run end in order after this step, with a checkpoint, on all ranks; for callbacks."""
        self.stop.request()

    def _fit(self, start: int) -> FitResult:
        tell = partial(say, self.accelerator)
        logs = [] if not self.accelerator.is_main_process else [
            RunLog(self.run_folder),
            Trackers(self.options.trackers, self.run_folder, lambda: self.identity, tell),
            Progress(f"train {self.run_folder.name}", self.options.steps, start),
            *([] if self.step_answers is None else [AnswerCost(tell)]),
            *self.callbacks,
        ]  # fmt: skip
        self.told = Callbacks(self, logs)
        with self.stop, closing(self.told):
            self.told.tell("on_start", start)
            batches = iter(self.stream)
            step, must_stop = start, False
            while not (must_stop or self._is_over(step)):
                with self.hang_watch(f"step {step + 1}"):
                    done = self._step(step, batches)
                self.told.tell("on_step", done.record)
                if done.goes_back:
                    step = self._go_back()
                    continue
                step, must_stop = step + 1, done.must_stop
                self._after(step, must_stop)
            if must_stop:
                say(self.accelerator, f"stopped after step {step}; the same command goes on from there")
            else:
                self._finish(step)
            result = self._result(step, preempted=must_stop)
            self.told.tell("on_end", result)
        return result

    def _go_back(self) -> int:
        """Put the run back to its last good checkpoint, but for the stream, which stays; the step that it is of.

        What comes now follows from that checkpoint and the stream's position there, so a run that is interrupted before
        its next checkpoint comes here again.
        """
        folder, tell = self.run_folder / "checkpoints", partial(say, self.accelerator)
        saved = ckpt.find_checkpoint(folder, tell, lambda state: is_good(state.get(UPDATE, {}).get("bad_steps", {})))
        self.accelerator.wait_for_everyone()  # before one process removes what another might still look at
        if saved is None:
            raise BadStepsError(
                f"train.max_returns is {self.options.max_returns}, but {folder} holds no good checkpoint to go back "
                f"to; lower train.save_every or train.learning_rate."
            )
        with self.hang_watch(f"the return to step {saved.step}"):
            if self.accelerator.is_main_process:
                ckpt.remove_later(folder, saved.step)
            self._load_weights_(saved.step)
            self._load_update_(saved, self.update.go_back)
            self.best = Best(**saved.state["best"])
            tell(f"goes back to step {saved.step}, and on with the clips that come next")
        return saved.step

    def _load_weights_(self, step: int) -> None:
        """Take the weights of a checkpoint."""
        file = ckpt.checkpoint_folder(self.run_folder / "checkpoints", step) / ckpt.WEIGHTS
        ckpt.load_weights_(dict(self.student.named_parameters()) | self.projectors, file)

    def _load_update_(self, saved: ckpt.Saved, load_update: Callable[[dict], None]) -> None:
        """Take moments and what the next step must know of those before from a checkpoint."""
        load_update(saved.state.get(UPDATE, {}))
        if self.update.ema is not None:
            self.update.ema.load_(saved.folder / ckpt.MOMENTS)
        num_updates = saved.step - self.update.bad_steps.left_out
        ckpt.restore_moments_(self.accelerator, self.optimizer, self.named, saved.folder / ckpt.MOMENTS, num_updates)

    def _is_over(self, step: int) -> bool:
        """Whether there is nothing to do after a step: it is the last, or validation has long found nothing better."""
        options = self.options
        return step >= options.steps or self.best.is_stale(step, options.eval_every, options.early_stop)

    def _finish(self, step: int) -> None:
        """Leave the student whole, with its best weights; `step` was the last."""
        if step < self.options.steps:
            say(self.accelerator, f"{self.run_folder} ends after step {step}: {self.options.early_stop} validations in "
                                  f"a row were not better than that of step {self.best.step}")  # fmt: skip
        join_(self.accelerator, self.objective)
        keep_outputs_(self.student)
        if self.options.kernels != "none":  # those of a user's own stay
            drop_kernels_(self.student.llm)
        self._take_best_(step)

    def _result(self, steps: int, preempted: bool = False) -> FitResult:
        """What the whole run has come to; every rank must call it."""
        table = [read_table(self.run_folder, steps) if self.accelerator.is_main_process else []]
        table = gather(self.accelerator, table)[0]
        if len(table) != steps:
            say(self.accelerator, f"{self.run_folder} has the figures of {len(table)} of {steps} steps: lines are gone")
        return FitResult(self.run_folder, steps, table, self.best.scores, self.best.step, preempted)

    def _prepare(self) -> int:
        """Load the checkpoint that the run goes on from, wrap the student, and return the first step to do."""
        saved = self.saved
        if saved is not None:
            self._load_weights_(saved.step)
            goes_on = "is trained, used again:" if self._is_over(saved.step) else "goes on"
            say(self.accelerator, f"{self.run_folder} {goes_on} after step {saved.step}")
        optimizer = build_optimizer(self.named, self.options)
        if self.options.gradient_checkpointing:
            recompute_blocks_(self.student)
        if self.options.kernels != "none":
            use_kernels_(self.student.llm)
        if is_deepspeed(self.accelerator):
            num_trained = sum(p.numel() for p in self.named.values())
            configure_deepspeed(self.accelerator, self.options, self.num_micro_batches, num_trained)
            report_build_locks(partial(say, self.accelerator))
        if is_zero3(self.accelerator):
            hide_frozen_(self.objective)
        self.accelerator.gradient_accumulation_steps = self.num_micro_batches
        self.objective, self.optimizer = self.accelerator.prepare(unwrap(self.objective), optimizer)
        self.is_prepared = True
        self.update = Update(self.accelerator, self.named, self.options, self.dtype)
        self.utilization = Utilization(self.student.llm, self.accelerator.device)
        self.collator = Collator(
            self.teacher, self.student, self.accelerator.device, self.dtype, self.loss.task_weights, self.step_answers
        )
        self.student.train()
        if splits_frozen() and self.accelerator.num_processes > 1 and not find_sharded(self.student):
            shard_frozen_(self.accelerator, self.student.llm)
        if saved is not None:
            self._load_update_(saved, self.update.load_state_dict)
        return saved.step if saved is not None else 0

    @property
    def num_micro_batches(self) -> int:
        """Backward passes of a step, the same on every rank."""
        local = math.ceil(self.options.batch_size / self.accelerator.num_processes)
        return math.ceil(local / self.options.micro_batch_size)

    # One step

    def _step(self, step: int, batches: Iterator[list[Sample]]) -> Step:
        began = time.perf_counter()
        said = self.update.begin(self.optimizer, step)
        samples = next(batches)
        waited = time.perf_counter() - began
        micro_batches = [self.collator(part, step) for part in split(samples, self.num_micro_batches)]
        counts = [count(self.terms, m) for m in micro_batches]
        totals = sum_over_ranks(self.accelerator, {
            **{name: sum(found[name] for found in counts) for name in self.terms},
            "positions": sum(m.batch.num_supervised for m in micro_batches if m.is_real),
            "tokens": sum(row.num_tokens for m in micro_batches for row in m.batch.rows if m.is_real),
            "audio_seconds": sum(len(s.waveform_N) for s in samples) / SAMPLE_RATE,
            "waited": waited,
            **({} if self.step_answers is None else self.step_answers.tell()),
            "stop": bool(self.stop) or step + 1 == self.options.stop_after,
        })  # fmt: skip
        weights = {name: self.schedules[name].weight(step) for name in self.terms}
        # of dropout; here, as a stream draws a number of its own at a process' first step
        torch.manual_seed((self.seed * 1_000_003 + step) * 4099 + self.accelerator.process_index)
        log = StepLog(self.terms, self.stream.tasks)
        self._forward_backward(micro_batches, weights, totals, log)
        sums = sum_over_ranks(self.accelerator, log.read())
        parts = {name: sums[name] for name in self.terms}
        loss = sum(parts.values())
        norm, fault = self.update(loss)
        keys = partial(gather, self.accelerator, [sample.key for sample in samples])
        goes_back = self.update.bad_steps.note(step + 1, fault, keys)
        record = {"step": step + 1, "loss": loss, **parts, **said, "grad_norm": norm, **self.update.bad_steps.counts,
                  **log.record(sums, weights), "positions": int(totals["positions"]),
                  "audio_seconds": totals["audio_seconds"]}  # fmt: skip
        timed = totals, time.perf_counter() - began, self.accelerator.num_processes
        record |= rates(*timed) | cost_of_answers(*timed)
        record |= self.utilization(record["tokens_per_second"], self.accelerator.num_processes)
        return Step(record, totals["stop"] > 0, goes_back)

    def _forward_backward(
        self, micro_batches: list[MicroBatch], weights: dict[str, float], totals: dict[str, float], log: StepLog
    ) -> None:
        """This rank's part of the step's gradient; what it finds goes into the log."""
        # accelerate and DeepSpeed divide by the micro-batches, DDP and ZeRO by the ranks; the weights already did
        scale = self.accelerator.num_processes * self.num_micro_batches
        # all of it first: a copy to the device waits for what the device has to do
        weighed = [(weigh(self.terms, m, self.loss, weights, totals), log.rows(m)) for m in micro_batches]
        for number, (m, (weight_by_term, rows)) in enumerate(zip(micro_batches, weighed)):
            is_last = number == len(micro_batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            context = nullcontext() if is_last else self.accelerator.no_sync(self.objective)
            with context:
                loss, found = self.objective(m, weight_by_term)
                self.accelerator.backward(self.update.loss_scale.scale(loss * scale))
            log.add(m, rows, weight_by_term, found)

    # After a step

    def _after(self, step: int, must_stop: bool) -> None:
        """When it is time validate and save."""
        is_last = step == self.options.steps
        is_due = is_last or (self.options.eval_every and step % self.options.eval_every == 0)
        if is_due and self.valid is not None:
            with self.hang_watch(f"validation after step {step}"):
                self._validate(step)
        if self._is_over(step) or must_stop or step % self.options.save_every == 0 or self.best.step == step:
            with self.hang_watch(f"saving step {step}"):
                self._save(step)

    def _save(self, step: int) -> None:
        began = time.perf_counter()
        moments = ckpt.gather_moments(self.accelerator, self.optimizer, self.named)
        with gathered(self.accelerator, self.objective):
            tensors = self._tensors() if self.accelerator.is_main_process else {}
        if self.accelerator.is_main_process:
            folder = self.run_folder / "checkpoints"
            best = dataclasses.asdict(self.best)
            state = {"identity": self.identity, "stream": self.stream.state_dict(), "best": best}
            if update := self.update.state_dict():
                state[UPDATE] = update
            state[WEIGHTS] = hash_tensors({name: x for name, x in tensors.items() if name not in self.projectors})
            if self.update.ema is not None:
                moments |= self.update.ema.tensors()
                with self.update.averaged():
                    state[AVERAGED] = hash_tensors(own_tensors(self.student))
            ckpt.save_checkpoint(folder, step, state, tensors, moments)
            ckpt.prune(folder, step, self.options.keep, self.best.step)
        self.accelerator.wait_for_everyone()
        self.told.tell("on_save", step, ckpt.checkpoint_folder(self.run_folder / "checkpoints", step))
        warn_of_slow_save(time.perf_counter() - began, lambda text: say(self.accelerator, text))

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the weights: the student's own, and the projectors that only training needs."""
        projectors = {name: p.detach().cpu().contiguous() for name, p in self.projectors.items()}
        return own_tensors(self.student) | projectors

    def _validate(self, step: int) -> None:
        """Let the student answer the validation split, and remember the step if it is the best yet."""
        with gathered(self.accelerator, self.objective), self.update.averaged():
            found = validate(self.student, self.valid, self.answers, self.accelerator, step,
                             chosen_by=self.options.best_metric, own=self.metrics,
                             on_batch=self.hang_watch.beat)  # fmt: skip
        if self.best.error is None or found.error < self.best.error:
            self.best = found
        self.told.tell("on_validation", step, found.error, found.scores)

    def _take_best_(self, step: int) -> None:
        """Give the student the weights of the best validation, or their average, in place; it has those of `step`."""
        is_last, ema = self.best.step in (0, step), self.update.ema
        if ema is not None:
            if not is_last:
                ema.load_(ckpt.checkpoint_folder(self.run_folder / "checkpoints", self.best.step) / ckpt.MOMENTS)
            ema.put_()
        elif not is_last:
            self._load_weights_(self.best.step)
        if is_last:
            return
        say(self.accelerator, f"the student keeps its weights of step {self.best.step}, the best on {self.valid}")
