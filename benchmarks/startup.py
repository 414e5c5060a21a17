"""How long each command takes until its first useful line, over the time of `import torch` in the same run.

`python benchmarks/startup.py [--runs 5]`. Each command is a process of its own that is ended with its first line on
stdout or stderr. Its processor time counts, and the least of the runs: what else the machine does is hardly in it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from record import write_result

TARGET = 0.1  # of `import torch`
# as a user's, whose compiled modules are kept: one turn more writes them
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
DISTILL = ("-m", "distill")


def time_first_line(words: list[str], folder: Path) -> float:
    """Processor seconds, of its own and of the system for it, until a process has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    line = process.stdout.readline()
    process.kill()
    _, process.returncode, used = os.wait4(process.pid, 0)
    if not line.strip():
        sys.exit(f"{' '.join(words)} printed nothing, but its first line is what is timed")
    return used.ru_utime + used.ru_stime


def make_data(folder: Path) -> None:
    """Eight clips of tones, and the manifest `m.json` of them."""
    rows = []
    for number in range(8):
        tone_N = 0.3 * np.sin(np.arange(16_000) * (0.06 + 0.01 * number))
        soundfile.write(folder / f"{number}.wav", tone_N, 16_000, subtype="PCM_16")
        rows.append({"path": f"{number}.wav", "text": "one", "task": "asr"})
    (folder / "m.json").write_text(json.dumps({"annotation": rows}))


def commands() -> dict[str, list[str]]:
    """By name; the helps of every command are added."""
    from distill.commandline.commands import COMMANDS

    helps = {f"{name} --help": [*DISTILL, *name.split(), "--help"] for name in COMMANDS}
    return {
        "--help": [*DISTILL, "--help"],
        "--version": [*DISTILL, "--version"],
        "wrong command": [*DISTILL, "trian"],
        "wrong key": [*DISTILL, "run", "demo", "train.stepz=1"],
        "wrong path": [*DISTILL, "run", "gone.yaml"],
        "wrong path in a field": [*DISTILL, "cache", "demo", "teacher.path=gone"],
        "audit of 8 clips": [*DISTILL, "audit", "m.json"],
        "stats of 8 clips": [*DISTILL, "stats", "m.json"],
        "split of 8 rows": [*DISTILL, "split", "m.json", "a.json", "b.json", "--by", "recording"],
        **helps,
    }


def main() -> None:
    """Time every command and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each, of which the least counts (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name))
        torch_words = ["-c", "import torch; print(torch.__version__)"]
        everything = {"import torch": torch_words, **commands()}
        seconds = {
            command: min(time_first_line(words, Path(name)) for _ in range(args.runs + 1))
            for command, words in everything.items()
        }
    whole = seconds.pop("import torch")
    rows = {command: {"seconds": round(s, 3), "ratio": round(s / whole, 3)} for command, s in seconds.items()}
    lines = [f"`import torch` takes {whole:.2f} s of the processor; aimed at: {TARGET} of it.", ""]
    lines += ["| command | seconds | ratio |", "|---|---:|---:|"]
    lines += [f"| {command} | {row['seconds']:.3f} | {row['ratio']:.3f} |" for command, row in rows.items()]
    figures = {"import_torch_seconds": round(whole, 3), "target_ratio": TARGET, "commands": rows}
    write_result("startup", figures, "\n".join(lines))


if __name__ == "__main__":
    main()
