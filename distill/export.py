"""A finished student as a folder to hand on: `distill export RUN_FOLDER OUT [--merge] [--salmonn]`.

What only training needs stays behind: checkpoints, moments, projectors. With `--merge` LoRA becomes part of the LLM's
weights, which then lie in the folder, in the type of the base model's: those that the student was trained on, its 4-bit
weights read back, plus LoRA. Without, the folder holds LoRA and names its base model.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from distill.card import SCORECARD, Scorecard, cost_rows, count_clips, explain_scores, read_scorecard, score_rows
from students.quantize import dequantize, dequantize_, measure_share, whole_linear
from students.student import CONNECTOR, load_student
from teachers.checkpoint import save_checkpoint
from teachers.loading import CONFIG, build_salmonn, read_config, save_salmonn
from teachers.salmonn import Salmonn
from teachers.saving import staged, write_atomically

LLM, CARD, SALMONN = "llm", "README.md", "salmonn.pth"


def export(run_folder: Path, out: Path, *, merge: bool = False, salmonn: bool = False) -> Path:
    """Write the student of a run to `out`, which `load_student` reads; returns `out`.

    Args:
        run_folder: of a finished run; its `student` folder is exported.
        merge: write the LLM with LoRA inside, and no LoRA.
        salmonn: write `salmonn.pth` beside, with SALMONN's own names.

    Raises:
        FileNotFoundError: the run has no student yet.
        FileExistsError: there is something at `out`.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files already, but an export starts empty; choose another folder.")
    try:
        return write_export(run_folder, out, merge=merge, salmonn=salmonn)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # so that the same command can be given again
        raise


def write_export(run_folder: Path, out: Path, *, merge: bool, salmonn: bool) -> Path:
    """Write into an empty folder; arguments as `export`."""
    settings = read_config(run_folder / "student")["settings"]
    student = load_student(run_folder / "student")
    if merge:
        student, settings = merge_lora(student, out), {"lora": None, "quantization": "none"}
    save_salmonn(student, out, settings=settings)
    if merge:
        name_own_llm_(out)
    if salmonn:
        save_checkpoint(student, out / SALMONN)
    card = read_scorecard(run_folder) if (run_folder / SCORECARD).exists() else None
    write_atomically(out / CARD, lambda path: path.write_text(make_card(run_folder.name, student, settings, card)))
    return out


@torch.no_grad()
def merge_lora(student: Salmonn, out: Path) -> Salmonn:
    """The student on a LLM whose weights hold its LoRA, written to `out/llm`; the student's own LLM is used up."""
    llm = student.llm
    for name, module in list(llm.named_modules()):
        if hasattr(module, "lora_A"):
            llm.set_submodule(name, whole_linear(merged_weight(module), module.base_layer.bias))
    dequantize_(llm)
    llm.to(AutoConfig.from_pretrained(student.config.llm).dtype or torch.float32)
    with staged(out / LLM, last="config.json") as stage:
        llm.save_pretrained(stage)
        student.tokenizer.save_pretrained(stage)
    config = dataclasses.replace(student.config, llm=str(out / LLM))
    merged = build_salmonn(config, ears=(student.whisper, student.second)).requires_grad_(False)
    for name in CONNECTOR:
        if getattr(student, name) is not None:
            getattr(merged, name).load_state_dict(getattr(student, name).state_dict())
    names = student.own_names | {n for n, _ in merged.named_parameters() if n.split(".", 1)[0] in CONNECTOR}
    merged.own_names = frozenset(n for n in names if not n.startswith("llm."))
    return merged.eval()


def merged_weight(module: nn.Module) -> Tensor:
    """The float32 weight of a linear layer with its LoRA."""
    weight = dequantize(module.base_layer.weight)
    for name in module.active_adapters:
        weight = weight + module.scaling[name] * (module.lora_B[name].weight @ module.lora_A[name].weight).float()
    return weight


def name_own_llm_(out: Path) -> None:
    """Let `config.json` name the LLM beside it, in place, so that the folder can be moved."""
    config = json.loads((out / CONFIG).read_text())
    config["model"]["llm"] = f"./{LLM}"
    write_atomically(out / CONFIG, lambda path: path.write_text(json.dumps(config, indent=1)))


def make_card(name: str, student: Salmonn, settings: dict, card: Scorecard | None) -> str:
    """The model card, in Markdown: what it is made of, how to load it, and its scores beside its teacher's."""
    parts = student.config
    kept = f"`{Path(parts.llm).name}`, quantisation {settings['quantization']}, with LoRA; {measure_share(student.llm)}"
    llm = kept if settings["lora"] else "its own, LoRA merged, in `llm/`"
    second = f", {parts.second_kind} `{Path(parts.second).name}`" if parts.second else ""
    lines = [
        "---",
        "library_name: distill-audio",
        "tags: [audio, speech-recognition, audio-captioning, distillation]",
        "---",
        f"# {name}",
        "",
        "An audio language model of SALMONN's architecture, distilled from a larger one.",
        "",
        f"* LLM: {llm}",
        f"* Ears: Whisper `{Path(parts.whisper).name}`{second}",
        f"* Ends its answers with: `{student.tokenizer.decode(student.rows.end_ids)}`",
        "",
        "```python",
        "from students.student import load_student",
        f'model = load_student("{name}")',
        "```",
        "",
    ]
    if card is None:
        return "\n".join([*lines, "It was not evaluated: `distill evaluate` writes its scores.", ""])
    lines += [
        "## Scores",
        "",
        f"| | {card.teacher.name} | {card.student.name} | student ÷ teacher |",
        "|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in (*score_rows(card), *cost_rows(card))]
    return "\n".join([*lines, "", count_clips(card), *explain_scores(card), ""])


def main(args: argparse.Namespace) -> int:
    """Run `distill export`."""
    out = export(args.run, args.out, merge=args.merge, salmonn=args.salmonn)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"student: {out} ({size / 1e6:,.1f} MB)", file=sys.stderr)
    return 0
