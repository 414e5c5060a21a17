"""`distill env`: what a bug report should say of a machine. Names no user, no path and no credential."""

import argparse
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("distill-audio", "torch", "torchaudio", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes",
            "numpy", "soundfile", "soxr", "webdataset", "pyyaml")  # fmt: skip
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
# Whose values are switches or numbers; of others a report says no more than that they are set
SHOWN = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE",
         "ACCELERATE_USE_CPU", "PYTORCH_CUDA_ALLOC_CONF")  # fmt: skip
NAMED = ("CUDA_HOME", "HF_HOME", "TORCH_EXTENSIONS_DIR", "PYTHONPATH", "LD_LIBRARY_PATH", "HF_ENDPOINT")


def describe() -> Iterator[tuple[str, str]]:
    """Name and value of each line; torch is imported only for the last of them."""
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    for name in PACKAGES:
        yield name, find_version(name)
    yield "cpu", describe_cpu()
    yield "environment", ", ".join(f"{name}={os.environ[name]}" for name in SHOWN if name in os.environ) or "none"
    yield "also set", ", ".join(name for name in NAMED if name in os.environ) or "none"
    import torch

    yield "torch threads", str(torch.get_num_threads())
    yield "cuda of torch", torch.version.cuda or torch.version.hip or "none"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"gpu {number}", f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, capability {gpu.major}.{gpu.minor}"
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use"


def find_version(name: str) -> str:
    """Of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe_cpu() -> str:
    """Model, cores this process may use, memory, and the flags that decide how a product is computed."""
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags |= set(value.split())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if hasattr(os, "sysconf") else 0
    found = " ".join(flag for flag in FLAGS if flag in flags) or "none of those that matter"
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GB; {found}"


def main(args: argparse.Namespace) -> int:
    """Run `distill env`."""
    for name, value in describe():
        print(f"{name:<14} {value}", flush=True)
    return 0
