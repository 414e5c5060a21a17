"""How far an ear is from float32 in each precision of `teacher.ears`, at published sizes, on this processor.

`python benchmarks/precision.py [--seconds 5] [--whisper FOLDER] [--beats FILE]`; without files the weights are random.
"fp16" is what SALMONN's trainers do: float32 weights, products under fp16 autocast. "bf16" rounds the weights too, and
"bf16 products" alone shows which of the two errors comes from them. Whisper hears in the size of its "base" release.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from frontends import synthesise_clips
from record import write_result
from torch import Tensor, nn

from teachers.ears.beats import BeatsConfig, BeatsEar
from teachers.ears.hearing import hear_in_, products_of
from teachers.ears.whisper import WhisperEar

BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
        "num_mel_bins": 80, "init_std": 0.02}  # fmt: skip


def make_ears(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Both ears in float32, by name."""
    torch.manual_seed(0)
    whisper = WhisperEar.from_pretrained(args.whisper) if args.whisper else WhisperEar.from_config(BASE)
    beats = BeatsEar.from_pretrained(args.beats) if args.beats else BeatsEar.from_config(BeatsConfig())
    return {"Whisper": whisper.eval().float(), "BEATs": beats.eval().float()}


@torch.no_grad()
def hear(ear: nn.Module, waveform_BN: Tensor, precision: str) -> tuple[Tensor, float]:
    """Frames in a precision, float32, and the seconds that they took."""
    num_samples_B = torch.tensor([waveform_BN.shape[1]])
    began = time.perf_counter()
    if precision == "bf16 products":
        with torch.autocast("cpu", torch.bfloat16):
            frames_BRE = ear(waveform_BN, num_samples_B)[0]
    else:
        own = copy.deepcopy(ear)
        hear_in_(own, precision)
        with products_of(own):
            frames_BRE = own(waveform_BN, num_samples_B)[0]
    return frames_BRE.float(), time.perf_counter() - began


def measure(ear: nn.Module, seconds: float) -> dict[str, dict[str, float]]:
    """By precision: the frames' relative error to float32, as a norm, and seconds."""
    waveform_BN = synthesise_clips([seconds])[0][None]
    expected_BRE, needed = hear(ear, waveform_BN, "float32")
    found = {"float32": {"relative_error": 0.0, "seconds": needed}}
    for precision in ("fp16", "bf16 products", "bf16"):
        frames_BRE, needed = hear(ear, waveform_BN, precision)
        error = float((frames_BRE - expected_BRE).norm() / expected_BRE.norm())
        found[precision] = {"relative_error": error, "seconds": needed}
    return found


def main() -> None:
    """Measure both ears and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of the clip (%(default)s)")
    parser.add_argument("--whisper", help="folder of a Whisper, instead of random weights")
    parser.add_argument("--beats", help="file of a BEATs, instead of random weights")
    args = parser.parse_args()
    figures = {name: measure(ear, args.seconds) for name, ear in make_ears(args).items()}
    lines = [
        "| ear | `teacher.ears` | relative error of its frames | over fp16's | seconds |",
        "|---|---|---:|---:|---:|",
    ]
    for name, rows in figures.items():
        for precision, row in rows.items():
            times = row["relative_error"] / rows["fp16"]["relative_error"]
            lines.append(
                f"| {name} | {precision} | {row['relative_error']:.1e} | {times:.1f}× | {row['seconds']:.1f} |"
            )
    write_result("precision", {"clip_seconds": args.seconds, "ears": figures}, "\n".join(lines))


if __name__ == "__main__":
    main()
