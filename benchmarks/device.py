"""What a student costs on a processor at real sizes: a float32 teacher, today's student in torch, and its exports.

Weights are random, 10 s of audio, batch 1, two threads. An export is measured whole, in a process of its own that opens
its graphs as the runner does. What is in torch is measured with two and with four of its layers and drawn out to all of
them: time and memory are linear in the layers, and so no machine needs the 16 GB of the whole teacher (writing an
export takes 8). `python benchmarks/device.py [--only WORDS]`
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import RESULTS, write_result

THREADS, RUNS = 2, 3
LAYERS = (2, 4)  # that are measured of what is in torch
PROMPTS = {
    1500: 120,
    500: 62,
}  # positions by the frames heard: 32 of text, and those of 88 windows, or of 30 with audio
LLMS = {  # width, inner width, heads, groups, layers, ids: Llama-3.2-3B, Llama-3.2-1B, Qwen2.5-0.5B
    "3B": (3072, 8192, 24, 8, 28, 128_256),
    "1B": (2048, 8192, 32, 8, 16, 128_256),
    "0.5B": (896, 4864, 14, 2, 24, 151_936),
}
WHISPERS = {"large-v2": (1280, 20, 32), "small": (768, 12, 12)}  # width, heads, layers
TORCH_GB = 0.45  # of a process that has imported torch and transformers and holds no model
MODELS = {  # name: engine and products, ears' weights, frames, Whisper, LLM's weights or head, LLM
    "teacher": ("torch", "f32", 1500, "large-v2", "f32", "3B"),
    "export, int8, real length": ("exact", "int8", 500, "large-v2", "int8", "1B"),
    "export, int8, real length, fast": ("fast", "int8", 500, "large-v2", "int8", "1B"),
    "export, int8 ears and head, 30 s": ("exact", "int8", 1500, "large-v2", "int8", "1B"),
    "export, int8 ears and head, 30 s, fast": ("fast", "int8", 1500, "large-v2", "int8", "1B"),
    "export, small ears, 0.5B, int8, real length": ("exact", "int8", 500, "small", "int8", "0.5B"),
    "export, small ears, 0.5B, int8, real length, fast": ("fast", "int8", 500, "small", "int8", "0.5B"),
    "export, f16 ears, 30 s": ("exact", "f16", 1500, "large-v2", "f16", "1B"),
    "export, f16 ears, 30 s, fast": ("fast", "f16", 1500, "large-v2", "f16", "1B"),
    "export, f16 ears, int8 head, 30 s, fast": ("fast", "f16", 1500, "large-v2", "int8", "1B"),
    "student in torch": ("torch", "f32", 1500, "large-v2", "nf4", "1B"),
}


def resident_gb() -> float:
    """Memory of this process at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def clock(work: Callable[[], object], name: str) -> dict:
    """Milliseconds on the wall, and of the processor by the threads, the least of RUNS after one to warm up."""
    work()
    walls, processors = [], []
    for _ in range(RUNS):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        walls.append(1000 * (time.perf_counter() - wall))
        processors.append(1000 * (time.process_time() - processor) / THREADS)
    return {f"{name}_ms": min(walls), f"{name}_cpu_ms": min(processors)}


def make_llm(size: str, layers: int, *, is_4bit: bool):
    """A Llama or Qwen2 of this size with a few layers, and where it is in 4 bits with LoRA."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from students.quantize import quantize_4bit_
    from teachers.lora import Lora, add_lora_

    torch.manual_seed(0)
    width, inner, heads, groups, _, ids = LLMS[size]
    fields = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "vocab_size": ids,
              "num_key_value_heads": groups, "num_hidden_layers": layers, "tie_word_embeddings": True}  # fmt: skip
    llm = Qwen2ForCausalLM(Qwen2Config(**fields)) if size == "0.5B" else LlamaForCausalLM(LlamaConfig(**fields))
    if is_4bit:
        quantize_4bit_(llm)
        add_lora_(llm, Lora())
    return llm.eval().requires_grad_(False)


def measure_torch_llm(size: str, layers: int, kind: str) -> dict:
    """Prefill, next token and memory of a LLM in torch."""
    import torch

    torch.set_num_threads(THREADS)
    llm = make_llm(size, layers, is_4bit=kind == "nf4")
    embeds = torch.randn(1, PROMPTS[1500], LLMS[size][0])
    with torch.no_grad():
        first = clock(lambda: llm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1), "first")
        cache = llm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values
        following = clock(lambda: llm(inputs_embeds=embeds[:, :1], past_key_values=cache, logits_to_keep=1), "next")
    gb = sum(p.numel() * p.element_size() for p in llm.parameters()) / 1e9  # scales of 4 bits aside, 0.4 % of it
    return {**first, **following, "gb": gb}


def write_openvino_llm(size: str, head: str, folder: Path) -> dict:
    """Write a LLM's graph, and torch's logits behind each number of positions."""
    import openvino as ov
    import torch

    from students.device.decoder import build_decoder

    llm = make_llm(size, LLMS[size][4], is_4bit=True)
    embeds = torch.randn(1, max(PROMPTS.values()), LLMS[size][0])
    with torch.no_grad():
        logits = llm(inputs_embeds=embeds, logits_to_keep=torch.tensor(list(PROMPTS.values())) - 1).logits[0].numpy()
    found = {str(length): row for length, row in zip(PROMPTS.values(), logits)}
    np.savez(folder / "expected.npz", embeds=embeds.numpy(), **found)
    ov.save_model(build_decoder(llm, head), folder / "llm.xml", compress_to_fp16=False)
    return {}


def make_whisper(size: str, layers: int):
    """A Whisper encoder with a few layers."""
    import torch

    from teachers.ears.whisper import WhisperEar

    torch.manual_seed(0)
    width, heads, _ = WHISPERS[size]
    return WhisperEar.from_config({"d_model": width, "encoder_attention_heads": heads, "encoder_layers": layers,
                                   "encoder_ffn_dim": 4 * width, "num_mel_bins": 80}).requires_grad_(False)  # fmt: skip


def measure_torch_ears(size: str, layers: int, frames: int) -> dict:
    """Time and memory of Whisper in torch."""
    import torch

    torch.set_num_threads(THREADS)
    ear = make_whisper(size, layers)
    mel = torch.randn(1, 80, 2 * frames)
    with torch.no_grad():
        first = clock(lambda: ear.encode(mel), "ears")
    return {**first, "gb": sum(p.numel() * 4 for p in ear.parameters()) / 1e9}


def write_openvino_ears(size: str, kind: str, folder: Path) -> dict:
    """Write Whisper's graph."""
    import openvino as ov
    import torch

    from students.device.ears import convert, to_8_bits_
    from students.device.modules import WhisperGraph

    graph = convert(WhisperGraph(make_whisper(size, WHISPERS[size][2])), {"mel": torch.randn(1, 80, 300)},
                    [(-1, 80, -1)], "frames")  # fmt: skip
    if kind == "int8":
        to_8_bits_(graph)
    ov.save_model(graph, folder / "whisper.xml", compress_to_fp16=kind == "f16")
    return {}


def measure_openvino(products: str, frames: int, folder: Path) -> dict:
    """Times, the process's peak of memory and the logits' error of an export that hears and answers."""
    import openvino as ov

    from students.device.graph import Graph
    from students.device.student import StatefulDecoder, find_properties

    core, properties = ov.Core(), find_properties(products) | {"INFERENCE_NUM_THREADS": str(THREADS)}
    ears, llm = (Graph(core, folder / name, properties) for name in ("whisper.xml", "llm.xml"))
    stored, length = np.load(folder / "expected.npz"), PROMPTS[frames]
    embeds, expected = stored["embeds"][:, :length], stored[str(length)]
    mel = np.random.default_rng(0).normal(size=(1, 80, 2 * frames)).astype(np.float32)
    heard = clock(lambda: ears.run({"mel": mel}), "ears")
    ears.release()  # as the runner does
    decoder = StatefulDecoder(llm, embeds, np.ones((1, length), np.int64), lambda ids: embeds[0, : len(ids)])
    first = clock(lambda: decoder.start(1), "first")
    found = decoder.start(1)[0]
    following = clock(lambda: decoder.follow(np.array([1]), np.zeros(1, np.int64)), "next")
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    top1 = float(found.argmax() == expected.argmax())
    return {"gb": resident_gb(), **heard, **first, **following,
            "fidelity": {"logit_error": error, "top1": top1, "texts_equal": None}}  # fmt: skip


PARTS = {
    "torch llm": measure_torch_llm, "torch ears": measure_torch_ears,
    "write llm": write_openvino_llm, "write ears": write_openvino_ears, "export": measure_openvino,
}  # fmt: skip


def apart(part: str, *words) -> dict:
    """One part's figures, from a process of its own."""
    command = [sys.executable, __file__, "--part", part, *map(str, words)]
    waiting = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # a thread that waits takes no processor time
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=waiting)
    return json.loads(done.stdout.splitlines()[-1])


def drawn_out(measure: Callable[[int], dict], layers: int) -> dict:
    """The figures at all layers of what was measured at two numbers of them."""
    few, more = (measure(number) for number in LAYERS)
    steps = (layers - LAYERS[1]) / (LAYERS[1] - LAYERS[0])
    return {key: more[key] + steps * max(0.0, more[key] - few[key]) for key in more}


def measure_model(words: tuple, exports: Path) -> dict:
    """A whole model; BEATs and the connector are left out everywhere. `exports` keeps the graphs for others."""
    engine, kind, frames, whisper, head, size = words
    if engine != "torch":
        folder = exports / f"{whisper} {kind} {size} {head}"
        if not folder.exists():
            folder.mkdir()
            apart("write ears", whisper, kind, folder)
            apart("write llm", size, head, folder)
        figures = apart("export", engine, frames, folder)
    else:
        ears = drawn_out(lambda layers: apart("torch ears", whisper, layers, frames), WHISPERS[whisper][2])
        llm = drawn_out(lambda layers: apart("torch llm", size, layers, head), LLMS[size][4])
        figures = {**ears, **llm, "gb": ears["gb"] + llm["gb"] + TORCH_GB}
    for key in ("ms", "cpu_ms"):
        figures[f"first_{key}"] += figures[f"ears_{key}"]
    figures["rtf"] = (figures["first_ms"] + 31 * figures["next_ms"]) / 10_000  # an answer of 32 tokens
    return figures


def make_table(models: dict[str, dict]) -> str:
    """For a reader: each model, and what share of the teacher it takes."""
    teacher = models["teacher"]
    lines = ["| | GB | first token (ms) | of it ears | next token (ms) | RTF | of the teacher | error |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in models.items():
        shares = ", ".join(f"{found[key] / teacher[key]:.2f}×" for key in ("gb", "first_ms", "next_ms"))
        error = f"{found['fidelity']['logit_error']:.1e}" if "fidelity" in found else ""
        times = " | ".join(f"{found[f'{key}_ms']:,.0f}" for key in ("first", "ears", "next"))
        lines.append(f"| {name} | {found['gb']:.2f} | {times} | {found['rtf']:.2f} | {shares} | {error} |")
    notes = (
        "10 s of audio, two threads, float32 products, but where it says fast: as OpenVINO chooses for the processor. "
        "Whisper and LLM, at 30 s with 88 audio tokens in the prompt, at the real length with 30. GB: of an export the "
        "process's peak of resident memory, pages of files included; for torch the weights and 0.45 of the process, "
        "without what it computes. What is in torch is drawn out from two and four layers. BEATs and the connector are "
        f"left out. Times are on the wall, the least of {RUNS}; the processor's are in the JSON."
    )
    return "\n".join([*lines, "", notes])


def main() -> None:
    """Measure every model, or in a process of its own one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="models whose name holds this; the others' figures stay")
    arguments = parser.parse_args()
    if arguments.part:
        name, *words = arguments.part
        given = [int(w) if w.isdigit() else Path(w) if w.startswith("/") else w for w in words]
        print(json.dumps(PARTS[name](*given)))
        return
    models = read() if arguments.only else {}
    with tempfile.TemporaryDirectory() as exports:
        for name, words in MODELS.items():
            if arguments.only in name:
                models[name] = measure_model(words, Path(exports))
                print(name, models[name], flush=True)
                write({name: models[name] for name in MODELS if name in models})  # stays, should the rest fail


def read() -> dict[str, dict]:
    """What has been measured before."""
    stored = json.loads((RESULTS / "device.json").read_text())
    models = {"teacher": stored["teacher"], **stored["exports"]}
    return {name: found | ({"fidelity": stored["fidelity"][name]} if name in stored["fidelity"] else {})
            for name, found in models.items()}  # fmt: skip


def write(models: dict[str, dict]) -> None:
    """Write down what has been measured."""
    exports = {name: found for name, found in models.items() if name != "teacher"}
    fidelity = {name: found["fidelity"] for name, found in exports.items() if "fidelity" in found}
    plain = {name: {k: v for k, v in found.items() if k != "fidelity"} for name, found in exports.items()}
    write_result("device", {"teacher": models["teacher"], "exports": plain, "fidelity": fidelity}, make_table(models))


if __name__ == "__main__":
    main()
