"""How far a device's graphs are from real weights: SmolLM2 in 4 bits with LoRA, and Whisper base, in each precision.

A LLM's answers go on from the beginnings of plain sentences, its logits are compared along them; frames are those of
clips of read English.
"""

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from parts import QUESTION, TEXT
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from shards.audio.decode import load_audio
from shards.manifests.manifest import read_manifest
from students.device.decoder import build_decoder
from students.device.ears import convert, to_8_bits_
from students.device.graph import Graph
from students.device.modules import WhisperGraph
from students.device.student import EXACT, StatefulDecoder
from students.quantize import quantize_4bit_
from teachers.ears.whisper import WhisperEar
from teachers.lora import Lora, add_lora_

PROMPTS = (QUESTION, *TEXT.replace(". ", ".\n").splitlines())
TOKENS, CLIPS = 20, 4
KINDS = ("f32", "f16", "int8")


def measure(parts: Path, manifest: Path) -> dict[str, dict]:
    """Errors of LLM and ears, by precision."""
    return {"llm": measure_llm(parts / "smollm2-135m"), "ears": measure_ears(parts / "whisper-base", manifest)}


@torch.no_grad()
def measure_llm(folder: Path) -> dict[str, dict]:
    """Of each type of head: error of the logits, the same likeliest id and the same greedy ids, against torch."""
    llm, tokenizer = make_llm(folder), AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    answers = [llm.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
               for ids in prompts]  # fmt: skip
    logits = [llm(torch.tensor([ids + said[:-1]])).logits[0, len(ids) - 1 :].numpy()
              for ids, said in zip(prompts, answers)]  # fmt: skip
    return {head: compare_llm(llm, head, prompts, answers, logits) for head in KINDS}


def make_llm(folder: Path) -> nn.Module:
    """SmolLM2 in NF4, with a LoRA that does something."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantize_4bit_(llm)
    add_lora_(llm, Lora())
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.003)
    return llm.eval()


def compare_llm(llm: nn.Module, head: str, prompts: Sequence[list[int]], answers: Sequence[list[int]],
                logits: Sequence[np.ndarray]) -> dict:  # fmt: skip
    """A graph's logits along torch's answers, and its own greedy ids."""
    graph = save_and_open(build_decoder(llm, head), compress=False)
    table = llm.get_input_embeddings().weight.detach().numpy()
    wrong = total = right = places = equal = 0
    for ids, said, want_SV in zip(prompts, answers, logits):
        decoder = StatefulDecoder(graph, table[ids][None], np.ones((1, len(ids)), np.int64), lambda i: table[i])
        found = [decoder.start(1)] + [decoder.follow(np.array([i]), np.zeros(1, np.int64)) for i in said[:-1]]
        got_SV = np.concatenate(found)
        wrong += np.square(got_SV - want_SV, dtype=np.float64).sum()
        total += np.square(want_SV, dtype=np.float64).sum()
        right += (got_SV.argmax(1) == want_SV.argmax(1)).sum()
        places += len(said)
        equal += (got_SV.argmax(1) == said).all()  # then its own greedy ids are these
    return {"logit_error": float((wrong / total) ** 0.5), "top1": float(right / places), "texts_equal": int(equal),
            "texts": len(prompts)}  # fmt: skip


@torch.no_grad()
def measure_ears(folder: Path, manifest: Path) -> dict[str, dict]:
    """Of each type of weights: error of the frames, against torch."""
    ear = WhisperEar.from_pretrained(folder).eval()
    waveforms = [load_audio([entry.path]) for entry in islice(read_manifest(manifest), CLIPS)]
    mels = [ear.log_mel(torch.from_numpy(x)[None], torch.tensor([len(x)])) for x in waveforms]
    expected = torch.cat([ear.encode(mel) for mel in mels]).numpy()
    errors = {}
    for kind in KINDS:
        model = convert(WhisperGraph(ear), {"mel": mels[0]}, [(-1, mels[0].shape[1], -1)], "frames")
        if kind == "int8":
            to_8_bits_(model)
        graph = save_and_open(model, compress=kind == "f16")
        found = np.concatenate([graph.run({"mel": mel.numpy()}) for mel in mels])
        errors[kind] = {"frame_error": float(np.linalg.norm(found - expected) / np.linalg.norm(expected))}
    return errors


def save_and_open(model: ov.Model, *, compress: bool) -> Graph:
    """A graph as a folder holds it; its file may go while it is mapped."""
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(model, Path(folder) / "it.xml", compress_to_fp16=compress)
        return Graph(ov.Core(), Path(folder) / "it.xml", EXACT)


def make_table(figures: dict[str, dict]) -> str:
    """Markdown: a row a precision."""
    lines = ["| | logits off | likeliest id | greedy answers | ears' frames off |", "|---|---|---|---|---|"]
    for kind, found in figures["llm"].items():
        ears = figures["ears"][kind]["frame_error"]
        lines.append(
            f"| {kind} | {found['logit_error']:.1e} | {found['top1']:.1%} | {found['texts_equal']} of {found['texts']} "
            f"| {ears:.1e} |"
        )
    notes = (
        f"SmolLM2-135M-Instruct in NF4 with a random LoRA, {TOKENS} tokens an answer, by type of its head; Whisper "
        f"base on {CLIPS} clips of read English, by type of its weights; float32 products."
    )
    return "\n".join([*lines, "", notes])
