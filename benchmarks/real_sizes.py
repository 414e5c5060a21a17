"""The recipe 3B → 1B at its real sizes: seconds and memory of every stage, on a GPU or without one.

Weights are random, in the real formats: a SALMONN checkpoint, Whisper and Llama folders, a BEATs file (11 GB in
`--folder`, made once). Clips are 10 s of noise with an answer of about 30 tokens. Every stage has a process of its own,
whose high-water mark of memory it reports: of host memory from the first work on, when all is loaded, beside what
`distill plan` counts for that and what the process holds without models: `python benchmarks/real_sizes.py [--folder F]
[key=value …]`.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from record import write_result
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration

from distill.cache import cache
from distill.caching.capture import Capturer
from distill.config import Config, load_config
from distill.demo.tokenizer import train_tokenizer
from distill.distiller import Distiller
from distill.evaluation.answering import Cost, measure_cost
from distill.run import run
from distill.sizes.costs import Usage, model_config
from distill.sizes.fits import Cards, plan_memory
from distill.teacher import load_teacher, resolve_ears, teach_online
from shards.packing.pack import pack
from shards.sample import SAMPLE_RATE
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from students.student import load_student
from teachers.ears.beats import FIXED_CFG, BeatsConfig, BeatsEar
from teachers.files.checkpoint import save_checkpoint
from teachers.files.loading import build_salmonn
from teachers.files.weights import assign_parameter_
from teachers.lora import SALMONN_LORA
from teachers.salmonn import SalmonnConfig
from teachers.words.prompts import load_prompts

RECIPE = "configs/salmonn_3b_to_1b.yaml"
LLMS = {"llm": "meta-llama/Llama-3.2-3B-Instruct", "student": "meta-llama/Llama-3.2-1B-Instruct"}
WHISPER = "openai/whisper-large-v2"
SECONDS, WORDS = 10.0, 12  # of a clip; of its answer, two or three tokens each
HAS_GPU = torch.cuda.is_available()
CLIPS, BATCH, STEPS, RUNS = (128, 16, 20, 5) if HAS_GPU else (4, 2, 3, 1)  # a CPU takes half a minute a clip
GB = 1e9


def make_weights(folder: Path) -> None:
    """Every part of the recipe's teacher and student, with random weights; made once."""
    if (folder / "salmonn.pth").exists():
        return
    torch.manual_seed(0)
    prompts = load_prompts(None, SalmonnConfig("", "").template)
    texts = [prompts.template, *(text for task in prompts.by_task.values() for text in task)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=1000)
    for name, published in LLMS.items():
        llm = AutoModelForCausalLM.from_config(model_config(published), dtype=torch.bfloat16)
        llm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        del llm
    whisper = model_config(WHISPER)
    whisper.decoder_layers = 1  # it is never read
    WhisperForConditionalGeneration(whisper).half().save_pretrained(folder / "whisper")
    torch.save(make_beats(), folder / "BEATs.pt")
    config = SalmonnConfig(str(folder / "llm"), str(folder / "whisper"), str(folder / "BEATs.pt"), "beats")
    teacher = build_salmonn(config, lora=SALMONN_LORA, llm_weights=False)
    for name, parameter in list(teacher.named_parameters()):
        if "lora_" in name:
            assign_parameter_(teacher, name, 0.02 * torch.randn(parameter.shape))
    save_checkpoint(teacher, folder / "salmonn.pth")


def make_beats() -> dict:
    """A BEATs as its authors' files hold it: one table of positions in every layer, the convolution weight-normed."""
    sizes = BeatsConfig()
    ear = BeatsEar(sizes)
    weights = ear.state_dict()
    kernel = weights.pop("encoder.pos_conv.weight")
    weights["encoder.pos_conv.0.weight_g"] = kernel.norm(dim=(0, 1), keepdim=True)
    weights["encoder.pos_conv.0.weight_v"] = kernel
    weights["encoder.pos_conv.0.bias"] = weights.pop("encoder.pos_conv.bias")
    table = weights.pop("encoder.relative_attention_bias.weight")
    for number in range(len(ear.encoder.layers)):
        weights[f"encoder.layers.{number}.self_attn.relative_attention_bias.weight"] = table
    cfg = {name: value for name, value in dataclasses.asdict(sizes).items() if value is not None}
    return {"cfg": {**cfg, **FIXED_CFG}, "model": weights}


def make_shards(folder: Path) -> None:
    """Clips of noise with answers of random words."""
    random = np.random.default_rng(0)
    audio = folder / "audio"
    audio.mkdir(exist_ok=True)
    rows = []
    for number in range(CLIPS):
        clip_N = 0.1 * random.standard_normal(round(SECONDS * SAMPLE_RATE))
        soundfile.write(audio / f"{number:04d}.wav", clip_N, SAMPLE_RATE, subtype="PCM_16")
        text = " ".join(random.choice(["listen", "speech", "audio", "sound", "please", "describe"], WORDS))
        rows.append({"path": str(audio / f"{number:04d}.wav"), "text": text, "task": "asr"})
    (folder / "train.json").write_text(json.dumps({"annotation": rows}))
    pack(folder / "train.json", folder / "data" / "train", name="train")


def read_config(folder: Path, words: list[str]) -> Config:
    """The recipe on these weights and clips."""
    parts = {"teacher.path": "salmonn.pth", "teacher.llm": "llm", "teacher.whisper": "whisper",
             "teacher.second": "BEATs.pt", "student.llm": "student", "data.folder": "data", "runs": "runs"}  # fmt: skip
    sizes = {"data.workers": 2, "cache.batch_size": BATCH, "cache.frames": "int8", "train.steps": STEPS,
             "train.batch_size": BATCH, "train.micro_batch_size": BATCH, "train.warmup_steps": 1,
             "train.eval_every": 0}  # fmt: skip
    return load_config(RECIPE, [*(f"{key}={folder / name}" for key, name in parts.items()),
                                *(f"{key}={value}" for key, value in sizes.items()), *words])  # fmt: skip


def first_batch(config: Config) -> list:
    """As many clips as a batch has."""
    return next(iter(ShardStream(config.shards("train"), Order(batch_size=BATCH, shuffle=False, epochs=1))))


def clock(call: Callable[[], object]) -> float:
    """Median seconds of a call, after one that does not count where there are several."""
    seconds = []
    for _ in range(RUNS if RUNS == 1 else RUNS + 1):
        began = time.perf_counter()
        call()
        if HAS_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[-RUNS:])


def describe_cost(cost: Cost) -> dict[str, float]:
    return {"weights GB": cost.weight_bytes / GB, "first token ms": cost.first_token_ms,
            "next token ms": cost.next_token_ms}  # fmt: skip


def show(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure_teacher(config: Config) -> dict[str, float]:
    """The teacher alone: loading, its ears, a batch's targets, and what an answer costs."""
    began = time.perf_counter()
    model = load_teacher(config, ears=resolve_ears(config, is_kept=True)).to("cuda" if HAS_GPU else "cpu")
    figures = {"load s": time.perf_counter() - began}
    forget_peak()
    samples = first_batch(config)
    batch = model.collate(samples).to(model.device)
    capture = Capturer(teach_online(config, model), config)
    with torch.no_grad(), torch.autocast(model.device.type, capture.dtype, enabled=capture.dtype != torch.float32):
        hear = clock(lambda: model.frames(batch.waveforms_BN, batch.num_samples_B))
    figures["ears, s of audio a s"] = SECONDS * len(samples) / hear
    figures["targets, clips a s"] = len(samples) / clock(lambda: capture(samples))
    return figures | describe_cost(measure_cost(model, samples[0], RUNS))


def measure_cache(config: Config) -> dict[str, float]:
    """The caching job, its start included."""
    began = time.perf_counter()
    begin_with(Capturer, "__call__")
    cache(config)
    files = [path for path in config.cache_folder.rglob("*.tar*") if path.is_file()]
    return {"s": time.perf_counter() - began, "KB a clip": sum(path.stat().st_size for path in files) / CLIPS / 1e3}


def measure_training(config: Config) -> dict[str, float]:
    """Training from the cache, frames and all; the first step does not count."""
    began = time.perf_counter()
    begin_with(Distiller, "_step")
    run(config)
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    steps = statistics.median(json.loads(line)["seconds"] for line in lines[1:])
    student = config.run_folder / "student" / "model.safetensors"
    return {"s": time.perf_counter() - began, "s a step": steps, "clips a s": BATCH / steps,
            "checkpoint MB": student.stat().st_size / 1e6}  # fmt: skip


def measure_student(config: Config) -> dict[str, float]:
    """The trained student alone."""
    began = time.perf_counter()
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    model = load_student(config.run_folder / "student", dtype=dtype).to("cuda" if HAS_GPU else "cpu")
    figures = {"load s": time.perf_counter() - began}
    forget_peak()
    return figures | describe_cost(measure_cost(model, first_batch(config)[0], RUNS))


STAGES: dict[str, Callable[[Config], dict[str, float]]] = {
    "teacher": measure_teacher,
    "cache": measure_cache,
    "train": measure_training,
    "student": measure_student,
}


PLANNED = {"cache": 1, "train": 0, "student": 2}  # of the plan's stages


def measure_stage(name: str, config: Config) -> dict[str, float]:
    """One stage in this process, and the most memory it held, of host memory from its first work on."""
    alone = read_status("VmRSS")
    figures = STAGES[name](config)
    if HAS_GPU:
        return figures | {"peak GPU GB": torch.cuda.max_memory_allocated() / GB}
    figures["at work GB"] = read_status("VmHWM")
    if name in PLANNED:
        whole = dataclasses.replace(config, precision="float32", eval=dataclasses.replace(config.eval, num_beams=1))
        whole = dataclasses.replace(whole, eval=dataclasses.replace(whole.eval, batch_size=1))
        need = plan_memory(whole, Cards(1, zero_stage=0), Usage(SECONDS, 30, 30))[PLANNED[name]]
        figures["planned GB"] = alone + sum(need.parts.values()) / GB
    return figures


def begin_with(owner: type, method: str) -> None:
    """Let the high-water mark begin anew when a method is first called."""
    plain = getattr(owner, method)

    def first(self, *args):
        setattr(owner, method, plain)
        forget_peak()
        return plain(self, *args)

    setattr(owner, method, first)


def forget_peak() -> None:
    """Give back what loading left, and let Linux begin the high-water mark of memory anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def read_status(name: str) -> float:
    """A size of this process, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / GB


def make_table(stages: dict[str, dict[str, float]]) -> str:
    """Markdown: one row a figure."""
    lines = [f"{CLIPS} clips of {SECONDS:g} s, {BATCH} a batch; random weights of the real sizes.\n"]
    columns = list(dict.fromkeys(figure for figures in stages.values() for figure in figures))
    lines += ["| | " + " | ".join(stages) + " |", "|---" * (1 + len(stages)) + "|"]
    for column in columns:
        cells = [show(figures[column]) if column in figures else "" for figures in stages.values()]
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("data/real_sizes"), help="where weights and run go")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", metavar="key=value", help="fields of the recipe")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(folder, arguments.words)
    if arguments.stage:
        print("figures:", json.dumps(measure_stage(arguments.stage, config)))
        return
    make_weights(folder)
    make_shards(folder)
    for made in (config.cache_folder, config.run_folder):  # by a run of this script before
        shutil.rmtree(made, ignore_errors=True)
    stages = {}
    for name in STAGES:
        command = [sys.executable, __file__, "--folder", folder, "--stage", name, *arguments.words]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        stages[name] = json.loads(lines[-1].removeprefix("figures:"))
        print(name, stages[name], flush=True)
    write_result("real_sizes_gpu" if HAS_GPU else "real_sizes", {"stages": stages}, make_table(stages))


if __name__ == "__main__":
    main()
