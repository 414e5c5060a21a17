"""What shards and cache take on a disk, and what caching and training take of named cards' time, before there are any:
`distill plan CONFIG --gpus 2 --card RTX4090 --audio-hours 1000`.

FLOPs and bytes are counted on the meta device and a record is packed as the job packs it, with made-up content; of a
card's published rate a share is assumed. Left out: reading, the all-reduce, validation, and what a student takes to say
its own answers.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from distill.caching.capture import feature_dtypes, frames_seconds, num_frames_read, to_host
from distill.config import Config
from distill.sizes.cards import Card
from distill.sizes.costs import (
    Blueprint,
    Usage,
    build_on_meta,
    describe_student,
    describe_teacher,
    ear_titles,
    measure,
    student_titles,
)
from shards.sample import SAMPLE_RATE
from shards.streaming.catalog import CATALOG, read_listing
from shards.targets.codecs.table import find_codec
from shards.targets.record import TargetRecord
from shards.tars.archive import BLOCK
from shards.tars.source import read_small
from students.ears import find_shared
from teachers.ears.encoders import WHISPER, find_encoder
from teachers.salmonn import Salmonn
from teachers.targets import FRAMES, QUERIES

FLAC_BYTES = 17_700  # a second of read English at 16 kHz: `distill pack ../shared/data/kathleen/train.json OUT`
ZIPF = 2.0  # power of the made-up distribution: 1.6 nats of entropy, a teacher that is rather unsure
TITLES = {
    "shards_gb": "shards, GB",
    "cache_gb": "cache, GB",
    "answer_hours": "the teacher's own answers, h",
    "cache_hours": "its targets, h",
    "epoch_hours": "an epoch, h",
    "train_hours": "train.steps, h",
}
ANSWER, IDENTITY = "a" * 80, ":".join(["0" * 32] * 3)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one clip."""

    student_flops: float  # of a step behind the ears
    ear_flops: float  # of a step of the student's ears
    own_ear_flops: float  # of those that are not its teacher's
    teacher_flops: float  # of a forward along a known answer, ears included
    teacher_bytes: float  # of the LLM's weights, which each step of an answer reads
    trained_bytes: float  # of gradients that all ranks add up, float32


@dataclass(frozen=True)
class Corpus:
    """The training set that a plan is for."""

    hours: float
    num_clips: int
    shard_bytes: float

    @property
    def mean_seconds(self) -> float:
        return 3600 * self.hours / self.num_clips

    def usage(self, of_clip: Usage) -> Usage:
        """Its mean clip, with the prompt and answer of another."""
        return replace(of_clip, seconds=self.mean_seconds)


@dataclass(frozen=True)
class Stay:
    """The cards that a plan is for, and the share of their published rate that they reach."""

    card: Card
    number: int
    reached: float

    def hours(self, work: float, rate: float | None = None) -> float:
        """Of all cards together for so many FLOPs, or for bytes read at their memory's whole rate."""
        return work / (3600 * self.number * (rate or self.card.flops * self.reached))


@dataclass(frozen=True)
class Hours:
    """What a config takes: hours on the clock, all cards at work, and 10^9 bytes of disk."""

    shards_gb: float
    cache_gb: float  # 0 with an online teacher
    answer_hours: float  # of the teacher's own answers, token by token
    cache_hours: float  # of its forward along all answers
    epoch_hours: float
    train_hours: float  # of train.steps


def count_work(config: Config, usage: Usage) -> Work:
    """A config's, from the parts of its student and teacher."""
    teacher, given = describe_teacher(config)
    blueprint = describe_student(config, teacher)
    student = {part.name: part for part in measure(blueprint, usage, given)}
    parts = {part.name: part for part in measure(teacher, usage, given)}
    flops = {title: passes(title, blueprint) * part.flops for title, part in student.items()}
    ears = {title: of_ear for title, of_ear in flops.items() if title in ear_titles()}
    shared = student_titles(config, teacher, find_shared)
    return Work(
        student_flops=sum(flops.values()) - sum(ears.values()),
        ear_flops=sum(ears.values()),
        own_ear_flops=sum(flops for title, flops in ears.items() if title not in shared),
        teacher_flops=sum(part.flops for part in parts.values()),
        teacher_bytes=sum(part.bytes for title, part in parts.items() if title.startswith("LLM")),
        trained_bytes=4.0 * sum(student[title].parameters for title in blueprint.trained if title in student),
    )


def passes(title: str, student: Blueprint) -> int:
    """Forward, backward to what comes in unless nothing before is trained, and for what is trained to its weights."""
    if title in student.trained:
        return 3
    has_trained_lora = student.trains_ears and title == find_encoder(WHISPER).title
    return 2 if title not in ear_titles() or has_trained_lora else 1


def find_corpus(folder: str | Path, hours: float | None, usage: Usage) -> Corpus:
    """The packed shards of a folder, or `hours` of audio in clips of the usage's length.

    Raises:
        ValueError: nothing is packed there, and no hours are given.
    """
    if hours is not None:
        return Corpus(hours, max(1, round(3600 * hours / usage.seconds)), 3600 * hours * FLAC_BYTES)
    index, fields = f"{folder}/{CATALOG}", ("samples", "seconds", "bytes")
    listing = read_small(index)
    if listing is None:
        raise ValueError(
            f"--audio-hours is not given, but {index} is not there to count them; give them, or `distill pack` first."
        )
    shards = read_listing(index, listing, fields)
    samples, seconds, size = (sum(shard[name] for shard in shards) for name in fields)
    return Corpus(seconds / 3600, samples, size)


def plan_ways(config: Config, stay: Stay, corpus: Corpus, usage: Usage) -> dict[str, Hours]:
    """What a config takes as it is, and with its frames cached where it does not cache them; by the words for it."""
    work = count_work(config, usage)
    ways = {"": plan_hours(config, stay, corpus, usage, work)}
    if config.cache.frames == "none" and not config.teacher.online and not config.student.hearing.trains_ears:
        cached = replace(config, cache=replace(config.cache, frames="int8"))
        ways["cache.frames=int8"] = plan_hours(cached, stay, corpus, usage, work)
    return ways


def plan_hours(config: Config, stay: Stay, corpus: Corpus, usage: Usage, work: Work) -> Hours:
    """What a config takes of a stay's cards for a corpus whose mean clip is `usage`, of which `work` was counted."""
    clips, online = corpus.num_clips, config.teacher.online
    asked = clips * (1.0 if config.cache.answers in ("teacher", "both") else 1 - config.data.labelled_share)
    reads = asked * usage.answer_tokens / config.cache.batch_size * work.teacher_bytes  # of all weights, each token
    scored = 1.0 if online else config.on_policy.step_share  # share of the clips that the teacher hears in the steps
    a_clip = work.student_flops + work.teacher_flops * scored
    if online:
        a_clip += work.own_ear_flops
    elif config.cache.frames == "none" or config.student.hearing.trains_ears:
        a_clip += work.ear_flops
    return Hours(
        shards_gb=corpus.shard_bytes / 1e9,
        cache_gb=0.0 if online else clips * record_bytes(config, usage) / 1e9,
        answer_hours=0.0 if online else stay.hours(reads, stay.card.memory),
        cache_hours=0.0 if online else stay.hours(clips * work.teacher_flops),
        epoch_hours=stay.hours(clips * a_clip),
        train_hours=stay.hours(config.train.steps * config.train.batch_size * a_clip),
    )


def record_bytes(config: Config, usage: Usage) -> int:
    """What one clip takes in the cache's tars."""
    blueprint, given = describe_teacher(config)
    model = build_on_meta(blueprint, given)
    vocab_size = model.llm.get_output_embeddings().out_features
    size, width = usage.answer_tokens, model.project.out_features
    record = TargetRecord(
        payload=make_payload(config, size, vocab_size, width),
        answer_ids_S=np.zeros(size, np.int32),
        label_logprobs_S=np.zeros(size, np.float32),
        entropy_S=np.zeros(size, np.float16),
        byte_ends_S=np.zeros(size, np.int32),
        answer=ANSWER,
        answer_source="label",
        identity=IDENTITY,
        features={name: np.zeros(shape, np.float32) for name, shape in feature_shapes(config, model, usage)},
    )
    return BLOCK + -(-len(record.pack(feature_dtypes(config.cache, record))) // BLOCK) * BLOCK


def make_payload(config: Config, size: int, vocab_size: int, width: int) -> bytes:
    """What the codec keeps of a made-up distribution at so many positions."""
    codec, draw = find_codec(config.cache.codec).of(config.cache), torch.Generator().manual_seed(0)
    logits_V = -ZIPF * torch.arange(1, vocab_size + 1).log()
    logits_SV = torch.stack([logits_V[torch.randperm(vocab_size, generator=draw)] for _ in range(size)])
    states_SD = torch.zeros(size, width)
    captured = codec.capture(logits_SV, states_SD, draw) if codec.is_random else codec.capture(logits_SV, states_SD)
    return codec.encode(to_host(captured))


def feature_shapes(config: Config, model: Salmonn, usage: Usage) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The features that a record holds, as `distill.caching.capture` keeps them."""
    cache, samples = config.cache, round(usage.seconds * SAMPLE_RATE)
    if cache.features != "none" and model.has_queries:
        yield QUERIES, (model.num_audio_tokens(samples), model.project.in_features)
    if cache.frames != "none":
        windows, seconds = config.student.windows, frames_seconds(config, model)
        for number, ear in enumerate(ear for ear in (model.whisper, model.second) if ear is not None):
            yield f"{FRAMES}{number}_RE", (num_frames_read(model, samples, windows, seconds), ear.width)
    for layer in cache.hidden_layers:
        yield f"hidden_{layer}_SD", (usage.answer_tokens, model.project.out_features)


def format_hours(ways: dict[str, Hours], stay: Stay, corpus: Corpus) -> str:
    """The plan as text, a column a way."""
    lines = [
        f"on {stay.number} x {stay.card.name} at {stay.reached:.0%} of the published rate; {corpus.hours:,.1f} h of "
        f"audio in {corpus.num_clips:,} clips of {corpus.mean_seconds:.1f} s"
    ]
    if len(ways) > 1:
        lines.append(f"  {'':<32}" + "".join(f"{words or 'as it is':>20}" for words in ways))
    for name, title in TITLES.items():
        values = [getattr(hours, name) for hours in ways.values()]
        if any(values):
            lines.append(f"  {title:<32}" + "".join(f"{value:>20,.2f}" for value in values))
    return "\n".join(lines)


def describe_hours(ways: dict[str, Hours], stay: Stay) -> dict:
    """The same for a script."""
    return {"card": stay.card.name, "gpus": stay.number, "reached": stay.reached,
            "ways": {words or "as it is": asdict(hours) for words, hours in ways.items()}}  # fmt: skip
