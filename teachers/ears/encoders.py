"""Which encoders there are, and how one is had by name. A new encoder is one file and one line here.

An encoder is a module `encoder(waveforms_BN, num_samples_B) -> (frames_BRE, num_frames_B)`: it hears waveforms (16 kHz,
padded with zeros), gives 50 frames a second, and stays in evaluation mode. Its class has

* `title`, its name in tables, and `shares_spectrum`: whether `front_end: shared` can make its features;
* `from_config(sizes)`, with random weights, and `from_pretrained(path, dtype=…)`;
* `sizes_of(path)`: what `from_config` takes for the checkpoint at a path, without its weights and where it is not here;
* `width` of its frames, `num_frames(num_samples)`, `check(num_samples_B)` for clips that it cannot hear,
  `encode(*features)` and `features_on_meta(num_samples)`: empty features of one clip, to count what `encode` costs.

One that can be exported as a graph (`students.device`) reads a filter bank of Kaldi's in patches of 16 by 16, and has

* `fbank`, the filter bank; `num_tokens_first`, of those that `encode` puts before the frames;
* `hears_started_patch`: whether a patch counts that the clip's last frames only begin.

Imports no torch, as what a config may say is read from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shards.lazy_imports import import_named

if TYPE_CHECKING:
    import torch
    from torch import nn

WHISPER = "whisper"  # that every model has; the others may stand beside it
ENCODERS = {  # by name: "module:class"
    WHISPER: "teachers.ears.whisper:WhisperEar",
    "beats": "teachers.ears.beats:BeatsEar",
    "eat": "teachers.ears.eat:EatEar",
}


def second_kinds() -> tuple[str, ...]:
    """The names of the encoders that may stand beside Whisper."""
    return tuple(name for name in ENCODERS if name != WHISPER)


def find_encoder(name: str) -> type[nn.Module]:
    """The class of an encoder.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder is {name!r}, but there are {', '.join(ENCODERS)}; choose one of them.")
    return import_named(ENCODERS[name])


def shares_spectrum(name: str) -> bool:
    """Whether an encoder's features can be made of Whisper's power spectrum; not so where there is none, ""."""
    return bool(name) and find_encoder(name).shares_spectrum


def load_encoder(name: str, path: str | Path, *, dtype: torch.dtype) -> nn.Module:
    """Load an encoder's weights from a file, folder or hub id.

    Raises:
        ValueError: there is no such encoder, or `path` does not hold one.
        FileNotFoundError: there is nothing at `path`.
    """
    encoder = find_encoder(name)
    try:
        return encoder.from_pretrained(path, dtype=dtype)
    except OSError as error:
        raise FileNotFoundError(
            f"{path} is no {name} that can be read ({str(error).splitlines()[0]}), but its weights are needed; "
            f"give the path of the file or folder, or download it."
        ) from error


def build_encoder(name: str, config: Mapping) -> nn.Module:
    """Build an encoder with random weights; `config` holds the sizes that its `from_config` takes.

    Raises:
        ValueError: there is no such encoder.
    """
    return find_encoder(name).from_config(config)
