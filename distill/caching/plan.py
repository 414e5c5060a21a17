"""What a target cache would cost and keep, before it is made: `distill plan CONFIG [--max-gb N] [--clips 300]`.

With `--gpus N` it is the memory, hours and disk of every stage instead, see `distill.sizes.plan`.

The teacher runs over a few hundred clips, dense; each codec then encodes what it said. The student whose gradient is
compared is the teacher itself, flattened and with noise.

Shapes: S supervised positions, V vocabulary.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from distill.caching.capture import Capturer, feature_dtypes, to_host
from distill.caching.fidelity import Fidelity
from distill.config import CacheConfig, Config
from distill.teacher import load_to_keep
from distill.training.monitoring.progress import Progress
from distill.training.ranks import build_accelerator, resolve_precision
from shards.sample import Sample
from shards.status import print_json
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.targets.codecs.table import CODECS, decode, find_codec
from shards.targets.distributions import HiddenStates
from shards.tars.archive import BLOCK
from teachers.logits import head_logits, logit_transform

OF_CARDS = ("card", "gpu_gb", "audio_hours")  # options that mean nothing without --gpus
GOOD_COSINE = 0.9998  # of the gradient: what is above it trains like the dense teacher


@dataclass
class Candidate:
    """One codec with its settings, and what was measured of it."""

    settings: dict
    cache: CacheConfig
    fidelity: Fidelity = field(default_factory=Fidelity)
    payload_bytes: int = 0
    total_bytes: int = 0  # of the clips measured, with all that a cache keeps of them

    @property
    def name(self) -> str:
        """The words that choose it."""
        return " ".join(f"cache.{key}={value:g}" if key != "codec" else f"cache.codec={value}"
                        for key, value in self.settings.items())  # fmt: skip

    def add(self, pass_: "TeacherPass", others: Sequence[int], temperature: float) -> None:
        """Encode a batch's answers one by one, as the job does; `others` is what else a record of each takes, bytes."""
        codec = find_codec(self.cache.codec).of(self.cache)
        for part, size in zip(pass_.parts, others):
            payload = codec.encode(to_host(codec.capture(pass_.logits_SV[part], pass_.hidden_SD[part])))
            decoded = decode(payload)
            if isinstance(decoded, HiddenStates):
                decoded = decoded.with_head(pass_.head_weight_VD, **pass_.transform)
            self.payload_bytes += len(payload)
            self.total_bytes += BLOCK + -(-(size + len(payload)) // BLOCK) * BLOCK  # a member of a tar
            own = temperature if codec.serves(temperature) else 1.0  # which all serve
            self.fidelity.add(decoded, torch.log_softmax(pass_.logits_SV[part], -1), own)


@dataclass(frozen=True)
class TeacherPass:
    """The teacher's dense word on one batch, on the CPU."""

    logits_SV: Tensor
    hidden_SD: Tensor
    head_weight_VD: Tensor
    transform: dict[str, float | None]  # of the head's product
    parts: list[slice]  # the positions of each clip


@dataclass(frozen=True)
class Measured:
    """What a plan is made of."""

    candidates: list[Candidate]
    num_clips: int
    num_samples: int  # of the whole training set
    seconds: float  # that one process took for these clips
    temperature: float

    def gigabytes(self, candidate: Candidate) -> float:
        """Of the whole training set."""
        return candidate.total_bytes / self.num_clips * self.num_samples / 1e9

    @property
    def hours(self) -> float:
        """For the whole training set, with one process like this one."""
        return self.seconds / self.num_clips * self.num_samples / 3600

    def advise(self, max_gb: float | None) -> Candidate | None:
        """Of those within the budget the smallest that trains like the dense teacher, or else the most exact."""
        fit = [c for c in self.candidates if find_codec(c.settings["codec"]).is_advised]
        fit = [c for c in fit if max_gb is None or self.gigabytes(c) <= max_gb]
        good = [c for c in fit if c.fidelity.gradient_cosine >= GOOD_COSINE]
        if good:
            return min(good, key=lambda c: c.total_bytes)
        return min(fit, key=lambda c: c.fidelity.gradient_error, default=None)


def plan(config: Config, num_clips: int) -> Measured:
    """Run the teacher over clips of the training set and every codec over what it says.

    Raises:
        ValueError: there is no clip.
    """
    teacher = load_to_keep(config, build_accelerator().device)
    capture, temperature = Capturer(teacher, config), config.loss.temperature
    temperatures = tuple(sorted({1.0, *config.cache.temperatures, temperature}))
    tried = [{"codec": name, **settings} for name in CODECS for settings in find_codec(name).tried]
    candidates = [Candidate(words, replace(config.cache, temperatures=temperatures, **words)) for words in tried]
    batches, num_samples = open_clips(config, num_clips)
    done, timed, seconds = 0, 0, 0.0
    with Progress("plan", min(num_clips, num_samples), unit="clips") as progress:
        for number, samples in enumerate(batches):
            began = time.perf_counter()
            records = capture(samples)
            sizes = [len(r.pack(feature_dtypes(config.cache, r))) - len(r.payload) for r in records.values()]
            if number or num_samples <= config.cache.batch_size:  # the first one warms up
                seconds, timed = seconds + time.perf_counter() - began, timed + len(samples)
            pass_ = run_dense(capture, samples)
            for candidate in candidates:
                candidate.add(pass_, sizes, temperature)
            done += len(samples)
            progress.advance(units=len(samples))
    if not done:
        raise ValueError(f"clips are {done}, but a plan needs some; check {config.shards('train')} and --clips.")
    return Measured(candidates, done, num_samples, seconds / max(1, timed) * done, temperature)


def open_clips(config: Config, num_clips: int) -> tuple[Iterator[list[Sample]], int]:
    """Shuffled batches of about so many clips of the training set, and how many it has."""
    stream = ShardStream(
        config.shards("train"),
        Order(batch_size=config.cache.batch_size, seed=config.seed, epochs=1),
        Selection(labelled_share=config.data.labelled_share),
    )
    return islice(stream, -(-num_clips // config.cache.batch_size)), stream.num_samples


@torch.no_grad()
def run_dense(capture: Capturer, samples: Sequence[Sample]) -> TeacherPass:
    """The teacher's whole distributions and what enters its head, on the answers it is to teach."""
    model, samples = capture.model, capture.teacher.label(samples)[0]
    batch = model.collate(samples).to(model.device)
    dtype = resolve_precision(capture.config.precision)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        hidden_SD = model.answer_states(batch, model.hear(batch))
        logits_SV = head_logits(model.llm, hidden_SD)
    parts, start = [], 0
    for row in batch.rows:
        parts.append(slice(start, start := start + len(row.answer)))
    head_VD = model.llm.get_output_embeddings().weight.detach().cpu().float()
    transform = logit_transform(model.llm.config.get_text_config())
    return TeacherPass(logits_SV.cpu(), hidden_SD.float().cpu(), head_VD, transform, parts)


def format_plan(measured: Measured, max_gb: float | None) -> str:
    """The table and the advice."""
    tokens = measured.candidates[0].fidelity.positions
    lines = [
        f"{measured.num_clips:,} of {measured.num_samples:,} clips, {tokens:,} tokens, temperature "
        f"{measured.temperature:g}; the teacher needs {measured.hours:.2f} h for all of them in one process",
        f"  {'':<52}{'bytes/token':>12}{'GB':>10}{'mass':>8}{'KL':>10}{'cosine':>10}{'error':>9}",
    ]
    for candidate in measured.candidates:
        f = candidate.fidelity
        lines.append(
            f"  {candidate.name:<52}{candidate.payload_bytes / tokens:>12,.1f}{measured.gigabytes(candidate):>10.3f}"
            f"{f.captured_mass:>8.4f}{f.kl:>10.2g}{f.gradient_cosine:>10.6f}{f.gradient_error:>9.4f}"
        )
    lines.append("KL: dense to decoded, nats a token; cosine and error: of the loss' gradient; GB: with all features.")
    advice = measured.advise(max_gb)
    if advice is None:
        least = min(map(measured.gigabytes, measured.candidates))
        lines.append(f"no codec fits in {max_gb:g} GB; the smallest needs {least:.3f}, features and all")
    else:
        lines.append(f"take {advice.name}: {measured.gigabytes(advice):.3f} GB")
    return "\n".join(lines)


def describe_plan(measured: Measured, max_gb: float | None) -> dict:
    """The table and the advice for a script."""
    tokens = measured.candidates[0].fidelity.positions
    rows = [
        {
            "words": candidate.name,
            "bytes_a_token": candidate.payload_bytes / tokens,
            "gigabytes": measured.gigabytes(candidate),
            "captured_mass": candidate.fidelity.captured_mass,
            "kl": candidate.fidelity.kl,
            "gradient_cosine": candidate.fidelity.gradient_cosine,
            "gradient_error": candidate.fidelity.gradient_error,
        }
        for candidate in measured.candidates
    ]
    advice = measured.advise(max_gb)
    sizes = {"clips": measured.num_clips, "samples": measured.num_samples, "tokens": tokens, "hours": measured.hours}
    return {**sizes, "candidates": rows, "advice": None if advice is None else advice.name}


def main(args: argparse.Namespace) -> int:
    """Run `distill plan`."""
    if args.gpus is not None:
        from distill.sizes.plan import plan_cards

        return plan_cards(args)
    without = [f"--{name.replace('_', '-')}" for name in OF_CARDS if getattr(args, name) is not None]
    if without:
        raise ValueError(f"{without[0]} is given, but cards are planned for with --gpus alone; say how many there are.")
    measured = plan(args.config, args.clips)
    if args.json:
        print_json(describe_plan(measured, args.max_gb))
    else:
        print(format_plan(measured, args.max_gb))
    return 1 if measured.advise(args.max_gb) is None else 0
