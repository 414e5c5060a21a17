"""The numpy front ends give what torch's give."""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from students.device.frontend import Fbank, LogMel
from teachers.ears.beats import BEATS_FBANK
from teachers.ears.eat import EAT_FBANK
from teachers.ears.frontend import WhisperLogMel, kaldi_filters

RANDOM = np.random.default_rng(0)
CLIPS = {
    "noise": RANDOM.normal(0, 0.1, 30_000).astype(np.float32),
    "longer than the ears": RANDOM.normal(0, 0.1, 60_000).astype(np.float32),
    "a third of a second": RANDOM.normal(0, 0.1, 5_334).astype(np.float32),
    "fading": (RANDOM.normal(0, 0.1, 20_000) * np.geomspace(1, 1e-4, 20_000)).astype(np.float32),
    "silence": np.zeros(8_000, np.float32),
}


def batch(waveform_N: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(waveform_N)[None], torch.tensor([len(waveform_N)])


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("clip", CLIPS)
def test_whispers_log_mel_in_numpy_is_torchs(clip, num_mels):
    bank = mel_filter_bank(201, num_mels, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney").astype(np.float32)
    expected = WhisperLogMel(num_mels, 300)(*batch(CLIPS[clip]))[0].numpy()
    np.testing.assert_allclose(LogMel(bank, 300)(CLIPS[clip]), expected, atol=1e-5)


@pytest.mark.parametrize("fbank", [BEATS_FBANK, EAT_FBANK], ids=["beats", "eat"])
@pytest.mark.parametrize("clip", CLIPS)
def test_kaldis_filter_bank_in_numpy_is_torchs(clip, fbank):
    """To 1e-5 in the mean; a bin with hardly any energy shows float32's own noise, there and here."""
    own = Fbank(kaldi_filters(128).numpy(), fbank.window, fbank.scale, fbank.mean, fbank.std, fbank.removes_mean)
    expected = fbank(*batch(CLIPS[clip]))[0][0].numpy()
    found = own(CLIPS[clip])
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 1e-5
    np.testing.assert_allclose(found, expected, atol=1e-3)
