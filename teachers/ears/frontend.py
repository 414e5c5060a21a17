"""Waveforms to log-mel features: Whisper's log-mel and Kaldi's filter bank, batched, on the waveform's device.

Knows nothing of encoders and their weights. Windows and filter banks are built once a device; all arithmetic is
float32 with autocast off, because the energies of a waveform scaled by 2**15 overflow in float16.

Shapes: B batch, N audio samples, X mel frames, M mel bins, F real and imaginary parts of a spectrum's bins.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchaudio.compliance.kaldi as kaldi
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from shards.sample import MAX_SECONDS, SAMPLE_RATE

WINDOW_SAMPLES = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms
FRAME_SAMPLES = 2 * HOP_SAMPLES  # behind one encoder frame: Whisper, BEATs and EAT all give 50 a second
KALDI_FFT = 512  # WINDOW_SAMPLES rounded up to a power of two
MAX_SAMPLES = int(MAX_SECONDS * SAMPLE_RATE)
BLOCK_FRAMES = 512  # frames a pass on CPU: what they need stays in a core's cache


@dataclass(frozen=True)
class WhisperLogMel:
    """Whisper's log-mel features, equal to transformers' `WhisperFeatureExtractor`.

    Only the frames that see audio are computed; the others hold the constant that the extractor gives to silence.
    """

    num_mels: int  # 80 for Whisper up to large-v2, 128 for large-v3 and turbo
    num_frames: int  # length of the output in 10 ms frames, 3000 for 30 s

    @torch.no_grad()
    def __call__(self, waveforms_BN: Tensor, num_samples_B: Tensor) -> Tensor:
        """Compute the features; audio past `num_frames` is cut.

        Args:
            waveforms_BN: 16 kHz, padded with zeros.
            num_samples_B: length of each row.

        Returns:
            mel_BMX, float32, X = num_frames.
        """
        device = waveforms_BN.device
        bank = whisper_bank(self.num_mels, device)
        mel_BMX = torch.empty(len(waveforms_BN), self.num_mels, self.num_frames, device=device)
        with torch.autocast(device.type, enabled=False):
            for rows, num_samples in group_rows(waveforms_BN, num_samples_B):
                frames_BXN = self.frame(waveforms_BN[rows, :num_samples])
                for place, squares_BXF in square_spectra(frames_BXN, WINDOW_SAMPLES, window_frames):
                    self.write_logs_(mel_BMX[rows, :, place], bank(squares_BXF))
                self.finish_(mel_BMX[rows], frames_BXN.shape[1])
        return mel_BMX

    def frame(self, waveforms_BN: Tensor) -> Tensor:
        """Overlapping frames, centered on multiples of 10 ms, up to the last that sees audio: frames_BXN."""
        limit, half = self.num_frames * HOP_SAMPLES, WINDOW_SAMPLES // 2
        waveforms_BN = waveforms_BN[:, :limit].float()
        num_samples = waveforms_BN.shape[1]
        num_heard = min(self.num_frames, -(-(num_samples + half) // HOP_SAMPLES))
        # The extractor pads to `limit` and reflects there; short of it, the last frame that hears ends in zeros.
        length = min(limit, num_heard * HOP_SAMPLES + half)
        padded_BN = F.pad(waveforms_BN, (half, length - num_samples + half))
        padded_BN[:, :half] = padded_BN[:, half + 1 : 2 * half + 1].flip(1)
        if length == limit:
            padded_BN[:, -half:] = padded_BN[:, -2 * half - 1 : -half - 1].flip(1)
        return padded_BN.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)[:, :num_heard]

    def write_logs_(self, out_BMX: Tensor, energies_BXM: Tensor) -> None:
        """Write `log10 / 4 + 1` of a block of energies."""
        logs_BXM = energies_BXM.clamp_(min=1e-10).log10_().mul_(0.25).add_(1.0)
        out_BMX.copy_(logs_BXM.transpose(1, 2))

    def finish_(self, mel_BMX: Tensor, num_heard: int) -> None:
        """Lift what lies 80 dB under a row's maximum, and fill the frames past the first `num_heard`."""
        silence = (-10.0 + 4.0) / 4.0  # what an energy of 1e-10 gives
        heard_BMX = mel_BMX[..., :num_heard]
        floor_B11 = heard_BMX.amax((1, 2), keepdim=True).clamp_(min=silence).sub_(2.0)
        torch.maximum(heard_BMX, floor_B11, out=heard_BMX)
        mel_BMX[..., num_heard:] = floor_B11.clamp_(min=silence)


@dataclass(frozen=True)
class KaldiFbank:
    """Kaldi's log filter bank as BEATs and EAT take it: 128 bins, 25 ms frames each 10 ms, whole frames only."""

    window: str  # "povey" or "hanning"
    scale: float  # the waveform in [-1, 1] is multiplied by this
    mean: float  # of the log energies of the encoder's training data
    std: float  # twice the standard deviation, as both encoders divide by it
    removes_mean: bool  # subtract the clip's mean first
    num_mels: int = 128

    def features_on_meta(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Empty features of one clip, as encoders take them: mel_BXM and num_frames_B."""
        shape = (1, count_frames(num_samples), self.num_mels)
        return torch.empty(shape, device="meta"), torch.empty(1, dtype=torch.long, device="meta")

    @torch.no_grad()
    def __call__(self, waveforms_BN: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the normalized features; frames past a row's own count hold what a log energy of 0 gives.

        Args:
            waveforms_BN: 16 kHz in [-1, 1], padded with zeros.
            num_samples_B: length of each row.

        Returns:
            mel_BXM, float32, and num_frames_B.
        """
        device = waveforms_BN.device
        waveforms_BN, num_samples_B = waveforms_BN.float(), num_samples_B.to(device)
        if self.removes_mean:
            waveforms_BN = waveforms_BN - waveforms_BN.sum(1, keepdim=True) / num_samples_B[:, None]
        bank = kaldi_bank(self.num_mels, device)
        mel_BXM = self.build_silence(len(waveforms_BN), count_frames(waveforms_BN.shape[1]), device)
        with torch.autocast(device.type, enabled=False):
            for rows, num_samples in group_rows(waveforms_BN, num_samples_B):
                if num_samples >= WINDOW_SAMPLES:
                    frames_BXN = waveforms_BN[rows, :num_samples].unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)
                    for place, squares_BXF in square_spectra(frames_BXN, KALDI_FFT, self.prepare):
                        mel_BXM[rows, place] = self.normalize_(bank(squares_BXF))
        return self.mask_(mel_BXM, num_samples_B)

    def prepare(self, frames_BXN: Tensor, out_BXN: Tensor) -> None:
        """Remove each frame's mean, emphasize high frequencies, apply the window.

        Both windows begin with 0, so that Kaldi's special case for a frame's first sample never counts; without that
        sample all others move by one place, which a power spectrum does not see.
        """
        window_N = kaldi_window(self.window, frames_BXN.device) * self.scale
        centered_BXN = frames_BXN - frames_BXN.mean(2, keepdim=True)
        heard = out_BXN[..., : WINDOW_SAMPLES - 1]
        torch.sub(centered_BXN[..., 1:], centered_BXN[..., :-1], alpha=0.97, out=heard)
        heard.mul_(window_N[1:])

    def normalize_(self, energies_BXM: Tensor) -> Tensor:
        """Energies to normalized logs."""
        return energies_BXM.clamp_(min=torch.finfo(torch.float32).eps).log_().sub_(self.mean).div_(self.std)

    def build_silence(self, batch_size: int, num_frames: int, device: torch.device) -> Tensor:
        """Features whose log energies are 0, mel_BXM."""
        return torch.full((batch_size, num_frames, self.num_mels), -self.mean / self.std, device=device)

    def mask_(self, mel_BXM: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Give the frames that run past their row's end the value of a log energy of 0."""
        num_frames_B = ((num_samples_B.to(mel_BXM.device) - WINDOW_SAMPLES) // HOP_SAMPLES + 1).clamp(min=0)
        if mel_BXM.device.type != "cpu":  # where rows were computed together
            is_padding_BX = torch.arange(mel_BXM.shape[1], device=mel_BXM.device) >= num_frames_B[:, None]
            mel_BXM.masked_fill_(is_padding_BX[..., None], -self.mean / self.std)
        return mel_BXM, num_frames_B


@dataclass(frozen=True)
class MelBank:
    """A mel bank in bands: neighboring mel bins see few of a spectrum's bins, so most of the products are spared."""

    bands: tuple[tuple[int, int, Tensor], ...]  # first F, last F + 1, filters_FM

    def __call__(self, squares_BXF: Tensor) -> Tensor:
        """Energies of the mel bins, mel_BXM."""
        return torch.cat([squares_BXF[..., first:last] @ filters_FM for first, last, filters_FM in self.bands], -1)

    @classmethod
    def from_filters(cls, filters: Tensor, num_bands: int = 4) -> "MelBank":
        """Cut a bank of spectrum bins times mel bins; each filter serves a bin's real and its imaginary part."""
        filters_FM = filters.repeat_interleave(2, 0)
        bands = []
        for band_FM in filters_FM.chunk(num_bands, 1):
            used = band_FM.any(1).nonzero()
            first, last = int(used[0]), int(used[-1]) + 1
            bands.append((first, last, band_FM[first:last].contiguous()))
        return cls(tuple(bands))


def group_rows(waveforms_BN: Tensor, num_samples_B: Tensor) -> Iterator[tuple[slice, int]]:
    """Rows to compute together, and their length: all; on CPU one by one, to spare padding and to stay in its cache."""
    if waveforms_BN.device.type == "cpu":
        for row, num_samples in enumerate(num_samples_B.tolist()):
            yield slice(row, row + 1), num_samples
    else:
        yield slice(None), waveforms_BN.shape[1]


def square_spectra(
    frames_BXN: Tensor, fft_size: int, prepare: Callable[[Tensor, Tensor], None]
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of frames: their place and squares_BXF, the squared parts of their spectra; on CPU as its cache has room.

    Args:
        frames_BXN: raw frames.
        fft_size: length that frames are padded to with zeros.
        prepare: writes windowed frames into the first places of its second argument, which keeps zeros behind them.
    """
    batch_size, num_frames = frames_BXN.shape[:2]
    size = BLOCK_FRAMES if frames_BXN.device.type == "cpu" else num_frames
    padded_BXN = frames_BXN.new_zeros(batch_size, min(size, num_frames), fft_size)
    for start in range(0, num_frames, size):
        stop = min(start + size, num_frames)
        block_BXN = padded_BXN[:, : stop - start]
        prepare(frames_BXN[:, start:stop], block_BXN)
        yield slice(start, stop), torch.view_as_real(torch.fft.rfft(block_BXN)).square_().flatten(2)


def count_frames(num_samples: int) -> int:
    """Whole 25 ms frames, one each 10 ms."""
    return max(0, (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1)


def check_lengths(num_samples_B: Tensor, shortest: int, longest: int, ear: str) -> None:
    """Refuse a batch with a row that an ear cannot hear; costs a wait for the device unless the lengths are on CPU.

    Raises:
        ValueError: a row has fewer samples than `shortest` or more than `longest`.
    """
    for row, num_samples in enumerate(num_samples_B.tolist()):
        if not shortest <= num_samples <= longest:
            raise ValueError(
                f"waveforms_BN[{row}] is {num_samples} samples ({num_samples / SAMPLE_RATE:.3f} s), but {ear} hears "
                f"{shortest} to {longest} ({longest / SAMPLE_RATE:.3f} s); cut, pad or leave out the clip."
            )


def window_frames(frames_BXN: Tensor, out_BXN: Tensor) -> None:
    """Apply Whisper's window."""
    torch.mul(frames_BXN, whisper_window(frames_BXN.device), out=out_BXN)


@functools.cache
def whisper_window(device: torch.device) -> Tensor:
    """Periodic Hann window."""
    return torch.hann_window(WINDOW_SAMPLES, device=device)


@functools.cache
def whisper_bank(num_mels: int, device: torch.device) -> MelBank:
    """Slaney mel bank over 400-point spectra."""
    num_bins = 1 + WINDOW_SAMPLES // 2
    filters = mel_filter_bank(num_bins, num_mels, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return MelBank.from_filters(torch.from_numpy(filters).to(device, torch.float32))


@functools.cache
def kaldi_window(name: str, device: torch.device) -> Tensor:
    """Symmetric window by Kaldi's name."""
    hann_N = torch.hann_window(WINDOW_SAMPLES, periodic=False, device=device)
    return {"povey": hann_N.pow(0.85), "hanning": hann_N}[name]


def kaldi_filters(num_mels: int) -> Tensor:
    """Kaldi's mel bank from 20 to 8000 Hz, spectrum bins times mel bins."""
    filters, _ = kaldi.get_mel_banks(num_mels, KALDI_FFT, float(SAMPLE_RATE), 20.0, 0.0, 100.0, -500.0, 1.0)
    return F.pad(filters, (0, 1)).T


@functools.cache
def kaldi_bank(num_mels: int, device: torch.device) -> MelBank:
    """Kaldi's mel bank on a device."""
    return MelBank.from_filters(kaldi_filters(num_mels).to(device))
