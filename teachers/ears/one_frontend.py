"""One front end for Whisper and BEATs: both feature sets of a batch from one call.

The exact way computes each with its own frames and Fourier transform, as the encoders were trained: Whisper's frames
are centered, 400 points and Hann; Kaldi's begin with the clip, are emphasized, 512 points and Povey. The approximate
way takes both from Whisper's power spectrum: Whisper's features stay exact, BEATs' do not. It is never a default, and
`measure_approximation` says what it costs on given audio and encoders.

Shapes: B batch, N audio samples, X mel frames, M mel bins, F real and imaginary parts of a spectrum's bins.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.sample import SAMPLE_RATE
from shards.status import print_status
from teachers.ears.beats import BEATS_FBANK, BeatsEar
from teachers.ears.frontend import (
    KALDI_FFT,
    WINDOW_SAMPLES,
    KaldiFbank,
    MelBank,
    WhisperLogMel,
    count_frames,
    group_rows,
    kaldi_filters,
    kaldi_window,
    square_spectra,
    whisper_bank,
    whisper_window,
    window_frames,
)


@dataclass(frozen=True)
class OneFrontEnd:
    """Whisper's log-mel and BEATs' filter bank features of one batch of waveforms."""

    whisper: WhisperLogMel
    fbank: KaldiFbank = BEATS_FBANK
    approximate: bool = False  # take both from one power spectrum; see `measure_approximation`

    def __call__(self, waveforms_BN: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute both.

        Args:
            waveforms_BN: 16 kHz in [-1, 1], padded with zeros.
            num_samples_B: length of each row.

        Returns:
            Whisper's mel_BMX, BEATs' mel_BXM, and how many of BEATs' mel frames each row has.
        """
        if self.approximate:
            return self._share_spectrum(waveforms_BN, num_samples_B)
        return self.whisper(waveforms_BN, num_samples_B), *self.fbank(waveforms_BN, num_samples_B)

    @torch.no_grad()
    def _share_spectrum(self, waveforms_BN: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = waveforms_BN.device
        batch_size, num_samples = waveforms_BN.shape
        bank, shared_bank = whisper_bank(self.whisper.num_mels, device), build_shared_bank(self.fbank, device)
        whisper_mel = torch.empty(batch_size, self.whisper.num_mels, self.whisper.num_frames, device=device)
        # Kaldi's frame x begins 2.5 ms after Whisper's frame x + 1: one frame more, and the first is dropped.
        fbank_mel = self.fbank.build_silence(batch_size, 1 + count_frames(num_samples), device)
        with torch.autocast(device.type, enabled=False):
            for rows, row_samples in group_rows(waveforms_BN, num_samples_B):
                frames_BXN = self.whisper.frame(waveforms_BN[rows, :row_samples])
                heard_mel = fbank_mel[rows, : 1 + count_frames(row_samples)]
                for place, squares_BXF in square_spectra(frames_BXN, WINDOW_SAMPLES, window_frames):
                    self.whisper.write_logs_(whisper_mel[rows, :, place], bank(squares_BXF))
                    heard_block = heard_mel[:, place]
                    shared_BXM = self.fbank.normalize_(shared_bank(squares_BXF))
                    heard_block.copy_(shared_BXM[:, : heard_block.shape[1]])
                self.whisper.finish_(whisper_mel[rows], frames_BXN.shape[1])
        return whisper_mel, *self.fbank.mask_(fbank_mel[:, 1:], num_samples_B)


@functools.cache
def build_shared_bank(fbank: KaldiFbank, device: torch.device) -> MelBank:
    """Kaldi's mel bank over Whisper's 400-point power spectra.

    Kaldi's bins are interpolated between Whisper's; its pre-emphasis, the energies of the windows and the scale are
    factors of the power. The mean that Kaldi removes is taken for the 0 Hz bin alone.
    """
    num_bins = 1 + WINDOW_SAMPLES // 2
    kaldi_hz = torch.arange(1 + KALDI_FFT // 2) * (SAMPLE_RATE / KALDI_FFT)
    place = kaldi_hz / (SAMPLE_RATE / WINDOW_SAMPLES)
    distance = (place[None] - torch.arange(num_bins)[:, None]).abs()
    interpolation = (1.0 - distance).clamp(min=0.0)
    emphasis = 1.0 + 0.97**2 - 2 * 0.97 * torch.cos(2 * torch.pi * kaldi_hz / SAMPLE_RATE)
    cpu = torch.device("cpu")
    energy = kaldi_window(fbank.window, cpu).square().sum() / whisper_window(cpu).square().sum() * fbank.scale**2
    filters = interpolation @ (emphasis[:, None] * kaldi_filters(fbank.num_mels)) * energy
    filters[0] = 0.0
    return MelBank.from_filters(filters.to(device))


@torch.no_grad()
def measure_approximation(whisper: WhisperLogMel, beats: BeatsEar, waveforms_BN: Tensor, num_samples_B: Tensor) -> dict:
    """Measure and print what one shared power spectrum costs on this audio: BEATs' features and frames, Whisper's too.

    Returns:
        Absolute errors of the features beside their standard deviation, and relative errors (norm of the difference by
        norm of the exact) and mean cosine of BEATs' frames, over what each row holds.
    """
    exact_whisper, exact_mel, num_mel_frames_B = OneFrontEnd(whisper)(waveforms_BN, num_samples_B)
    near_whisper, near_mel, _ = OneFrontEnd(whisper, approximate=True)(waveforms_BN, num_samples_B)
    exact_frames, num_frames_B = beats.encode(exact_mel, num_mel_frames_B)
    near_frames, _ = beats.encode(near_mel, num_mel_frames_B)
    is_heard = torch.arange(exact_frames.shape[1], device=num_frames_B.device) < num_frames_B[:, None]
    is_heard_mel = torch.arange(exact_mel.shape[1], device=num_frames_B.device) < num_mel_frames_B[:, None]
    exact, near = exact_frames[is_heard].float(), near_frames[is_heard].float()
    mel_error = (near_mel - exact_mel)[is_heard_mel].abs()
    figures = {
        "whisper_mel_max_error": float((near_whisper - exact_whisper).abs().max()),
        "beats_mel_mean_error": float(mel_error.mean()),
        "beats_mel_max_error": float(mel_error.max()),
        "beats_mel_std": float(exact_mel[is_heard_mel].std()),
        "beats_frames_relative_error": float((near - exact).norm() / exact.norm()),
        "beats_frames_cosine": float(torch.cosine_similarity(near, exact, dim=-1).mean()),
    }
    print_status(
        "shared power spectrum against exact features: " + ", ".join(f"{k} {v:.3g}" for k, v in figures.items())
    )
    return figures
