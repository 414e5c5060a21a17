"""Offline speech synthesis: the eSpeak NG library of the `espeakng-loader` package, called through ctypes.

It knows voices and words, nothing of tasks or manifests.
"""

import ctypes
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import espeakng_loader
import numpy as np

ACCENTS = ("en", "en-us")
MALE = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8")
FEMALE = ("f1", "f2", "f3", "f4", "f5")

# From espeak-ng's speak_lib.h, version 1.52.
_SYNCHRONOUS = 2
_RATE, _PITCH = 1, 3
_CHARS_UTF8 = 1
_EE_OK = 0

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def voice_names(variants: Sequence[str]) -> list[str]:
    """Every voice of these variants: each accent with each variant, as eSpeak names them (`en-us+f2`)."""
    return [f"{accent}+{variant}" for accent in ACCENTS for variant in variants]


class Synthesizer:
    """A private eSpeak NG engine: the same calls in the same order give the same samples.

    The engine carries oscillator phases from one utterance to the next in static variables of the C library. Each
    instance therefore loads a copy of its own, so that what a process spoke before does not change what it speaks now.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            private = shutil.copy(Path(espeakng_loader.get_library_path()).resolve(), folder)
            self._library = ctypes.CDLL(str(private))
        data = espeakng_loader.get_data_path()
        self.sample_rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
        if self.sample_rate <= 0:
            raise RuntimeError(
                f"espeak_Initialize is {self.sample_rate} with the data of {data}, but a sample rate above 0 is "
                f"expected; reinstall espeakng-loader."
            )
        self._blocks: list[np.ndarray] = []
        self._callback = _Callback(self._receive)  # kept: ctypes would free it while the library still holds it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, words: str, *, voice: str, pitch: int = 50, speed: int = 150) -> np.ndarray:
        """Speak a text.

        Args:
            words: what is said, in English.
            voice: an eSpeak voice, with or without a variant (`en-us`, `en+m3`).
            pitch: 0 to 100; 50 is the voice's own.
            speed: words a minute, 80 to 450.

        Returns:
            The waveform, int16 mono at `sample_rate` (22,050 Hz).

        Raises:
            ValueError: eSpeak does not know the voice.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != _EE_OK:
            raise ValueError(
                f"voice is {voice!r}, but eSpeak NG does not know it; "
                f"use one of {', '.join(voice_names(MALE + FEMALE))}."
            )
        # Breathy voices draw noise from the C library's rand(), whose state anything in the process may move.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._library.espeak_SetParameter(_RATE, speed, 0)
        data = words.encode() + b"\0"
        self._blocks.clear()
        self._library.espeak_Synth(data, len(data), 0, 0, 0, _CHARS_UTF8, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._blocks)
