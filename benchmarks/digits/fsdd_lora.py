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
from digits.fsdd_students import CONFIG, SEEDS, describe_percents, examine, load_trained
from fsdd import error_rate
from record import write_result
from transformers import AutoModelForCausalLM

import distill.run as stage
from distill.config import load_config
from distill.evaluation.metrics.scores import paired_difference
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


def main() -> None:
    """Train every student, one after the other, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    kinds = list(dict.fromkeys(["plain", *args.kinds]))
    scratch = load_config(CONFIG).run_folder / "scratch"
    answers, steps = {}, 0
    for seed in SEEDS:
        for kind in kinds:
            name = f"fsdd-ce_kl-{seed}" if kind == "plain" else f"fsdd-lora-{kind}-{seed}"
            words = [f"name={name}", f"seed={seed}", f"teacher.path={scratch}/teacher", "loss.feature=0",
                     f"student.llm={scratch}/student-llm", *args.words]  # fmt: skip
            config = load_config(CONFIG, words)
            with kind_of_lora(kind):
                if code := stage.run(config):
                    sys.exit(code)
                answers[kind, seed] = examine(load_trained(config), config)[0]
            steps = config.train.steps
    wers = {kind: [error_rate(answers[kind, seed]) for seed in SEEDS] for kind in kinds}
    paired = {kind: paired_difference([answers[kind, seed] for seed in SEEDS],
                                      [answers["plain", seed] for seed in SEEDS], normalize=False)["asr"]
              for kind in kinds if kind != "plain"}  # fmt: skip
    lines = ["| a student with | WER % (mean ± sd, 3 seeds) | each | beside plain LoRA, points of WER |",
             "|---|---|---|---|"]  # fmt: skip
    for kind in kinds:
        beside = ""
        if kind in paired:
            d = paired[kind]
            beside = f"{100 * d.value:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
        lines.append(f"| {KINDS[kind][0]} | {describe_percents(wers[kind])} | {beside} |")
    lines += ["", "In brackets: the 95 % interval of a paired bootstrap over clips, seeds averaged."]
    write_result("fsdd_lora", {"students": wers, "steps": steps}, "\n".join(lines))


if __name__ == "__main__":
    main()
