"""`python -m students.device FOLDER FILE…`: what an exported student says of recordings, as it says it."""

import argparse
import sys

from shards.audio.limits import AudioError
from shards.audio.segmentation import segment_at_quiet
from shards.field_types import to_path
from shards.sample import SAMPLE_RATE
from students.asking import ASR, QUESTION, load_waveform
from students.device.student import PRODUCTS, DeviceStudent


def read_words(words: list[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser("python -m students.device", description=__doc__)
    parser.add_argument("folder", type=to_path, metavar="FOLDER", help="that `distill export --device` wrote")
    parser.add_argument("files", type=to_path, nargs="+", metavar="FILE", help="wav, flac, ogg or mp3")
    parser.add_argument("--task", default=ASR, help="whose prompt is asked (%(default)s)")
    parser.add_argument("--question", help="ask this instead")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="of the answer about a piece (%(default)s)")
    parser.add_argument("--products", choices=PRODUCTS, help="exact, or fast; default: as the folder says")
    parser.add_argument("--threads", type=int, default=0, help="of the processor; 0: as OpenVINO chooses")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Answer about each file, piece by piece; returns the exit code."""
    args = read_words(words)
    try:
        student = DeviceStudent(args.folder, products=args.products, threads=args.threads)
        for path in args.files:
            waveform_N = load_waveform(path, SAMPLE_RATE, student.min_samples)
            for start, end in segment_at_quiet(waveform_N, student.max_samples, student.min_samples):
                for text in student.stream(waveform_N[start:end], QUESTION if args.question else args.task,
                                           question=args.question, max_new_tokens=args.max_new_tokens):  # fmt: skip
                    print(text, end="", flush=True)
                print()
    except (AudioError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
