"""A pipeline of toys for the tests: random weights in the real formats, and clips of tones, in seconds."""

import multiprocessing
import os
import resource
import socket
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch
from accelerate.state import AcceleratorState

from distill.config import CacheConfig, Config, ScratchConfig, load_config, to_yaml
from distill.demo.scratch import build_llm, build_whisper
from distill.demo.tokenizer import train_tokenizer
from shards.files.write import open_atomically
from shards.packing.folder import ShardSize
from shards.packing.pack import pack
from shards.sample import SAMPLE_RATE, Sample
from shards.targets.codecs.table import find_codec
from teachers.files.loading import build_salmonn, save_salmonn
from teachers.lora import Lora
from teachers.salmonn import Salmonn, SalmonnConfig
from teachers.words.prompts import load_prompts

TASKS = (
    "asr",
    "audiocaption",
    "audiocaption_v2",
    "gender_recognition",
    "phone_recognition",
    "QA",
)  # that toys can spell
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TOYS = int(os.environ.get("TOYS", "0"))  # other toys, as another processor would make them: see CONTRIBUTING.md
SIZES = ScratchConfig(seconds=2.0, ear_width=64, ear_layers=1, llm_width=64, llm_layers=1, student_width=32,
                      student_layers=1, qformer_width=32)  # fmt: skip


def make_parts(folder: Path, *, seed: int = 0, student_width: int = SIZES.student_width) -> None:
    """Tokenizer, `whisper`, `llm` and `student-llm` with random weights."""
    torch.manual_seed(seed + TOYS)
    prompts = load_prompts(None, SalmonnConfig("", "").template)
    texts = [prompts.template, *WORDS, "male", "female", "a low tone"]
    texts += [text for task in TASKS for text in prompts.by_task[task]]
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=420)
    build_whisper(SIZES).save_pretrained(folder / "whisper")
    for name, width in (("llm", SIZES.llm_width), ("student-llm", student_width)):
        build_llm(len(tokenizer), width, 1, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_teacher(parts: Path, *, lora: bool = False, seed: int = 0, **changes) -> Salmonn:
    """A SALMONN of `make_parts`' parts with a random connector; frozen parts and own parts as in real life."""
    torch.manual_seed(seed + TOYS)
    config = SalmonnConfig(
        llm=str(parts / "llm"), whisper=str(parts / "whisper"), window_seconds=0.34, stride_seconds=0.34,
        qformer_width=32, qformer_layers=1, qformer_heads=2, qformer_ffn=64, **changes,
    )  # fmt: skip
    model = build_salmonn(config, lora=Lora(rank=4, alpha=8) if lora else None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in ("whisper", "llm") or "lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@contextmanager
def full_disk(num_bytes: int):
    """A disk that takes no file of more bytes: a write past them fails, as one to a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_teacher(parts: Path, folder: Path) -> Path:
    """A teacher folder, and its path."""
    save_salmonn(make_teacher(parts), folder)
    return folder


def tone(number: int, seconds: float = 0.6) -> np.ndarray:
    """A clip that differs with `number`, float32."""
    time_N = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * (150 + 37 * number) * time_N)).astype(np.float32)


def write_clip(path: Path, number: int = 0) -> Path:
    """A recording of a tone, and its path."""
    soundfile.write(path, tone(number), SAMPLE_RATE, subtype="PCM_16")
    return path


def make_sample(number: int = 0, *, text: str | None = "one two", task: str = "asr", seconds: float = 0.6) -> Sample:
    """A sample as the stream yields it."""
    return Sample(f"k{number:03d}", tone(number, seconds), text, task, None, "toys", f"{number:064x}")


def make_shards(folder: Path, *, num_samples: int = 12, split: str = "train", shard_samples: int = 5) -> Path:
    """Packed tones of two lengths with one to three words as their text; returns the split's folder."""
    import json

    audio = folder / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_samples):
        path = audio / f"{split}-{number:03d}.wav"
        soundfile.write(path, tone(number, 0.5 + 0.25 * (number % 3)), SAMPLE_RATE, subtype="PCM_16")
        text = " ".join(WORDS[(number + i) % 10] for i in range(1 + number % 3))
        rows.append({"path": str(path), "text": text, "task": "asr"})
    with open_atomically(folder / f"{split}.json") as file:
        json.dump({"annotation": rows}, file)
    pack(folder / f"{split}.json", folder / split, name=split, size=ShardSize(shard_samples), workers=1)
    return folder / split


def write_config(path: Path, data: Path, teacher: Path, parts: Path, **changes) -> Path:
    """A config of a run over toys; `changes` are dotted keys with `__` for the dot."""
    values = {
        "name": "toy", "runs": path.parent / "runs", "data__folder": data, "teacher__path": teacher,
        "student__llm": parts / "student-llm", "student__connector": "new", "student__lora_rank": 4,
        "cache__batch_size": 4, "cache__max_new_tokens": 8, "eval__max_new_tokens": 8,  # toys rarely end an answer
        "train__steps": 4, "train__batch_size": 4, "train__micro_batch_size": 4,
        "train__learning_rate": 2e-3, "train__warmup_steps": 2, "train__save_every": 2,
        "corpus__valid_share": 0.0, **changes,
    }  # fmt: skip
    if "k" in find_codec(values.get("cache__codec", CacheConfig.codec)).settings:
        values = {"cache__k": 16} | values
    words = [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    path.write_text("")
    path.write_text(to_yaml(load_config(path, words)))
    return path


def make_toys(folder: Path, **changes) -> Path:
    """`parts/`, `teacher/` and the shards `data/train` in a folder, and `toy.yaml` of a run over them."""
    make_parts(folder / "parts")
    save_teacher(folder / "parts", folder / "teacher")
    make_shards(folder / "data")
    return write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts", **changes)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_two_ranks(stage: Callable[[Config], object], config: Config) -> None:
    """Run a stage as a launcher of two ranks does; the imports are already done here."""
    port, context = free_port(), multiprocessing.get_context("fork")
    ranks = [context.Process(target=_be_rank, args=(rank, port, stage, config)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def _be_rank(rank: int, port: int, stage: Callable[[Config], object], config: Config) -> None:
    become_rank(rank, port)
    stage(config)


def become_rank(rank: int, port: int, world_size: int = 2) -> None:
    """Make this forked process what a launcher starts several of; the imports are already done here."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
