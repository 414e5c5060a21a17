"""Encoders by name, and the one front end for two of them."""

import pytest
import torch
from test_beats import TINY as TINY_BEATS
from test_beats import make_official
from test_frontend import pad, synthesize

from teachers.ears.beats import BEATS_FBANK, BeatsEar
from teachers.ears.encoders import ENCODERS, build_encoder, load_encoder
from teachers.ears.frontend import WhisperLogMel
from teachers.ears.one_frontend import OneFrontEnd, measure_approximation

TINY = {
    "whisper": {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "max_source_positions": 200,
    },
    "beats": TINY_BEATS,
    "eat": {"embed_dim": 32, "depth": 1, "num_heads": 2, "ffn_dim": 32},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_keeps_the_contract(name):
    encoder = build_encoder(name, TINY[name])
    waveforms_BN, num_samples_B = pad([synthesize(40_000), synthesize(20_000)])
    frames_BRE, num_frames_B = encoder(waveforms_BN, num_samples_B)
    assert frames_BRE.shape[::2] == (2, encoder.width) and frames_BRE.dtype == torch.float32
    # 50 frames a second, give or take the patches that a clip's end cuts.
    assert (num_frames_B - num_samples_B / 320).abs().max() <= 8
    assert num_frames_B.max() <= frames_BRE.shape[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_hears_the_same_on_a_gpu(name):
    encoder = build_encoder(name, TINY[name]).requires_grad_(False)
    waveforms_BN, num_samples_B = pad([synthesize(40_000), synthesize(20_000)])
    frames_BRE, num_frames_B = encoder(waveforms_BN, num_samples_B)
    on_gpu, num_on_gpu = encoder.cuda()(waveforms_BN.cuda(), num_samples_B)
    assert (on_gpu.cpu() - frames_BRE).norm() < 1e-3 * frames_BRE.norm()
    assert num_on_gpu.tolist() == num_frames_B.tolist()


def test_an_encoder_loads_by_name(tmp_path):
    ear = BeatsEar.from_config(TINY_BEATS)
    torch.save(make_official(ear), tmp_path / "beats.pt")
    assert load_encoder("beats", tmp_path / "beats.pt", dtype=torch.float32).width == ear.width


def test_unknown_encoders_and_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="encoder is 'hubert', but there are whisper, beats, eat"):
        load_encoder("hubert", tmp_path, dtype=torch.float32)
    for name in ENCODERS:
        with pytest.raises(FileNotFoundError, match=f"nowhere is no {name} that can be read"):
            load_encoder(name, tmp_path / "nowhere", dtype=torch.float32)


def test_the_exact_front_end_is_both_front_ends():
    waveforms_BN, num_samples_B = pad([synthesize(40_000), synthesize(20_000)])
    whisper_mel, beats_mel, num_frames_B = OneFrontEnd(WhisperLogMel(80, 400))(waveforms_BN, num_samples_B)
    expected_mel, expected_frames = BEATS_FBANK(waveforms_BN, num_samples_B)
    assert torch.equal(whisper_mel, WhisperLogMel(80, 400)(waveforms_BN, num_samples_B))
    assert torch.equal(beats_mel, expected_mel) and torch.equal(num_frames_B, expected_frames)


def test_the_approximate_front_end_leaves_whisper_exact_and_its_error_is_measured_and_printed(capsys):
    torch.manual_seed(0)
    waveforms_BN, num_samples_B = pad([synthesize(40_000), synthesize(20_000)])
    figures = measure_approximation(
        WhisperLogMel(80, 400), BeatsEar.from_config(TINY_BEATS), waveforms_BN, num_samples_B
    )
    assert figures["whisper_mel_max_error"] == 0
    assert 0 < figures["beats_mel_mean_error"] < 0.1 and figures["beats_frames_cosine"] > 0.9
    printed = capsys.readouterr().err
    assert all(name in printed for name in figures)


@pytest.mark.parametrize("num_samples", [400, 64_000])
def test_the_approximate_front_end_gives_the_exact_ones_shapes(num_samples):
    batch = torch.zeros(2, num_samples), torch.tensor([num_samples, 400])
    exact = OneFrontEnd(WhisperLogMel(80, 400))(*batch)
    near = OneFrontEnd(WhisperLogMel(80, 400), approximate=True)(*batch)
    assert [tensor.shape for tensor in exact] == [tensor.shape for tensor in near]
