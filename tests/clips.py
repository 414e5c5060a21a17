"""Small recordings and manifests for the tests of what comes before the shards."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile


def tone(seconds: float, rate: int = 16_000, *, frequency: float = 440.0, level: float = 0.5) -> np.ndarray:
    """A sine of shape N, float32."""
    times_N = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * frequency * times_N)).astype(np.float32)


def to_bytes(samples: np.ndarray, rate: int = 16_000, *, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    """A file of samples of shape N or (N, C)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def write_clips(folder: Path, count: int, *, seconds: float = 0.5) -> list[dict]:
    """`count` wav files of different pitch, and their rows of a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        clip = tone(seconds + number * 0.01, frequency=200 + 10 * number)
        (folder / f"clip{number:03d}.wav").write_bytes(to_bytes(clip))
        rows.append({"path": f"clip{number:03d}.wav", "text": f"tone {number}", "task": "asr"})
    return rows


def write_annotation(path: Path, rows: list) -> Path:
    """SALMONN's form of a manifest."""
    path.write_text(json.dumps({"annotation": rows}, indent=1))
    return path
