"""Where a benchmark's figures go: `results/NAME.json` with what made them, and the same as a Markdown table."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchaudio", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "numpy")


def describe_machine() -> str:
    """Processor, cores and accelerator in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{model}, {os.cpu_count()} cores, {gpu}"


def write_result(name: str, figures: dict, table: str, command: str | None = None) -> Path:
    """Write `results/NAME.json` and `results/NAME.md`, print the table, and return the JSON's path.

    Args:
        name: the benchmark's name, that of its script.
        figures: what was measured; anything JSON can hold.
        table: the same for a reader, in Markdown.
        command: what prints it again; by default this process's own command line.
    """
    command = command or "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    record = {
        **figures,
        "command": command,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "machine": describe_machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(f"{table.strip()}\n\nMade by `{command}` on {record['machine']}.\n")
    print(table)
    return path
