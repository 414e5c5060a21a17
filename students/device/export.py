"""Writes a trained student as a folder for devices, and proves that it is that student before it has its name.

Torch and bitsandbytes are needed here and not where the folder is used.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openvino as ov
from transformers.audio_utils import mel_filter_bank

from shards.files.hash import hash_file
from shards.sample import SAMPLE_RATE, Sample
from students.device.decoder import MAX_POSITIONS, build_decoder
from students.device.ears import convert_ears, to_8_bits_
from students.device.folder import BANKS, EMBEDDINGS, GRAPHS, MANIFEST, TOKENIZER, Device
from students.device.verify import MAX_ERROR, Fidelity, ask_student, compare
from teachers.ears.frontend import FRAME_SAMPLES, KaldiFbank, kaldi_filters
from teachers.ears.length import parse_ears_seconds
from teachers.salmonn import LEAST_SAMPLES, Salmonn
from teachers.words.generation import own_end_ids

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Precision:
    """In what a folder's weights lie and its products are made."""

    head: str = "f16"  # of the LLM, "f32", "f16" or "int8"; embeddings are in f16 but with "f32", LoRA in f32
    ears: str = "f16"  # weights of the encoders: "f32", "f16" or "int8"
    products: str = "exact"  # see `student.PRODUCTS`

    def __str__(self) -> str:
        return f"head {self.head}, ears {self.ears}, products {self.products}"


WHOLE = Precision("f32", "f32")  # nothing is rounded: it must be the student
DEFAULT = Precision()
OFFERED = (WHOLE, DEFAULT, Precision(products="fast"), Precision(head="int8"), Precision(ears="int8"),
           Precision("int8", "int8", "fast"))  # fmt: skip


def write_device(student: Salmonn, out: Path, samples: Sequence[Sample], *, name: str, precision: Precision = DEFAULT,
                 max_new_tokens: int = 100, say: Callable[[str], None] = print) -> Device:  # fmt: skip
    """Write a student into a new folder and verify it.

    Args:
        student: in evaluation mode, in float32.
        out: is made.
        samples: clips that both answer.
        name: the name of the run.
        precision: the precision of what is written; the error of each that is offered is printed.
        max_new_tokens: the most tokens of the answers.
        say: is told each precision's error.

    Raises:
        ValueError: the student has a part that a device's graph has not, or the export is not the student.
    """
    check_student(student)
    out.mkdir(parents=True, exist_ok=True)
    write_graphs(student, out)
    device = describe(student, name, precision)
    device.write(out)
    expected = ask_student(student, samples, max_new_tokens)
    measured = {}
    for one in dict.fromkeys((*OFFERED, precision)):
        choose(out, one)
        measured[str(one)] = found = compare(out, expected, one.products, max_new_tokens)
        say(f"{one}: {found}")
        if one == WHOLE:
            check_fidelity(found)
    choose(out, precision)
    shutil.rmtree(out / VARIANTS)
    files = sorted(file for file in out.iterdir() if file.name != MANIFEST)
    device = replace(
        device,
        sizes={file.name: round(file.stat().st_size / 1e6, 3) for file in files},
        measured={"max_error": MAX_ERROR, **{key: found.to_json() for key, found in measured.items()}},
        files={file.name: hash_file(file) for file in files},
    )
    device.write(out)
    return device


VARIANTS = "variants"  # folder, while an export is written, of each graph in each precision


def check_student(student: Salmonn) -> None:
    """Refuse what the runner does not have.

    Raises:
        ValueError: one spectrum for both ears, or a tokenizer without a fast backend.
    """
    if student.config.front_end != "exact":
        raise ValueError(
            f"front_end of this student is {student.config.front_end!r}, but a device computes each ear's features "
            f"exactly; train it with front_end 'exact'."
        )
    if getattr(student.tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"tokenizer of this student is a {type(student.tokenizer).__name__}, but a device needs a tokenizer.json; "
            f"save it as a fast one beside its LLM."
        )


def check_fidelity(found: Fidelity) -> None:
    """Refuse an export that is not the student.

    Raises:
        ValueError: its logits are too far off.
    """
    if not found.logit_error <= MAX_ERROR:
        raise ValueError(
            f"logits of this export are {found.logit_error:.2e} off the trained student's, but {MAX_ERROR:g} is the "
            f"most in float32; nothing was kept: report it with the output of `distill env`."
        )


def write_graphs(student: Salmonn, out: Path) -> None:
    """Every graph in every precision, embeddings, filter banks and tokenizer."""
    variants = out / VARIANTS
    variants.mkdir()
    for part, graph in convert_ears(student).items():
        if part == "connector":  # small, and trained: it stays whole
            ov.save_model(graph, out / GRAPHS[part], compress_to_fp16=False)
            continue
        for kind in ("f32", "f16"):
            ov.save_model(graph, variants / f"{kind}-{GRAPHS[part]}", compress_to_fp16=kind == "f16")
        to_8_bits_(graph)
        ov.save_model(graph, variants / f"int8-{GRAPHS[part]}", compress_to_fp16=False)
    for head in ("f32", "f16", "int8"):
        graph = build_decoder(student.llm, head)
        ov.save_model(graph, variants / f"{head}-{GRAPHS['llm']}", compress_to_fp16=False)
    embeddings = student.llm.get_input_embeddings().weight.detach().float().cpu().numpy()
    for kind, dtype in (("f32", np.float32), ("f16", np.float16), ("int8", np.float16)):
        np.save(variants / f"{kind}-{EMBEDDINGS}", embeddings.astype(dtype), allow_pickle=False)
    bins, mels = 201, student.whisper.log_mel.num_mels
    slaney = mel_filter_bank(bins, mels, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    np.savez(out / BANKS, whisper=slaney.astype(np.float32), kaldi=kaldi_filters(KaldiFbank.num_mels).numpy())
    (out / TOKENIZER).write_text(student.tokenizer.backend_tokenizer.to_str(), encoding="utf-8")


def choose(out: Path, precision: Precision) -> None:
    """Give the graphs of a precision their names, as links to the variants while these are there."""
    kinds = {"whisper": precision.ears, "second": precision.ears, "llm": precision.head}
    names = [(kind, Path(GRAPHS[part]).with_suffix(s).name) for part, kind in kinds.items() for s in (".xml", ".bin")]
    for kind, name in [*names, (precision.head, EMBEDDINGS)]:
        source = out / VARIANTS / f"{kind}-{name}"
        if source.exists():  # there may be no second ear
            (out / name).unlink(missing_ok=True)
            (out / name).hardlink_to(source)


def describe(student: Salmonn, name: str, precision: Precision) -> Device:
    """What `device.json` says, but for sizes, errors and hashes."""
    config, prompts, qformer = student.config, student.rows.prompts, student.qformer
    log_mel = student.whisper.log_mel
    end_ids = list(dict.fromkeys([*student.end_ids, *own_end_ids(student.llm)]))
    return Device(
        name=name,
        prompts={"by_task": {task: list(found) for task, found in prompts.by_task.items()},
                 "template": prompts.template, "evaluation": dict(prompts.evaluation)},
        words={"special": {key: getattr(student.tokenizer, key) for key in NAMED if getattr(student.tokenizer, key)},
               "end_token": config.end_token, "bos_token": config.bos_token, "end_ids": end_ids,
               "max_answer_tokens": config.max_answer_tokens, "num_tokens": student.num_tokens},
        audio={"sample_rate": SAMPLE_RATE, "min_samples": max(student.min_samples, 1), "frame_samples": FRAME_SAMPLES,
               "max_samples": student.max_samples, "least_samples": LEAST_SAMPLES,
               "padding_seconds": parse_ears_seconds(config.ears_seconds)},
        whisper={"num_mels": log_mel.num_mels, "num_mel_frames": log_mel.num_frames, "width": student.whisper.width,
                 "num_frames": student.whisper.max_samples // FRAME_SAMPLES},
        second=describe_second(student),
        windows={"window_frames": qformer.window_frames, "stride_frames": qformer.stride_frames,
                 "num_queries": config.num_queries, "which": config.windows},
        llm={"width": student.project.out_features, "architecture": type(student.llm).__name__,
             "max_positions": min(MAX_POSITIONS, student.llm.config.max_position_embeddings)},
        precision={"head": precision.head, "ears": precision.ears, "products": precision.products},
        sizes={}, measured={}, files={},
    )  # fmt: skip


def describe_second(student: Salmonn) -> dict | None:
    """The second encoder's front end and the count of its frames."""
    if student.second is None:
        return None
    ear = student.second
    fields = {key: getattr(ear.fbank, key) for key in ("window", "scale", "mean", "std", "removes_mean")}
    return {"kind": student.config.second_kind, "width": ear.width, "patch": 16, "bands": 8,
            "rounds_up": ear.hears_started_patch, "fbank": fields}  # fmt: skip
