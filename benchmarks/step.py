"""What a training step costs against the loop that one writes first: naive, shared ears, cached targets, cached frames.

The naive loop runs both models' own ears, pads to the longest row, takes every position through both heads and the KL
over the whole vocabulary. Then the product's own steps: ears that are run once, targets from the cache, frames of the
ears from it too, and only the windows that hold audio. All of one config, same clips, in one run, as ratios; then two
ranks against one, a thread each: `python benchmarks/step.py [--real] [--folder F] [key=value …]`. By default the parts
are small, with random weights; `--real` takes the recipe 3B → 1B at its real sizes (11 GB on the disk and 20 GB of
memory with `precision=bf16`, made by `real_sizes.py`) and one rank.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import real_sizes
import torch
from record import RESULTS, write_result
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, LlamaConfig, WhisperConfig, WhisperForConditionalGeneration

from distill.cache import cache
from distill.config import Config, to_yaml
from distill.demo.tokenizer import train_tokenizer
from distill.run import open_training_stream, run, wrap_teacher
from distill.student import make_student
from distill.teacher import load_teacher
from distill.training.ranks import build_accelerator, resolve_precision
from shards.sample import Sample
from teachers.files.checkpoint import save_checkpoint
from teachers.files.loading import build_salmonn
from teachers.lora import SALMONN_LORA
from teachers.salmonn import Salmonn, SalmonnConfig
from teachers.words.prompts import load_prompts

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4  # of each kind; the first warms up
RANK_STEPS, RANK_BATCH, RANK_MICRO = 5, 16, 2  # of one and of two ranks; the first warms up
SIZES = {"small": "small parts", "real_1b": "3B → 1B"}
KINDS = {  # what each adds to the one before
    "naive": "own ears for both, every position through the heads, dense KL",
    "shared_ears": "ears run once, supervised positions alone, top-K KL",
    "targets": "the teacher's targets from the cache",
    "frames": "frames of the ears from the cache too",
    "windows": "only windows that hold audio",
}
WORDS = {
    "naive": ["teacher.online=true", "cache.frames=none"],
    "shared_ears": ["teacher.online=true", "cache.frames=none"],
    "targets": ["cache.frames=none"],
    "frames": ["cache.frames=int8"],
    "windows": ["cache.frames=int8", "student.windows=audio"],
}


def make_small_parts(folder: Path) -> None:
    """A SALMONN checkpoint and a student's LLM with random weights: Whisper base's encoder, LLMs of 60 M and 20 M."""
    torch.manual_seed(0)
    prompts = load_prompts(None, SalmonnConfig("", "").template)
    texts = [prompts.template, *(text for task in prompts.by_task.values() for text in task)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=1000)
    for name, (width, layers) in {"llm": (768, 8), "student": (384, 6)}.items():
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 192}
        llm = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=32_000, tie_word_embeddings=True, **sizes, **heads)
        )
        llm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    base = WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048,
                         decoder_layers=1, decoder_attention_heads=8, decoder_ffn_dim=512)  # fmt: skip
    WhisperForConditionalGeneration(base).save_pretrained(folder / "whisper")
    teacher = build_salmonn(SalmonnConfig(str(folder / "llm"), str(folder / "whisper")), lora=SALMONN_LORA)
    save_checkpoint(teacher, folder / "salmonn.pth")


def read_config(folder: Path, kind: str, words: list[str], *, is_real: bool) -> Config:
    """The recipe on these parts, for one kind of step."""
    cached = kind if kind in ("frames", "windows") else "targets"
    own = [f"name={kind}", f"train.steps={STEPS}", "train.save_every=1000000", "student.windows=all", "data.workers=0",
           f"cache.folder={folder}/data/cache-{cached}", *WORDS[kind]]  # fmt: skip
    if not is_real:
        own += ["teacher.second=''", "teacher.second_kind=''"]
    return real_sizes.read_config(folder, [*own, *words])


def time_naive(config: Config) -> list[float]:
    """Seconds of each step of the loop that one writes first."""
    accelerator = build_accelerator()
    teacher = load_teacher(config).to(accelerator.device)
    base = load_teacher(config, llm_weights=False)  # ears of its own, and an LLM that nobody asks
    student = make_student(config, base, resolve_precision(config.precision), print)
    student.to(accelerator.device).train()
    stream = open_training_stream(config, accelerator, wrap_teacher(config, teacher), student)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    seconds, batches = [], iter(stream)
    for _ in range(STEPS):
        began = time.perf_counter()
        naive_step(teacher, student, next(batches), config.loss.temperature).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def naive_step(teacher: Salmonn, student: Salmonn, samples: list[Sample], temperature: float) -> Tensor:
    """Cross-entropy and dense forward KL, every position through both heads; the queries' distance."""
    batch = student.collate(samples).to(student.device)
    with torch.no_grad():
        heard = teacher.hear(batch)
        theirs_BTV = all_logits(teacher, teacher.embed(batch, heard), batch)
    own = student.hear(batch)
    own_BTV = all_logits(student, student.embed(batch, own), batch)
    at = batch.predicting_S
    own_SV, theirs_SV = own_BTV.flatten(0, 1)[at].float(), theirs_BTV.flatten(0, 1)[at].float()
    soft = [(x / temperature).log_softmax(-1) for x in (own_SV, theirs_SV)]
    kl = kl_div(*soft, log_target=True, reduction="batchmean") * temperature**2
    feature = (own.queries_BWQE - heard.queries_BWQE).square().mean()
    return cross_entropy(own_SV, batch.labels_S) + kl + feature


def all_logits(model: Salmonn, embeds_BTD: Tensor, batch) -> Tensor:
    """The LLM as it is, its head on every position."""
    return model.llm(inputs_embeds=embeds_BTD, attention_mask=batch.attention_mask_BT, use_cache=False).logits


def synchronize() -> None:
    """Wait for a GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_product(config: Config) -> list[float]:
    """Seconds of each step of a run, as its own log has them."""
    shutil.rmtree(config.run_folder, ignore_errors=True)
    if not config.teacher.online:
        cache(config)
    run(config)
    return [record["seconds"] for record in read_metrics(config.run_folder / "metrics.jsonl")]


def time_ranks(folder: Path, ranks: int, words: list[str]) -> list[float]:
    """Seconds of each step from cached frames, one thread a rank, of batches large enough to train with."""
    own = [f"name=ranks-{ranks}", f"train.steps={RANK_STEPS}", f"train.batch_size={RANK_BATCH}",
           f"train.micro_batch_size={RANK_MICRO}"]  # fmt: skip
    config = read_config(folder, "frames", [*words, *own], is_real=False)
    shutil.rmtree(config.run_folder, ignore_errors=True)
    path = folder / f"ranks-{ranks}.yaml"
    path.write_text(to_yaml(config))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/two_cpus_ddp.yaml"]
    command = [sys.executable, *(launcher if ranks == 2 else []), ROOT / "distill/run.py", path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*map(str, command)], check=True, env=environment)
    return [record["seconds"] for record in read_metrics(config.run_folder / "metrics.jsonl")]


def read_metrics(path: Path) -> Iterator[dict]:
    """The records of a run's log."""
    return map(json.loads, path.read_text().splitlines())


def main() -> None:
    """Time every kind and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--real", action="store_true", help="the recipe 3B → 1B at its real sizes")
    parser.add_argument("--folder", type=Path, help="of the parts; default: a temporary one")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "salmonn.pth").exists():
            (real_sizes.make_weights if args.real else make_small_parts)(folder)
        real_sizes.make_shards(folder)
        seconds = {}
        for kind in KINDS:
            config = read_config(folder, kind, args.words, is_real=args.real)
            found = time_naive(config) if kind == "naive" else time_product(config)
            seconds[kind] = statistics.median(found[1:])
        by_ranks = {} if args.real else {
            str(ranks): statistics.median(time_ranks(folder, ranks, args.words)[1:]) for ranks in (1, 2)
        }  # fmt: skip
    figures = keep_others(seconds, by_ranks, "real_1b" if args.real else "small")
    write_result("step", figures, make_table(figures))


def keep_others(seconds: dict[str, float], by_ranks: dict[str, float], size: str) -> dict:
    """The figures of this size, beside those of the other that were measured before."""
    path = RESULTS / "step.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    figures = {name: known[name] for name in ("small", "real_1b", "ranks", "two_ranks") if name in known}
    figures[size] = seconds
    if by_ranks:
        figures |= {"ranks": by_ranks, "two_ranks": by_ranks["1"] / by_ranks["2"]}
    return figures


def make_table(figures: dict) -> str:
    """Seconds a step at each size, and how many times faster than the naive loop; one rank and two."""
    sizes = {name: title for name, title in SIZES.items() if name in figures}
    lines = ["| step | adds |" + "".join(f" s, {title} | × the naive loop's speed |" for title in sizes.values()),
             "|---|---|" + "---:|---:|" * len(sizes)]  # fmt: skip
    for kind, adds in KINDS.items():
        found = [(figures[name][kind], figures[name]["naive"] / figures[name][kind]) for name in sizes]
        lines.append(f"| {kind} | {adds} |" + "".join(f" {s:.2f} | {ratio:.1f} |" for s, ratio in found))
    if "ranks" in figures:
        one, two = figures["ranks"]["1"], figures["ranks"]["2"]
        how = f"Small parts, with frames, a thread a rank, {RANK_BATCH} clips a step"
        lines += ["", f"{how}: {one:.2f} s on one rank, {two:.2f} s on two, {one / two:.2f} ×."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
