"""A checkpoint (.pth) of SALMONN's own trainers, whose frozen parts a config names."""

from pathlib import Path

from shards.status import print_status
from teachers.files.checkpoint import describe_checkpoint, load_checkpoint
from teachers.files.weights import read_torch_file
from teachers.lora import SALMONN_LORA, Lora
from teachers.salmonn import Salmonn, SalmonnConfig

PARTS = ("llm", "whisper", "second", "second_kind")
WORDS = ("end_token", "bos_token", "template")
build_empty = None


def recognizes(path: Path) -> bool:
    """Whatever is no folder, a file that is not here among them."""
    return not path.is_dir()


def load(parts, path: Path, **how) -> Salmonn:
    """The checkpoint on the parts that a config names.

    Raises:
        ValueError: a part that it cannot be without is not named, or see `load_checkpoint`.
    """
    for name in ("llm", "whisper"):
        if not getattr(parts, name):
            raise ValueError(
                f"teacher.{name} is empty, but {path} is a checkpoint without its frozen parts; name the one that it "
                f"was trained on, a folder or a hub id."
            )
    settings = {"prompts": parts.prompts, "front_end": parts.front_end}
    settings |= {name: getattr(parts, name) for name in WORDS if getattr(parts, name)}
    model, report = load_checkpoint(path, **{name: getattr(parts, name) for name in PARTS}, **how, **settings)
    print_status(f"teacher {path}: {report}")
    if not parts.prompts:
        print_status(
            f"teacher {path}: asked in the library's wordings, but trained with others; give teacher.prompts those, "
            f"prompts/train_prompt.json of its repository (and eval.prompts the test_prompt.json beside it)"
        )
    return model


def describe(parts, path: Path) -> tuple[SalmonnConfig, Lora | None]:
    """As its tensors say, or SALMONN's own sizes where it is not here."""
    names = {name: getattr(parts, name) for name in PARTS}
    if path.is_file():
        return describe_checkpoint(read_torch_file(path, device="meta"), path, **names)
    return SalmonnConfig(**names), SALMONN_LORA
