"""A finished run's student as a folder for devices: `distill export RUN OUT --device openvino`.

The folder needs no torch, no bitsandbytes and nothing of this machine; `docs/device.md` says what is in it. It is
compared with the trained student on the run's own clips before it has its name.
"""

import os
from pathlib import Path

from distill.config import load_config
from distill.evaluation.scorecard import SCORECARD, cost_rows, count_clips, explain_scores, read_scorecard, score_rows
from distill.exporting.clips import read_clips
from shards.files.write import staged, write_atomically
from shards.status import print_status
from students.device.export import DEFAULT, Precision, write_device
from students.device.folder import MANIFEST, Device
from students.student import load_student

CARD = "README.md"


def export_device(run_folder: Path, out: Path, precision: Precision = DEFAULT) -> Path:
    """Write the student of a run for devices; returns `out`.

    Args:
        run_folder: the folder of a finished run.
        out: the folder to write.
        precision: the precision of its weights and products.

    Raises:
        FileNotFoundError: the run has no student yet, or its clips are gone.
        FileExistsError: there is something at `out`.
        ValueError: the student has what a device has not, or the export is not the student.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files already, but an export starts empty; choose another folder.")
    out = Path(os.path.abspath(out))
    student = load_student(run_folder / "student")
    config = load_config(run_folder / "config.yaml")
    with staged(out, last=MANIFEST) as stage:
        device = write_device(student, stage, read_clips(config), name=run_folder.name, precision=precision,
                              max_new_tokens=config.eval.max_new_tokens, say=print_status)  # fmt: skip
        write_atomically(stage / CARD, make_card(device, run_folder))
    return out


def make_card(device: Device, run_folder: Path) -> str:
    """The folder's README: what it holds, how it is used, and how far it is from the trained student."""
    lines = [
        f"# {device.name}, for devices",
        "",
        f"An audio language model of SALMONN's architecture ({device.llm['architecture']}), as OpenVINO graphs: "
        f"{sum(device.sizes.values()):,.1f} MB. It needs numpy, OpenVINO, tokenizers, soundfile and soxr.",
        "",
        "```bash",
        f"python -m students.device {device.name} recording.wav",
        "```",
        "",
        "## Against the trained student",
        "",
        "| weights and products | logits off | top-1 | equal greedy texts |",
        "|---|---|---|---|",
    ]
    for name, found in device.measured.items():
        if isinstance(found, dict):
            lines.append(
                f"| {name} | {found['logit_error']:.1e} | {found['top1']:.1%} | "
                f"{found['texts_equal']} of {found['clips']} |"
            )
    lines += ["", f"In this folder: {Precision(**device.precision)}.", ""]
    if (run_folder / SCORECARD).exists():
        card = read_scorecard(run_folder)
        lines += ["## Scores before the export", "", f"| | {card.teacher.name} | {card.student.name} | ratio |",
                  "|---|---|---|---|"]  # fmt: skip
        lines += ["| " + " | ".join(row) + " |" for row in (*score_rows(card), *cost_rows(card))]
        lines += ["", count_clips(card), *explain_scores(card), ""]
    return "\n".join(lines)
