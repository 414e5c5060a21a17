"""One toy of each kind of part that can be added, as somebody would write it: `test_adding_parts.py` adds them."""

from collections.abc import Iterator
from pathlib import Path

import tiny
import torch
from torch import Tensor, nn

from distill.evaluation.metrics.metric import Metric, Tally
from shards.manifests.datasets.dataset import Request
from shards.manifests.manifest import Entry
from teachers.ears.frontend import check_lengths
from teachers.salmonn import SalmonnConfig

FRAME = 320  # audio samples


class ToyEar(nn.Module):
    """An encoder: each 20 ms of audio through one matrix."""

    title = "Toy ear"
    shares_spectrum = False

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.project = nn.Linear(FRAME, width)

    @classmethod
    def from_config(cls, config: dict) -> "ToyEar":
        return cls(**config)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype) -> "ToyEar":
        torch.manual_seed(len(Path(path).read_bytes()))
        return cls(8).to(dtype)

    @classmethod
    def sizes_of(cls, path: str) -> dict:
        return {"width": 8}

    @staticmethod
    def features_on_meta(num_samples: int) -> tuple[Tensor]:
        return (torch.empty(1, num_samples // FRAME, FRAME, device="meta"),)

    def check(self, num_samples_B: Tensor) -> None:
        check_lengths(num_samples_B, FRAME, 480_000, self.title)

    def num_frames(self, num_samples: int) -> int:
        return num_samples // FRAME

    def forward(self, waveforms_BN: Tensor, num_samples_B: Tensor, masks_B=None) -> tuple[Tensor, Tensor]:
        num_frames = waveforms_BN.shape[1] // FRAME
        return self.encode(waveforms_BN[:, : num_frames * FRAME].unflatten(1, (-1, FRAME))), num_samples_B // FRAME

    def encode(self, pieces_BRN: Tensor) -> Tensor:
        return self.project(pieces_BRN)


def count_first_words(predictions, normalize: bool) -> Tally:
    """1 where an answer begins as the reference does."""
    return Tally.of_values([p.hypothesis.split()[:1] == p.references[0].split()[:1] for p in predictions])


FIRST_WORD = Metric(
    title="first word", tasks=("toy_task",), tally=count_first_words, plain=lambda text, normalize: text.lower()
)


class ToyTeachers:
    """A kind of teacher: a text file that names the folder of its parts."""

    build_empty = None

    @staticmethod
    def recognizes(path: Path) -> bool:
        return path.suffix == ".toy"

    @staticmethod
    def load(parts, path: Path, *, dtype: torch.dtype, ear_precision: str, llm_weights: bool):
        return tiny.make_teacher(Path(path.read_text())).eval().requires_grad_(False)

    @staticmethod
    def describe(parts, path: Path) -> tuple[SalmonnConfig, None]:
        return tiny.make_teacher(Path(path.read_text())).config, None


def read_toy_dataset(asked: Request) -> Iterator[Entry]:
    """A reader of a data set: a line a clip, file and text."""
    for line in asked.labels.read_text().splitlines():
        name, _, text = line.partition(" ")
        yield Entry(asked.audio / name, text, "asr")


def add_arguments(parser) -> None:
    """What the toy command takes: this file is its module."""
    parser.add_argument("word")


def main(args) -> int:
    """Say the word."""
    print(f"toy says {args.word}")
    return 0
