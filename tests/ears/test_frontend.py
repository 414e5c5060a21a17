"""Log-mel features against transformers' extractor, torchaudio's Kaldi fbank and the original encoders' own numbers."""

import pytest
import torch
import torchaudio.compliance.kaldi as kaldi
from safetensors.torch import load_file
from transformers import WhisperFeatureExtractor

from teachers.ears.beats import BEATS_FBANK
from teachers.ears.eat import EAT_FBANK
from teachers.ears.frontend import WhisperLogMel, check_lengths


def synthesize(num_samples: int, seed: int = 0) -> torch.Tensor:
    """A gliding tone that fades into faint noise: loud and near-silent frames, float32 in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(num_samples) / 16_000
    tone = torch.sin(2 * torch.pi * (200 * time + 300 * time**2)) * torch.exp(-1.5 * time)
    return 0.5 * tone + 1e-3 * torch.randn(num_samples, generator=generator)


def pad(clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor([len(clip) for clip in clips])


def extract(clips: list[torch.Tensor], num_mels: int, seconds: int) -> torch.Tensor:
    extractor = WhisperFeatureExtractor(num_mels, chunk_length=seconds)
    return extractor([clip.numpy() for clip in clips], sampling_rate=16_000, return_tensors="pt")["input_features"]


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("num_samples", [1, 399, 16_000, 47_900, 48_000, 50_000])
def test_whisper_log_mel_equals_the_extractor_at_any_length(num_mels, num_samples):
    clip = synthesize(num_samples)
    mel_BMX = WhisperLogMel(num_mels, 300)(*pad([clip]))
    torch.testing.assert_close(mel_BMX, extract([clip], num_mels, 3), atol=1e-6, rtol=0)


def test_whisper_log_mel_of_a_batch_equals_the_extractor_in_blocks():
    clips = [synthesize(length, seed) for seed, length in enumerate([480_000, 90_001, 5_000])]
    torch.testing.assert_close(WhisperLogMel(80, 3000)(*pad(clips)), extract(clips, 80, 30), atol=1e-6, rtol=0)


def test_whisper_log_mel_of_silence_equals_the_extractor():
    silence = torch.zeros(8_000)
    torch.testing.assert_close(WhisperLogMel(80, 300)(*pad([silence])), extract([silence], 80, 3), atol=0, rtol=0)


def kaldi_fbank(clip: torch.Tensor, front_end) -> torch.Tensor:
    clip = clip - clip.mean() if front_end.removes_mean else clip
    mel = kaldi.fbank(clip[None] * front_end.scale, num_mel_bins=128, window_type=front_end.window)
    return (mel - front_end.mean) / front_end.std


@pytest.mark.parametrize("front_end", [BEATS_FBANK, EAT_FBANK], ids=["beats", "eat"])
@pytest.mark.parametrize("num_samples", [400, 559, 560, 47_999])
def test_fbank_equals_torchaudio_at_any_length(front_end, num_samples):
    clip = synthesize(num_samples) + 0.1
    mel_BXM, num_frames_B = front_end(clip[None], torch.tensor([num_samples]))
    expected_XM = kaldi_fbank(clip, front_end)
    assert num_frames_B.tolist() == [len(expected_XM)]
    torch.testing.assert_close(mel_BXM[0], expected_XM, atol=1e-3, rtol=0)
    assert (mel_BXM[0] - expected_XM).abs().mean() < 1e-5


@pytest.mark.parametrize("front_end", [BEATS_FBANK, EAT_FBANK], ids=["beats", "eat"])
def test_fbank_of_a_batch_row_equals_the_row_alone(front_end):
    clips = [synthesize(length, seed) for seed, length in enumerate([400_000, 30_007, 1_000])]
    mel_BXM, num_frames_B = front_end(*pad(clips))
    for mel_XM, num_frames, clip in zip(mel_BXM, num_frames_B, clips):
        alone_XM = front_end(clip[None], torch.tensor([len(clip)]))[0][0]
        torch.testing.assert_close(mel_XM[:num_frames], alone_XM, atol=1e-5, rtol=0)
        assert (mel_XM[num_frames:] == torch.tensor(-front_end.mean / front_end.std)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_are_the_same_inside_autocast(dtype):
    waveforms_BN, num_samples_B = pad([synthesize(32_000) * 1.9])
    with torch.autocast("cpu", dtype=dtype):
        inside = BEATS_FBANK(waveforms_BN, num_samples_B)[0], WhisperLogMel(80, 300)(waveforms_BN, num_samples_B)
    outside = BEATS_FBANK(waveforms_BN, num_samples_B)[0], WhisperLogMel(80, 300)(waveforms_BN, num_samples_B)
    assert all(feature.dtype == torch.float32 and feature.isfinite().all() for feature in inside)
    assert all(torch.equal(*pair) for pair in zip(inside, outside))


@pytest.mark.gpu
def test_features_on_a_gpu_equal_those_on_cpu():
    batch = pad([synthesize(length, seed) for seed, length in enumerate([160_000, 30_007, 1_000])])
    on_gpu = [tensor.cuda() for tensor in batch]
    whisper = WhisperLogMel(128, 3000)
    torch.testing.assert_close(whisper(*on_gpu).cpu(), whisper(*batch), atol=1e-4, rtol=0)
    for front_end in (BEATS_FBANK, EAT_FBANK):
        mel_BXM, num_frames_B = front_end(*on_gpu)
        torch.testing.assert_close(mel_BXM.cpu(), front_end(*batch)[0], atol=1e-3, rtol=0)
        assert num_frames_B.tolist() == front_end(*batch)[1].tolist()


def test_lengths_outside_what_an_ear_hears_are_refused_with_row_and_limit():
    check_lengths(torch.tensor([400, 16_000]), 400, 16_000, "EAT")
    with pytest.raises(ValueError, match=r"waveforms_BN\[1\] is 16001 samples .* EAT hears 400 to 16000"):
        check_lengths(torch.tensor([400, 16_001]), 400, 16_000, "EAT")
    with pytest.raises(ValueError, match=r"waveforms_BN\[0\] is 399 samples"):
        check_lengths(torch.tensor([399]), 400, 16_000, "EAT")


@pytest.fixture(scope="module")
def recorded(shared) -> dict[str, torch.Tensor]:
    return load_file(shared / "parity/preprocess/preprocess.safetensors")


@pytest.mark.shared
@pytest.mark.parametrize("case", ["gunshots.whisper80", "gunshots.whisper128", "jfk.whisper128"])
def test_whisper_log_mel_equals_the_recorded_features(recorded, case):
    clip, num_mels = recorded[case.split(".")[0] + ".pcm"].float() / 32768, len(recorded[case])
    mel_MX, expected_MX = WhisperLogMel(num_mels, 3000)(*pad([clip]))[0], recorded[case]
    num_heard = expected_MX.shape[1]
    # MKL's Fourier transform rounds differently on AVX-512 than where the features were recorded: there transformers'
    # own extractor is up to 2.3e-5 away from its record, and that much more is allowed.
    rounding = (extract([clip], num_mels, 30)[0, :, :num_heard] - expected_MX).abs().max()
    assert (mel_MX[:, :num_heard] - expected_MX).abs().max() <= max(1e-5, float(rounding) + 1e-6)
    assert (mel_MX[:, :num_heard] - expected_MX).abs().mean() < 1e-6
    torch.testing.assert_close(
        mel_MX[:, num_heard:], expected_MX[:, -1:].expand(-1, 3000 - num_heard), atol=1e-5, rtol=0
    )


@pytest.mark.shared
@pytest.mark.parametrize("case", ["gunshots.beats_fbank", "jfk.beats_fbank", "gunshots.eat_mel"])
def test_fbank_equals_the_recorded_features(recorded, case):
    clip = recorded[case.split(".")[0] + ".pcm"].float()[None] / 32768
    front_end = EAT_FBANK if case.endswith("eat_mel") else BEATS_FBANK
    mel_BXM, _ = front_end(clip, torch.tensor([clip.shape[1]]))
    # EAT's record ends with two frames of padding.
    expected_XM = recorded[case][: mel_BXM.shape[1]]
    assert (mel_BXM[0] - expected_XM).abs().max() < 1e-3
    assert (mel_BXM[0] - expected_XM).abs().mean() < 1e-5
