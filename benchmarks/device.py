"""What a student costs on a processor at real sizes: a float32 teacher, today's student in torch, and its exports.

Weights are random, 10 s of audio, batch 1, two threads, every part in a process of its own. Transformers are measured
with two and with four of their layers and drawn out to all of them: time and resident memory are linear in the layers,
and so no machine needs the 16 GB of the whole teacher. `python benchmarks/device.py`
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import write_result

THREADS, PROMPT, RUNS = 2, 120, 3
LAYERS = (2, 4)  # that are measured
LLMS = {  # width, inner width, heads, groups, layers, ids: Llama-3.2-3B, Llama-3.2-1B, Qwen2.5-0.5B
    "3B": (3072, 8192, 24, 8, 28, 128_256),
    "1B": (2048, 8192, 32, 8, 16, 128_256),
    "0.5B": (896, 4864, 14, 2, 24, 151_936),
}
WHISPERS = {"large-v2": (1280, 20, 32), "small": (768, 12, 12)}  # width, heads, layers
TORCH_GB = 0.45  # of a process that has imported torch and transformers and holds no model
MODELS = {  # name: ears' engine and weights, frames, Whisper, LLM's engine and head, LLM
    "teacher": ("torch", "f32", 1500, "large-v2", "torch", "f32", "3B"),
    "student in torch": ("torch", "f32", 1500, "large-v2", "nf4", "f32", "1B"),
    "export, f16 ears, 30 s": ("openvino", "f16", 1500, "large-v2", "openvino", "f16", "1B"),
    "export, int8 ears and head, 30 s": ("openvino", "int8", 1500, "large-v2", "openvino", "int8", "1B"),
    "export, int8, real length": ("openvino", "int8", 500, "large-v2", "openvino", "int8", "1B"),
    "export, small ears, 0.5B, int8, real length": ("openvino", "int8", 500, "small", "openvino", "int8", "0.5B"),
}


def resident_gb() -> float:
    """Memory of this process at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def clock(work: Callable[[], object]) -> float:
    """Milliseconds, the least of RUNS after one to warm up: others may share the machine."""
    work()
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


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
    embeds = torch.randn(1, PROMPT, LLMS[size][0])
    with torch.no_grad():
        first = clock(lambda: llm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1))
        cache = llm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values
        following = clock(lambda: llm(inputs_embeds=embeds[:, :1], past_key_values=cache, logits_to_keep=1))
    gb = sum(p.numel() * p.element_size() for p in llm.parameters()) / 1e9  # scales of 4 bits aside, 0.4 % of it
    return {"first_ms": first, "next_ms": following, "gb": gb}


def write_openvino_llm(size: str, layers: int, head: str, folder: Path) -> dict:
    """Write a LLM's graph, and its logits beside those of torch."""
    import openvino as ov
    import torch

    from students.device.decoder import build_decoder

    llm = make_llm(size, layers, is_4bit=True)
    embeds = torch.randn(1, PROMPT, LLMS[size][0])
    with torch.no_grad():
        expected = llm(inputs_embeds=embeds, logits_to_keep=1).logits[0, -1].numpy()
    np.savez(folder / "expected.npz", embeds=embeds.numpy(), logits=expected)
    ov.save_model(build_decoder(llm, head), folder / "graph.xml", compress_to_fp16=False)
    return {}


def measure_openvino_llm(size: str, layers: int, head: str, folder: Path) -> dict:
    """Prefill, next token, memory and error of a LLM's graph."""
    from students.device.student import StatefulDecoder

    request = load_graph(folder)
    stored = np.load(folder / "expected.npz")
    embeds, mask = stored["embeds"], np.ones((1, PROMPT), np.int64)
    decoder = StatefulDecoder(request, embeds, mask, lambda ids: embeds[0, : len(ids)])
    first = clock(lambda: decoder.start(1))
    found = decoder.start(1)[0]
    following = clock(lambda: decoder.follow(np.array([1]), np.zeros(1, np.int64)))
    error = float(np.linalg.norm(found - stored["logits"]) / np.linalg.norm(stored["logits"]))
    top1 = float(found.argmax() == stored["logits"].argmax())
    return {"first_ms": first, "next_ms": following, "gb": resident_gb(), "logit_error": error, "top1": top1}


def load_graph(folder: Path):
    """A graph that answers in float32 on two threads."""
    import openvino as ov

    from students.device.student import EXACT

    properties = EXACT | {"INFERENCE_NUM_THREADS": str(THREADS)}
    return ov.Core().compile_model(folder / "graph.xml", "CPU", properties).create_infer_request()


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
        first = clock(lambda: ear.encode(mel))
    return {"first_ms": first, "gb": sum(p.numel() * 4 for p in ear.parameters()) / 1e9}


def write_openvino_ears(size: str, layers: int, kind: str, folder: Path) -> dict:
    """Write Whisper's graph."""
    import openvino as ov
    import torch

    from students.device.ears import WhisperGraph, convert, to_8_bits_

    ear = make_whisper(size, layers)
    graph = convert(WhisperGraph(ear), {"mel": torch.randn(1, 80, 3000)}, [(-1, 80, -1)], "frames")
    if kind == "int8":
        to_8_bits_(graph)
    ov.save_model(graph, folder / "graph.xml", compress_to_fp16=True)
    return {}


def measure_openvino_ears(frames: int, folder: Path) -> dict:
    """Time and memory of Whisper's graph."""
    request = load_graph(folder)
    mel = np.random.default_rng(0).normal(size=(1, 80, 2 * frames)).astype(np.float32)
    return {"first_ms": clock(lambda: request.infer({"mel": mel})), "gb": resident_gb()}


def measure_empty() -> dict:
    """Memory of a process that has OpenVINO and no graph."""
    import openvino as ov

    from students.device import student  # noqa: F401 (what a runner imports)

    ov.Core()
    return {"gb": resident_gb()}


PARTS = {
    "torch llm": measure_torch_llm, "write llm": write_openvino_llm, "openvino llm": measure_openvino_llm,
    "torch ears": measure_torch_ears, "write ears": write_openvino_ears, "openvino ears": measure_openvino_ears,
    "empty": measure_empty,
}  # fmt: skip


def apart(part: str, *words) -> dict:
    """One part's figures, from a process of its own."""
    command = [sys.executable, __file__, "--part", part, *map(str, words)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def drawn_out(measure: Callable[[int], dict], layers: int) -> dict:
    """The figures at all layers of what was measured at two numbers of them; an error is that of the larger."""
    few, more = (measure(number) for number in LAYERS)
    steps = (layers - LAYERS[1]) / (LAYERS[1] - LAYERS[0])
    kept = [key for key in ("first_ms", "next_ms", "gb") if key in more]
    return {**more, **{key: more[key] + steps * max(0.0, more[key] - few[key]) for key in kept}}


@functools.cache
def measure_llm(engine: str, head: str, size: str) -> dict:
    """A LLM's figures at all of its layers."""

    def measure(layers: int) -> dict:
        if engine != "openvino":
            return apart("torch llm", size, layers, engine)
        with tempfile.TemporaryDirectory() as folder:
            apart("write llm", size, layers, head, folder)
            return apart("openvino llm", size, layers, head, folder)

    return drawn_out(measure, LLMS[size][4])


@functools.cache
def measure_ears(engine: str, kind: str, frames: int, size: str) -> dict:
    """Whisper's figures at all of its layers."""

    def measure(layers: int) -> dict:
        if engine == "torch":
            return apart("torch ears", size, layers, frames)
        with tempfile.TemporaryDirectory() as folder:
            apart("write ears", size, layers, kind, folder)
            return apart("openvino ears", frames, folder)

    return drawn_out(measure, WHISPERS[size][2])


def measure_model(words: tuple, empty_gb: float) -> dict:
    """A whole model: its ears and its LLM; BEATs and the connector are left out everywhere."""
    engine, kind, frames, whisper, llm_engine, head, size = words
    ears, llm = measure_ears(engine, kind, frames, whisper), measure_llm(llm_engine, head, size)
    both = ears["gb"] + llm["gb"]
    figures = {
        "gb": both + TORCH_GB if engine == "torch" else both - empty_gb,
        "first_ms": ears["first_ms"] + llm["first_ms"],
        "next_ms": llm["next_ms"],
    }
    figures["rtf"] = (figures["first_ms"] + 31 * figures["next_ms"]) / 10_000  # an answer of 32 tokens
    if "logit_error" in llm:  # of random weights a text says nothing
        figures["fidelity"] = {"logit_error": llm["logit_error"], "top1": llm["top1"], "texts_equal": None}
    return figures


def make_table(models: dict[str, dict]) -> str:
    """For a reader: each model, and what share of the teacher it takes."""
    teacher = models["teacher"]
    lines = ["| | GB | first token (ms) | next token (ms) | RTF | of the teacher: GB, first, next | logits off |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in models.items():
        shares = ", ".join(f"{found[key] / teacher[key]:.2f}×" for key in ("gb", "first_ms", "next_ms"))
        error = f"{found['fidelity']['logit_error']:.1e}" if "fidelity" in found else ""
        lines.append(
            f"| {name} | {found['gb']:.2f} | {found['first_ms']:,.0f} | {found['next_ms']:,.0f} | {found['rtf']:.2f} | "
            f"{shares} | {error} |"
        )
    notes = (
        "10 s of audio, two threads, float32 products; Whisper and LLM, drawn out from two and four layers. GB: "
        "resident; for torch the weights and 0.45 of the process. BEATs and the connector are left out. The machine "
        "was shared, so times are the least of three and still too long."
    )
    return "\n".join([*lines, "", notes])


def main() -> None:
    """Measure every model, or in a process of its own one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        name, *words = arguments.part
        given = [int(w) if w.isdigit() else Path(w) if w.startswith("/") else w for w in words]
        print(json.dumps(PARTS[name](*given)))
        return
    empty_gb, models = apart("empty")["gb"], {}
    for name, words in MODELS.items():
        models[name] = measure_model(words, empty_gb)
        print(name, models[name], flush=True)
        write(models)  # what is measured stays, should the rest not come to an end


def write(models: dict[str, dict]) -> None:
    """Write down what has been measured."""
    exports = {name: found for name, found in models.items() if name != "teacher"}
    fidelity = {name: found["fidelity"] for name, found in exports.items() if "fidelity" in found}
    plain = {name: {k: v for k, v in found.items() if k != "fidelity"} for name, found in exports.items()}
    write_result("device", {"teacher": models["teacher"], "exports": plain, "fidelity": fidelity}, make_table(models))


if __name__ == "__main__":
    main()
