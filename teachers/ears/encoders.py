"""Which encoders there are, and how one is had by name. A new encoder is one file and one line here.

Each is a module `encoder(waveforms_BN, num_samples_B) -> (frames_BRE, num_frames_B)` with `width`, `from_config` and
`from_pretrained`; it hears waveforms (16 kHz, padded with zeros), gives 50 frames a second, and stays in eval mode.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from teachers.ears.beats import BeatsEar
from teachers.ears.eat import EatEar
from teachers.ears.whisper import WhisperEar

ENCODERS = {"whisper": WhisperEar, "beats": BeatsEar, "eat": EatEar}


def load_encoder(name: str, path: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load an encoder's weights from a file, folder or hub id.

    Raises:
        ValueError: there is no such encoder, or `path` does not hold one.
        FileNotFoundError: there is nothing at `path`.
    """
    encoder = _find(name)
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
    return _find(name).from_config(config)


def _find(name: str):
    if name not in ENCODERS:
        raise ValueError(f"encoder is {name!r}, but there are {', '.join(ENCODERS)}; choose one of them.")
    return ENCODERS[name]
