"""Waveforms to log-mel features in numpy, as `teachers.ears.frontend` computes them: Whisper's log-mel, Kaldi's bank.

Filter banks come with the exported folder. Knows no encoder.

Shapes: N audio samples, X mel frames of 10 ms, M mel bins, F spectrum bins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

WINDOW_SAMPLES, HOP_SAMPLES, KALDI_FFT = 400, 160, 512  # 25 ms, 10 ms, and the window rounded up to a power of two


@dataclass(frozen=True)
class LogMel:
    """Whisper's features.

    Args:
        bank_FM: Slaney's filters over 400-point spectra.
        num_frames: 10 ms frames of the output, 3000 for 30 s.
    """

    bank_FM: np.ndarray
    num_frames: int

    def __call__(self, waveform_N: np.ndarray) -> np.ndarray:
        """mel_MX of one waveform; what lies past `num_frames` is cut."""
        frames_XN = self.frame(waveform_N)
        window_N = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES)
        energies_XM = power(frames_XN * window_N.astype(np.float32), WINDOW_SAMPLES) @ self.bank_FM
        logs_XM = np.log10(np.maximum(energies_XM, 1e-10)) * 0.25 + 1.0
        silence = np.float32((-10.0 + 4.0) / 4.0)  # what an energy of 1e-10 gives
        floor = np.maximum(logs_XM.max(), silence) - np.float32(2.0)
        mel_MX = np.full((self.bank_FM.shape[1], self.num_frames), max(floor, silence), np.float32)
        mel_MX[:, : len(logs_XM)] = np.maximum(logs_XM, floor).T
        return mel_MX

    def frame(self, waveform_N: np.ndarray) -> np.ndarray:
        """Overlapping frames, centered on multiples of 10 ms, up to the last that sees audio: frames_XN."""
        limit, half = self.num_frames * HOP_SAMPLES, WINDOW_SAMPLES // 2
        waveform_N = np.asarray(waveform_N[:limit], np.float32)
        num_heard = min(self.num_frames, -(-(len(waveform_N) + half) // HOP_SAMPLES))
        length = min(limit, num_heard * HOP_SAMPLES + half)
        padded_N = np.pad(waveform_N, (half, length - len(waveform_N) + half))
        padded_N[:half] = padded_N[half + 1 : 2 * half + 1][::-1]
        if length == limit:
            padded_N[-half:] = padded_N[-2 * half - 1 : -half - 1][::-1]
        return sliding_window_view(padded_N, WINDOW_SAMPLES)[::HOP_SAMPLES][:num_heard]


@dataclass(frozen=True)
class Fbank:
    """Kaldi's log filter bank as BEATs and EAT take it.

    Args:
        bank_FM: Kaldi's filters over 512-point spectra.
        window: "povey" or "hanning".
        scale, mean, std, removes_mean: see `teachers.ears.frontend.KaldiFbank`.
    """

    bank_FM: np.ndarray
    window: str
    scale: float
    mean: float
    std: float
    removes_mean: bool

    def __call__(self, waveform_N: np.ndarray) -> np.ndarray:
        """mel_XM of one waveform: whole frames only."""
        waveform_N = np.asarray(waveform_N, np.float32)
        if self.removes_mean:
            waveform_N = waveform_N - waveform_N.mean(dtype=np.float32)
        if len(waveform_N) < WINDOW_SAMPLES:
            return np.zeros((0, self.bank_FM.shape[1]), np.float32)
        frames_XN = sliding_window_view(waveform_N, WINDOW_SAMPLES)[::HOP_SAMPLES]
        centered_XN = frames_XN - frames_XN.mean(1, keepdims=True)
        hann_N = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / (WINDOW_SAMPLES - 1))
        window_N = (hann_N ** {"povey": 0.85, "hanning": 1.0}[self.window] * self.scale).astype(np.float32)
        # both windows begin with 0, so that Kaldi's special case for a frame's first sample never counts
        heard_XN = (centered_XN[:, 1:] - np.float32(0.97) * centered_XN[:, :-1]) * window_N[1:]
        energies_XM = power(heard_XN, KALDI_FFT) @ self.bank_FM
        return (np.log(np.maximum(energies_XM, np.finfo(np.float32).eps)) - self.mean) / np.float32(self.std)

    @property
    def silence(self) -> float:
        """What fills the frames past a row's end: a log energy of 0."""
        return -self.mean / self.std


def power(frames_XN: np.ndarray, size: int) -> np.ndarray:
    """Power spectra of frames that are padded with zeros to `size`, float32."""
    spectrum_XF = np.fft.rfft(frames_XN.astype(np.float64), size, axis=1)
    return (np.square(spectrum_XF.real) + np.square(spectrum_XF.imag)).astype(np.float32)
