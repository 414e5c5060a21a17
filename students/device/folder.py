"""An exported folder for devices: what `device.json` says, and whether the files are those that were exported.

Imports no torch. `docs/device.md` says what is in the folder.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.files.hash import remember_hash
from shards.jsonfile import ShapeError, read_object

MANIFEST, VERSION = "device.json", 1  # a folder of another version is refused
TOKENIZER, EMBEDDINGS, BANKS = "tokenizer.json", "embeddings.npy", "banks.npz"
GRAPHS = {"whisper": "whisper.xml", "second": "second.xml", "connector": "connector.xml", "llm": "llm.xml"}


@dataclass(frozen=True)
class Device:
    """What a folder's `device.json` says."""

    name: str  # of the run
    prompts: dict  # `by_task`, `template`, `evaluation`
    words: dict  # `special`, `end_token`, `bos_token`, `max_answer_tokens`, `own_end_ids`, `num_tokens`
    audio: dict  # `sample_rate`, `min_samples`, `max_samples`, `least_samples`, `frame_samples`, `padding_seconds`
    whisper: dict  # `num_mels`, `num_mel_frames`, `width`
    second: dict | None  # `kind`, `width`, `patch`, `bands`, `rounds_up`, and the filter bank's fields
    windows: dict  # `window_frames`, `stride_frames`, `num_queries`, `which`
    llm: dict  # `width`, `max_positions`, `architecture`
    precision: dict  # `head`, `ears`, `products`
    sizes: dict  # MB by file
    measured: dict  # error and texts against the trained student, by precision
    files: dict[str, str]  # sha256 by name

    def write(self, folder: Path) -> None:
        """Write `device.json`."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def is_device(folder: str | Path) -> bool:
    """Whether a folder was exported for devices."""
    return (Path(folder) / MANIFEST).is_file()


def read_device(folder: Path, *, check_files: bool = True) -> Device:
    """What a folder says it is.

    Args:
        folder: that `distill export --device` wrote.
        check_files: compare every file's hash (remembered by path, size and time).

    Raises:
        FileNotFoundError: there is no `device.json`, or a file that it names is missing.
        ValueError: it is of another version or damaged, or a file was changed.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}, but a device's folder does; check the path.")
    try:
        stored = read_object(path, {"version": int})
        version = stored.pop("version")
        if version == VERSION:
            device = Device(**stored)
    except (ShapeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read (it {error}), but must be whole; export the run again.") from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, but this runner reads {VERSION}; export the run again.")
    if check_files:
        check_hashes(Path(folder), device.files)
    return device


def check_hashes(folder: Path, files: Mapping[str, str]) -> None:
    """Refuse a folder with a changed file.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one has other bytes.
    """
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, but {MANIFEST} names it; copy the folder again.")
        found = remember_hash(folder / name)
        if found != expected:
            raise ValueError(
                f"{folder / name} has sha256 {found[:16]}, but {MANIFEST} says {expected[:16]}; copy the folder again, "
                f"or export the run again."
            )
