"""Sounds made with numpy, and their captions: tones, sweeps, noise, clicks, and two of them together.

It knows waveforms and words for them, nothing of splits, tasks or files. Everything is float64 until the last rounding,
so that the int16 samples do not depend on the machine.
"""

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shards.sample import SAMPLE_RATE

FADE_SECONDS = 0.01
GAP_SECONDS = 0.1  # of silence between a sound and the one that follows it

# Four words or more: CIDEr-D cannot give a shorter caption its full score.
CAPTIONS = {
    "low_tone": "a steady low tone",
    "high_tone": "a steady high tone",
    "rising_sweep": "a sweep that rises",
    "falling_sweep": "a sweep that falls",
    "noise": "a burst of noise",
    "clicks": "a series of clicks",
}
# Hz, at the start and at the end; a tone keeps its start.
_FREQUENCIES = {
    "low_tone": ((180, 420), None),
    "high_tone": ((1_600, 3_200), None),
    "rising_sweep": ((250, 600), (1_800, 3_200)),
    "falling_sweep": ((1_800, 3_200), (250, 600)),
}


@dataclass(frozen=True)
class Sound:
    """One sound: what it is and the parameters that make it."""

    kind: str  # a key of CAPTIONS
    milliseconds: int
    start_hz: int  # of tones and sweeps; 0 for noise and clicks
    end_hz: int
    amplitude: int  # peak, in thousandths of full scale
    seed: int  # of the noise, or of the clicks' times

    @property
    def caption(self) -> str:
        return CAPTIONS[self.kind]

    @property
    def signature(self) -> str:
        """What must not be shared by two splits: two sounds with one signature differ by loudness at most."""
        return f"{self.kind}/{self.milliseconds}/{self.start_hz}/{self.end_hz}/{self.seed}"


def draw_sound(rng: random.Random, kind: str) -> Sound:
    """A sound of this kind with parameters drawn from `rng`: 0.5 to 1.2 s, -20 to -6 dB of full scale."""
    start_range, end_range = _FREQUENCIES.get(kind) or ((0, 0), None)
    start_hz = rng.randint(*start_range)
    return Sound(
        kind=kind,
        milliseconds=rng.randint(500, 1_200),
        start_hz=start_hz,
        end_hz=rng.randint(*end_range) if end_range else start_hz,
        amplitude=rng.randint(100, 500),
        seed=rng.randrange(2**32) if kind in ("noise", "clicks") else 0,
    )


@dataclass(frozen=True)
class Scene:
    """One or two sounds, after or over each other."""

    sounds: tuple[Sound, ...]
    joint: str  # "" of a single sound, "followed by" or "over"

    @property
    def caption(self) -> str:
        return f" {self.joint} ".join(sound.caption for sound in self.sounds)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sound.kind for sound in self.sounds)

    def render(self) -> np.ndarray:
        """The scene's waveform: float64 mono at 16 kHz, 0.5 to 2.5 s."""
        waveforms = [render_sound(sound) for sound in self.sounds]
        if self.joint == "over":
            # The background is cut or repeated to the foreground's length: both are heard from start to end.
            foreground_N, background_N = waveforms
            return foreground_N + 0.3 * np.resize(background_N, foreground_N.shape)
        gap_N = np.zeros(int(GAP_SECONDS * SAMPLE_RATE))
        return np.concatenate([part for waveform_N in waveforms for part in (waveform_N, gap_N)][:-1])


def render_sound(sound: Sound) -> np.ndarray:
    """One sound's waveform: float64 mono at 16 kHz, faded in and out."""
    num_samples = sound.milliseconds * SAMPLE_RATE // 1_000
    if sound.kind == "noise":
        waveform_N = np.random.Generator(np.random.PCG64(sound.seed)).random(num_samples) * 2 - 1
    elif sound.kind == "clicks":
        waveform_N = _render_clicks(num_samples, sound.seed)
    else:
        # The phase is the integral of the frequency, which moves from start to end in equal ratios.
        hertz_N = sound.start_hz * (sound.end_hz / sound.start_hz) ** np.linspace(0, 1, num_samples)
        waveform_N = np.sin(2 * np.pi * np.cumsum(hertz_N) / SAMPLE_RATE)
    fade_N = np.minimum(1, np.arange(num_samples) / (FADE_SECONDS * SAMPLE_RATE))
    return waveform_N * fade_N * fade_N[::-1] * sound.amplitude / 1_000


def _render_clicks(num_samples: int, seed: int) -> np.ndarray:
    """Bursts of 2 ms that decay, 60 to 140 ms apart."""
    rng = random.Random(seed)
    waveform_N = np.zeros(num_samples)
    starts = [int(0.02 * SAMPLE_RATE)]
    while starts[-1] < num_samples:
        starts.append(starts[-1] + int(rng.uniform(0.06, 0.14) * SAMPLE_RATE))
    burst_N = np.exp(-np.arange(32) / 8) * np.cos(np.pi * np.arange(32) / 2)
    for start, _ in pairwise(starts):
        end = min(start + len(burst_N), num_samples)
        waveform_N[start:end] = burst_N[: end - start]
    return waveform_N
