"""Whether other kinds of LoRA than the plain one pay for a student in 4 bits, on real spoken digits: WER, three seeds.

rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353) are peft's own; the start from the 4-bit error of each layer is
the first step of LoftQ (arXiv 2310.08659). No student has a field for them: each is put into peft or the student's
start here, and would get one if it paid. All learn with CE + KL for equal steps from one cache. Run
`benchmarks/fsdd.py` with the same words first, whose teacher and cache are used:
`python benchmarks/digits/fsdd_lora.py [key=value …] [--kinds …]`. Students that were made before are used again.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import peft
import torch
from digits.fsdd_students import CONFIG, SEEDS, describe_percents, describe_points, examine, load_trained
from fsdd import error_rate
from record import write_result
from transformers import AutoModelForCausalLM

import distill.run as stage
from distill.config import load_config
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import Difference, paired_difference
from students.quantize import dequantize

KINDS = {
    "plain": ("LoRA", {}),
    "rslora": ("rsLoRA: updates times alpha / √rank", {"use_rslora": True}),
    "dora": ("DoRA: magnitude and direction apart", {"use_dora": True}),
    "error": ("LoRA from the 4-bit error (LoftQ, one step)", {}),
}


@contextmanager
def kind_of_lora(kind: str) -> Iterator[None]:
    """A block in which students get this kind of LoRA."""
    config, make = peft.LoraConfig, stage.make_student

    def make_from_error(run, *args):
        student = make(run, *args)
        start_from_error_(student.llm, run.student.llm)
        return student

    peft.LoraConfig = partial(config, **KINDS[kind][1])
    stage.make_student = make_from_error if kind == "error" else make
    try:
        yield
    finally:
        peft.LoraConfig, stage.make_student = config, make


@torch.no_grad()
def start_from_error_(llm: torch.nn.Module, folder: str) -> None:
    """Let LoRA's matrices give, as near as their rank can, what 4 bits took from each layer, in place."""
    whole = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_modules())
    for name, layer in llm.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            error = whole[name].weight - dequantize(layer.base_layer.weight)
            left, sizes, right = torch.linalg.svd(error, full_matrices=False)
            root = (sizes[: len(down)] / layer.scaling["default"]).sqrt()
            up.copy_(left[:, : len(down)] * root)
            down.copy_(root[:, None] * right[: len(down)])


def train_and_answer(kind: str, seed: int, words: list[str]) -> list[Prediction]:
    """One student's answers to the test split; the plain one is that of `fsdd.py`."""
    scratch = load_config(CONFIG).run_folder / "scratch"
    name = f"fsdd-ce_kl-{seed}" if kind == "plain" else f"fsdd-lora-{kind}-{seed}"
    config = load_config(CONFIG, [f"name={name}", f"seed={seed}", f"teacher.path={scratch}/teacher", "loss.feature=0",
                                  f"student.llm={scratch}/student-llm", *words])  # fmt: skip
    with kind_of_lora(kind):
        if code := stage.run(config):
            sys.exit(code)
        return examine(load_trained(config), config)[0]


def main() -> None:
    """Train every student, one after the other, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    answers = {kind: [] for kind in dict.fromkeys(["plain", *args.kinds])}
    for seed in SEEDS:
        for kind, by_seed in answers.items():
            by_seed.append(train_and_answer(kind, seed, args.words))
    wers = {kind: [error_rate(one) for one in by_seed] for kind, by_seed in answers.items()}
    over_plain = {kind: paired_difference(by_seed, answers["plain"], normalize=False)["asr"]
                  for kind, by_seed in answers.items() if kind != "plain"}  # fmt: skip
    figures = {"students": wers, "steps": load_config(CONFIG, args.words).train.steps}
    write_result("fsdd_lora", figures, make_table(wers, over_plain))


def make_table(wers: dict[str, list[float]], over_plain: dict[str, Difference]) -> str:
    """Markdown: mean and standard deviation over the seeds, and of differences the interval over clips."""
    lines = [
        "| a student with | WER % (mean ± sd, 3 seeds) | each | beside plain LoRA, points of WER |",
        "|---|---|---|---|",
    ]
    for kind, by_seed in wers.items():
        beside = describe_points(over_plain[kind]) if kind in over_plain else ""
        lines.append(f"| {KINDS[kind][0]} | {describe_percents(by_seed)} | {beside} |")
    return "\n".join([*lines, "", "In brackets: the 95 % interval of a paired bootstrap over clips, seeds averaged."])


if __name__ == "__main__":
    main()
