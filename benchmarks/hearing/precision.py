"""How far an ear is from float32 in each precision of `teacher.ears`, at published sizes, on this processor.

`python benchmarks/hearing/precision.py [--seconds 5] [--whisper FOLDER] [--beats FILE]`; without files the weights are
random. "fp16" is what SALMONN's trainers do: float32 weights, products under fp16 autocast. "bf16" rounds the weights
too, and "bf16 products" alone shows which of the two errors comes from them. Whisper hears in the size of its "base"
release.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import torch
from frontends import synthesize_clips
from record import write_result
from torch import Tensor, nn

from teachers.ears.beats import BeatsConfig, BeatsEar
from teachers.ears.precision import ear_autocast, set_ear_precision_
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
def hear(ear: nn.Module, waveform_BN: Tensor, precision: str) -> Tensor:
    """Frames that were heard in a precision, as float32."""
    num_samples_B = torch.tensor([waveform_BN.shape[1]])
    if precision == "bf16 products":
        with torch.autocast("cpu", torch.bfloat16):
            return ear(waveform_BN, num_samples_B)[0].float()
    own = copy.deepcopy(ear)
    set_ear_precision_(own, precision)
    with ear_autocast(own):
        return own(waveform_BN, num_samples_B)[0].float()


def measure(ear: nn.Module, seconds: float) -> dict[str, float]:
    """The relative error of the frames to float32, as a norm, by precision."""
    waveform_BN = synthesize_clips([seconds])[0][None]
    expected_BRE = hear(ear, waveform_BN, "float32")
    return {
        precision: float((hear(ear, waveform_BN, precision) - expected_BRE).norm() / expected_BRE.norm())
        for precision in ("fp16", "bf16 products", "bf16")
    }


def main() -> None:
    """Measure both ears and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of the clip (%(default)s)")
    parser.add_argument("--whisper", help="folder of a Whisper, instead of random weights")
    parser.add_argument("--beats", help="file of a BEATs, instead of random weights")
    args = parser.parse_args()
    figures = {name: measure(ear, args.seconds) for name, ear in make_ears(args).items()}
    lines = ["| ear | `teacher.ears` | relative error of its frames | over fp16's |", "|---|---|---:|---:|"]
    for name, errors in figures.items():
        lines += [f"| {name} | {p} | {error:.1e} | {error / errors['fp16']:.1f}× |" for p, error in errors.items()]
    write_result("precision", {"clip_seconds": args.seconds, "relative_error": figures}, "\n".join(lines))


if __name__ == "__main__":
    main()
