"""A finished student as a folder to hand on: `distill export RUN_FOLDER OUT [--merge] [--whole] [--salmonn]`.

With `--format` it is the LLM alone, LoRA merged, as another program reads it: see `distill.exporting.formats`; or, with
`onnx-ears`, ears and connector alone: see `distill.exporting.onnx`.
With `--device openvino` it is another folder, for processors without torch: see `distill.exporting.device`.

What only training needs stays behind: checkpoints, moments, projectors. With `--merge` LoRA becomes part of the LLM's
weights, which then lie in the folder, in the type of the base model's: those that the student was trained on, its 4-bit
weights read back, plus LoRA. Without, the folder holds LoRA and names its base model. With `--whole` ears, LLM and
prompts lie in the folder, which can then be used on any machine; without, it names them by their full paths or hub ids.
"""

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from distill.config import load_config
from distill.evaluation.scorecard import (
    SCORECARD,
    Scorecard,
    cost_rows,
    count_clips,
    explain_scores,
    read_scorecard,
    score_rows,
)
from distill.exporting.clips import read_clips
from distill.student import NUM_CLIPS
from shards.files.write import staged, write_atomically
from shards.status import print_status
from shards.streaming.catalog import is_packed
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from students.ears import EARS, describe_ears_error, narrow_ears_
from students.quantize import dequantize, dequantize_, measure_share
from students.student import CONNECTOR, load_student
from teachers.ears.shape import FORM
from teachers.experts import whole_linear
from teachers.files.checkpoint import save_checkpoint
from teachers.files.loading import CONFIG, PARTS, build_salmonn, find_place, read_config, save_salmonn
from teachers.salmonn import Salmonn, SalmonnConfig

ONNX_EARS = "onnx-ears"  # a format, of the ears and the connector
LLM, CARD, SALMONN = "llm", "README.md", "salmonn.pth"
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")  # of a model's folder, beside its weights


def export(run_folder: Path, out: Path, *, merge: bool = False, whole: bool = False, salmonn: bool = False,
           ears: str = "none") -> Path:  # fmt: skip
    """Write the student of a run to `out`, which `load_student` reads; returns `out`.

    Args:
        run_folder: the folder of a finished run; its `student` folder is exported.
        merge: write the LLM with LoRA inside, and no LoRA.
        whole: copy ears, LLM and prompts into the folder.
        salmonn: write `salmonn.pth` beside, with SALMONN's own names.
        ears: bits that the ears' linear layers are put in, "bf16" or "int8"; "none": they stay as they are.

    Raises:
        FileNotFoundError: the run has no student yet.
        FileExistsError: there is something at `out`.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files already, but an export starts empty; choose another folder.")
    try:
        return write_export(run_folder, out, merge=merge, whole=whole, salmonn=salmonn, ears=ears)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # so that the same command can be given again
        raise


def write_export(run_folder: Path, out: Path, *, merge: bool, whole: bool, salmonn: bool, ears: str) -> Path:
    """Write into an empty folder; arguments as `export`."""
    out = Path(os.path.abspath(out))  # so that names inside it differ from those below "."
    settings = read_config(run_folder / "student")["settings"]
    student = load_student(run_folder / "student")
    if ears != "none":
        print_status(describe_narrow_ears(narrow_ears_(student, ears), student, run_folder))
    if salmonn:
        check_salmonn(student)
    names = student.config  # of the parts, for the card
    if merge:
        student, settings = merge_lora(student, out), {"lora": None, "quantization": "none"}
    student.config = place_parts(student.config, out, whole=whole)
    save_salmonn(student, out, settings=settings)
    name_parts_inside_(out)
    if salmonn:
        save_checkpoint(student, out / SALMONN)
    card = read_scorecard(run_folder) if (run_folder / SCORECARD).exists() else None
    text = make_card(run_folder.name, names, student, settings, card)
    write_atomically(out / CARD, text)
    return out


def describe_form(config: SalmonnConfig) -> str:
    """What of its ears is not as in their checkpoint, for the card."""
    layers = f", {config.whisper_layers} of Whisper's layers" if config.whisper_layers else ""
    bits = f", in {config.ears_quantization}" if config.ears_quantization != "none" else ""
    lora = f", with LoRA of rank {config.ears_lora_rank}" if config.ears_lora_rank else ""
    length = f", hears {config.ears_seconds}" if config.ears_seconds != SalmonnConfig("", "").ears_seconds else ""
    return layers + bits + lora + length


def check_salmonn(student: Salmonn) -> None:
    """Refuse a student that SALMONN's own code would hear otherwise than it was trained.

    Raises:
        ValueError: naming the setting.
    """
    default = SalmonnConfig("", "")
    for name in ("prefix_tokens", "ears_seconds", *FORM):
        own, theirs = getattr(student.config, name), getattr(default, name)
        if own != theirs:
            raise ValueError(
                f"{name} of the student is {own!r}, but SALMONN's code, which reads {SALMONN}, hears as with "
                f"{theirs!r}; export without --salmonn, or train with student.{name}={theirs}."
            )
    trained = sorted({name.split(".", 1)[0] for name in student.own_names or ()} & set(EARS))
    if trained:
        raise ValueError(
            f"{' and '.join(trained)} of the student was trained, but {SALMONN} holds no ears and SALMONN's code reads "
            f"them from files of their own; export without --salmonn."
        )


def describe_narrow_ears(before: Salmonn, student: Salmonn, run_folder: Path) -> str:
    """One line on what the ears' fewer bits cost on the run's own clips, where those are still there."""
    path = run_folder / "config.yaml"
    folders = [load_config(path).shards(split) for split in ("test", "valid", "train")] if path.is_file() else []
    folder = next((folder for folder in folders if is_packed(folder)), None)
    if folder is None:
        return f"ears in {student.config.ears_quantization}: their error is not measured, as the run's clips are gone"
    stream = ShardStream(folder, Order(batch_size=NUM_CLIPS, shuffle=False, epochs=1))
    return describe_ears_error(before, student, next(iter(stream)))


def place_parts(config: SalmonnConfig, out: Path, *, whole: bool) -> SalmonnConfig:
    """The config with each part's full path or hub id; of an export that is whole, with that of its copy in `out`."""
    places = {}
    for part in PARTS:
        name = getattr(config, part)
        if not name or Path(name).is_relative_to(out):  # a merged LLM lies there already
            places[part] = name
        elif whole:
            places[part] = str(copy_part(find_place(name), out / part))
        else:
            places[part] = os.path.abspath(name) if Path(name).exists() else name
    return dataclasses.replace(config, **places)


def copy_part(place: Path, folder: Path) -> Path:
    """Copy a file, or the weights of a model's folder and what belongs to them, into a new folder; returns the copy."""
    with staged(folder, last="config.json") as stage:
        if place.is_file():
            shutil.copyfile(place, stage / place.name)
            return folder / place.name
        weights = "*.safetensors" if any(place.glob("*.safetensors")) else "*.bin"
        for file in {file for pattern in (weights, *BESIDE) for file in place.glob(pattern) if file.is_file()}:
            shutil.copyfile(file, stage / file.name)
    return folder


@torch.no_grad()
def merge_lora(student: Salmonn, out: Path) -> Salmonn:
    """The student on a LLM whose weights hold its LoRA, written to `out/llm`; the student's own LLM is used up.

    Raises:
        ValueError: it has a prefix.
    """
    if student.config.prefix_tokens:
        raise ValueError(
            f"prefix_tokens of the student is {student.config.prefix_tokens}, but what is merged is a LLM of "
            f"transformers, whose weights hold none; export without --merge and --format, or train with "
            f"student.prefix_tokens=0."
        )
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


def name_parts_inside_(out: Path) -> None:
    """Let `config.json` name the parts beside it by relative names, in place, so that the folder can be moved."""
    config = json.loads((out / CONFIG).read_text())
    for part in PARTS:
        path = Path(config["model"][part])
        if config["model"][part] and path.is_relative_to(out):
            config["model"][part] = f"./{path.relative_to(out)}"
    write_atomically(out / CONFIG, json.dumps(config, indent=1))


def make_card(name: str, parts: SalmonnConfig, student: Salmonn, settings: dict, card: Scorecard | None) -> str:
    """The model card, in Markdown: what it is made of, how to load it, and its scores beside its teacher's."""
    prefix = f" and a prefix of {parts.prefix_tokens} tokens" if parts.prefix_tokens else ""
    trained = f"with LoRA{prefix}; {measure_share(student.llm)}"
    kept = f"`{Path(parts.llm).name}`, quantization {settings['quantization']}, {trained}"
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
        f"* Ears: Whisper `{Path(parts.whisper).name}`{second}{describe_form(student.config)}",
        f"* Ends its answers with: `{student.tokenizer.decode(student.rows.end_ids)}`",
        "",
        "```python",
        "from students import Student",
        "",
        'student = Student.from_pretrained("path/to/this/folder")  # or the id of its repository on the hub',
        'print(student.transcribe("recording.wav").text)',
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


def export_format(run_folder: Path, out: Path, name: str) -> Path:
    """Write the LLM of a run's student as another program reads it, and print its error; returns `out`.

    Args:
        run_folder: the folder of a finished run.
        out: the folder to write.
        name: one of `distill.exporting.formats.FORMATS`, or ONNX_EARS: not its LLM but what stands before it.

    Raises:
        FileExistsError: there is something at `out`.
        RuntimeError: a package is not installed.
        ValueError: the format has no form for this LLM.
    """
    from distill.exporting.formats import HOW, write_format

    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files already, but an export starts empty; choose another folder.")
    samples = [sample for sample in read_clips(load_config(run_folder / "config.yaml")) if sample.text is not None]
    with naming_extra(f"--format {name}", "formats"), staged(out, last=HOW) as stage:
        if name == ONNX_EARS:
            from distill.exporting.onnx import write_ears

            write_ears(load_student(run_folder / "student"), stage, samples)
            return out
        with tempfile.TemporaryDirectory(dir=stage.parent) as folder:
            merge_lora(load_student(run_folder / "student"), Path(folder))
            write_format(name, load_student(run_folder / "student"), Path(folder) / LLM, stage, samples)
    return out


@contextmanager
def naming_extra(option: str, extra: str) -> Iterator[None]:
    """Say which extra has the packages of an option.

    Raises:
        RuntimeError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{error.name} is not installed, but {option} needs it; pip install 'distill-audio[{extra}]'."
        ) from error


def export_for_device(args: argparse.Namespace) -> Path:
    """Run `distill export --device`.

    Raises:
        RuntimeError: OpenVINO is not installed.
        ValueError: an option is given that a device's folder has not.
    """
    if args.merge or args.whole or args.salmonn or args.ears_bits != "none":
        raise ValueError(
            "--device is given with --merge, --whole, --salmonn or --ears-bits, but a device's folder is whole, with "
            "LoRA apart and ears as --ears says; leave them out."
        )
    with naming_extra("--device openvino", "device"):
        from distill.exporting.device import Precision, export_device
    return export_device(args.run, args.out, Precision(args.head, args.ears, args.products))


def main(args: argparse.Namespace) -> int:
    """Run `distill export`."""
    if args.device:
        out = export_for_device(args)
    elif args.format:
        out = export_format(args.run, args.out, args.format)
    else:
        out = export(args.run, args.out, merge=args.merge, whole=args.whole, salmonn=args.salmonn, ears=args.ears_bits)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print_status(f"student: {out} ({size / 1e6:,.1f} MB)")
    return 0
