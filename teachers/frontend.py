"""Waveforms to log-mel features: Whisper's log-mel and Kaldi's filter bank, batched, on the waveform's device.

Knows nothing of encoders and their weights. Windows and filter banks are built once a device; all arithmetic is
float32 with autocast off, because the energies of a waveform scaled by 2**15 overflow in float16.

Shapes: B batch, N audio samples, X mel frames, M mel bins.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchaudio.compliance.kaldi as kaldi
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from shards.sample import MAX_SECONDS, SAMPLE_RATE

WINDOW_SAMPLES = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms
MAX_SAMPLES = int(MAX_SECONDS * SAMPLE_RATE)
BLOCK_FRAMES = 1024  # frames a pass on CPU: what they need stays in a core's cache


@dataclass(frozen=True)
class WhisperLogMel:
    """Whisper's log-mel features, equal to transformers' `WhisperFeatureExtractor`.

    Only the frames that see audio are computed; the others hold the constant that the extractor gives to silence.
    """

    num_mels: int  # 80 for Whisper up to large-v2, 128 for large-v3 and turbo
    num_frames: int  # length of the output in 10 ms frames, 3000 for 30 s

    @torch.no_grad()
    def __call__(self, waveforms_BN: Tensor) -> Tensor:
        """Compute the features; audio past `num_frames` is cut.

        Args:
            waveforms_BN: 16 kHz, padded with zeros.

        Returns:
            mel_BMX, float32, X = num_frames.
        """
        limit = self.num_frames * HOP_SAMPLES
        waveforms_BN = waveforms_BN[:, :limit].float()
        num_heard = min(self.num_frames, -(-(waveforms_BN.shape[1] + WINDOW_SAMPLES // 2) // HOP_SAMPLES))
        # The extractor pads to `limit` and reflects there; short of it the last heard frame ends in zeros.
        length = min(limit, num_heard * HOP_SAMPLES + WINDOW_SAMPLES)
        padded_BN = F.pad(waveforms_BN, (0, length - waveforms_BN.shape[1]))
        padded_BN = F.pad(padded_BN, (WINDOW_SAMPLES // 2, WINDOW_SAMPLES // 2), mode="reflect")
        frames_BXN = padded_BN.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)[:, :num_heard]
        window_N = whisper_window(padded_BN.device)
        filters_FM = whisper_filters(self.num_mels, padded_BN.device)
        mel_BXM = mel_energies(frames_BXN, lambda frames: frames * window_N, filters_FM)
        log_BXM = mel_BXM.clamp_(min=1e-10).log10_()
        floor_B11 = log_BXM.amax((1, 2), keepdim=True).clamp_(min=-10.0) - 8.0
        log_BXM = torch.maximum(log_BXM, floor_B11)
        silence_B1X = floor_B11.clamp(min=-10.0).expand(-1, -1, self.num_frames - num_heard)
        silence_BMX = silence_B1X.expand(-1, self.num_mels, -1)
        return (torch.cat([log_BXM.transpose(1, 2), silence_BMX], 2) + 4.0) / 4.0


@dataclass(frozen=True)
class KaldiFbank:
    """Kaldi's log filter bank as BEATs and EAT take it: 128 bins, 25 ms frames each 10 ms, whole frames only."""

    window: str  # "povey" or "hanning"
    scale: float  # the waveform in [-1, 1] is multiplied by this
    mean: float  # of the log energies of the encoder's training data
    std: float  # twice the standard deviation, as both encoders divide by it
    removes_mean: bool  # subtract the clip's mean first
    num_mels: int = 128

    @torch.no_grad()
    def __call__(self, waveforms_BN: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the normalised features; frames past a row's own count hold what an energy's log of 0 gives.

        Args:
            waveforms_BN: 16 kHz in [-1, 1], padded with zeros.
            num_samples_B: length of each row.

        Returns:
            mel_BXM, float32, and num_frames_B.
        """
        waveforms_BN = waveforms_BN.float()
        if self.removes_mean:
            waveforms_BN = waveforms_BN - waveforms_BN.sum(1, keepdim=True) / num_samples_B[:, None]
        waveforms_BN = F.pad(waveforms_BN * self.scale, (0, max(0, WINDOW_SAMPLES - waveforms_BN.shape[1])))
        window_N = kaldi_window(self.window, waveforms_BN.device)
        filters_FM = kaldi_filters(self.num_mels, waveforms_BN.device)

        def prepare(frames_BXN):
            centred_BXN = frames_BXN - frames_BXN.mean(2, keepdim=True)
            # Both windows begin with 0, so Kaldi's special case for a frame's first sample never counts.
            return torch.sub(centred_BXN[..., 1:], centred_BXN[..., :-1], alpha=0.97).mul_(window_N[1:])

        mel_BXM = mel_energies(waveforms_BN.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES), prepare, filters_FM)
        log_BXM = mel_BXM.clamp_(min=torch.finfo(torch.float32).eps).log_()
        num_frames_B = count_frames(num_samples_B)
        is_padding_BX = torch.arange(log_BXM.shape[1], device=log_BXM.device) >= num_frames_B[:, None]
        log_BXM.masked_fill_(is_padding_BX[..., None], 0.0)
        return log_BXM.sub_(self.mean).div_(self.std), num_frames_B


def count_frames(num_samples_B: Tensor) -> Tensor:
    """Number of whole 25 ms frames in each row."""
    return ((num_samples_B - WINDOW_SAMPLES) // HOP_SAMPLES + 1).clamp(min=0)


def mel_energies(frames_BXN: Tensor, prepare: Callable[[Tensor], Tensor], filters_FM: Tensor) -> Tensor:
    """Energies of a mel bank over the power spectra of prepared frames, mel_BXM; on CPU in blocks fit for its cache."""
    fft_size = filters_FM.shape[0] - 2
    batch_size, num_frames = frames_BXN.shape[:2]
    block = max(1, BLOCK_FRAMES // batch_size) if frames_BXN.device.type == "cpu" else num_frames
    mel_BXM = frames_BXN.new_empty(batch_size, num_frames, filters_FM.shape[1])
    with torch.autocast(frames_BXN.device.type, enabled=False):
        for start in range(0, num_frames, block):
            spectrum = torch.fft.rfft(prepare(frames_BXN[:, start : start + block]), n=fft_size)
            squares_BXF = torch.view_as_real(spectrum).square_().flatten(2)
            mel_BXM[:, start : start + block] = squares_BXF @ filters_FM
    return mel_BXM


def check_lengths(num_samples_B: Tensor, shortest: int, longest: int, ear: str) -> None:
    """Refuse a batch with a row that an ear cannot hear; costs a wait for the device unless the lengths are on CPU.

    Raises:
        ValueError: a row has fewer samples than `shortest` or more than `longest`.
    """
    for row, num_samples in enumerate(num_samples_B.tolist()):
        if not shortest <= num_samples <= longest:
            raise ValueError(
                f"waveforms_BN[{row}] is {num_samples / SAMPLE_RATE:.3f} s, but {ear} hears "
                f"{shortest / SAMPLE_RATE:.3f} to {longest / SAMPLE_RATE:.3f} s; cut, pad or leave out the clip."
            )


@functools.cache
def whisper_window(device: torch.device) -> Tensor:
    """Periodic Hann window."""
    return torch.hann_window(WINDOW_SAMPLES, device=device)


@functools.cache
def whisper_filters(num_mels: int, device: torch.device) -> Tensor:
    """Slaney mel bank, each row twice: for the squares of a bin's real and of its imaginary part."""
    bank = mel_filter_bank(
        1 + WINDOW_SAMPLES // 2, num_mels, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(bank).to(device, torch.float32).repeat_interleave(2, 0)


@functools.cache
def kaldi_window(name: str, device: torch.device) -> Tensor:
    """Symmetric window by Kaldi's name."""
    hann_N = torch.hann_window(WINDOW_SAMPLES, periodic=False, device=device)
    return {"povey": hann_N.pow(0.85), "hanning": hann_N}[name]


@functools.cache
def kaldi_filters(num_mels: int, device: torch.device) -> Tensor:
    """HTK mel bank from 20 to 8000 Hz over 512-point spectra, rows twice as in `whisper_filters`."""
    bank_MF, _ = kaldi.get_mel_banks(num_mels, 512, float(SAMPLE_RATE), 20.0, 0.0, 100.0, -500.0, 1.0)
    return F.pad(bank_MF, (0, 1)).T.contiguous().to(device).repeat_interleave(2, 0)
