"""The Whisper ear against transformers' own model, its lengths, and what its loader refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

from teachers.ears.whisper import WhisperEar

TINY = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "vocab_size": 60,
    "num_mel_bins": 80,
    "max_source_positions": 150,  # 3 s
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@pytest.fixture
def ear() -> WhisperEar:
    torch.manual_seed(0)
    return WhisperEar.from_config({**TINY, "encoder_layerdrop": 0.9}).requires_grad_(False)


def make_batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    waveforms_BN = torch.zeros(len(lengths), max(lengths))
    for waveform_N, length in zip(waveforms_BN, lengths):
        waveform_N[:length] = 0.1 * torch.randn(length, generator=generator)
    return waveforms_BN, torch.tensor(lengths)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("kind", [WhisperModel, WhisperForConditionalGeneration])
def test_it_equals_the_encoder_of_a_saved_transformers_model(tmp_path, kind, num_mels):
    model = kind(WhisperConfig(**{**TINY, "num_mel_bins": num_mels})).eval()
    model.save_pretrained(tmp_path)
    ear = WhisperEar.from_pretrained(tmp_path, num_mels=num_mels)
    waveforms_BN, num_samples_B = make_batch(40_000, 20_001)
    clips = [waveform[:n].numpy() for waveform, n in zip(waveforms_BN, num_samples_B)]
    extractor = WhisperFeatureExtractor(num_mels, chunk_length=3)
    features = extractor(clips, sampling_rate=16_000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        frames_BRE, num_frames_B = ear(waveforms_BN, num_samples_B)
        torch.testing.assert_close(frames_BRE, model.get_encoder()(features).last_hidden_state, atol=1e-5, rtol=0)
    assert frames_BRE.shape == (2, 150, ear.width) and num_frames_B.tolist() == [125, 63]


def test_a_model_in_several_files_loads_its_encoder(tmp_path):
    model = WhisperModel(WhisperConfig(**TINY)).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    ear = WhisperEar.from_pretrained(tmp_path)
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(ear.encoder.state_dict()[name], tensor)


def test_a_batch_row_equals_the_row_alone(ear):
    waveforms_BN, num_samples_B = make_batch(48_000, 30_000, 100)
    frames_BRE, num_frames_B = ear(waveforms_BN, num_samples_B)
    assert num_frames_B.tolist() == [150, 94, 1]
    for row, num_samples in enumerate(num_samples_B.tolist()):
        alone_BRE, _ = ear(waveforms_BN[row : row + 1, :num_samples], num_samples_B[row : row + 1])
        torch.testing.assert_close(frames_BRE[row], alone_BRE[0], atol=1e-5, rtol=0)


def test_layer_drop_never_acts_while_a_model_trains(ear):
    batch = make_batch(20_000)
    expected = ear(*batch)[0]
    model = torch.nn.ModuleList([ear]).train()
    assert model.training and not any(module.training for module in ear.modules())
    assert all(torch.equal(ear(*batch)[0], expected) for _ in range(5))


def test_bfloat16_stays_within_two_hundredths(ear):
    batch = make_batch(32_000, 20_000)
    expected = ear(*batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ear(*batch)[0] - expected).norm() < 2e-2 * expected.norm()
    assert (ear.to(torch.bfloat16)(*batch)[0] - expected).norm() < 2e-2 * expected.norm()


def test_audio_past_the_encoders_length_is_refused(ear):
    with pytest.raises(
        ValueError, match=r"waveforms_BN\[1\] is 48001 samples \(3.000 s\), but this Whisper hears 1 to 48000"
    ):
        ear(torch.zeros(2, 48_001), torch.tensor([100, 48_001]))
    with pytest.raises(ValueError, match=r"waveforms_BN\[0\] is 0 samples"):
        ear(torch.zeros(1, 100), torch.tensor([0]))


def test_padding_past_the_encoders_length_is_cut(ear):
    waveforms_BN, num_samples_B = make_batch(30_000)
    padded_BN = torch.nn.functional.pad(waveforms_BN, (0, 30_000))
    assert torch.equal(ear(padded_BN, num_samples_B)[0], ear(waveforms_BN, num_samples_B)[0])


@pytest.fixture
def folder(tmp_path):
    WhisperModel(WhisperConfig(**TINY)).save_pretrained(tmp_path)
    return tmp_path


def test_another_number_of_mels_is_refused(folder):
    with pytest.raises(ValueError, match="num_mel_bins 80, but num_mels is 128"):
        WhisperEar.from_pretrained(folder, num_mels=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type llama, but whisper is needed"),
        ({"num_mel_bins": 128}, r"misshapen .*conv1.weight \(32, 80, 3\) instead of \(32, 128, 3\)"),
        ({"encoder_layers": 3}, r"missing \(layers.2"),
        ({"encoder_layers": 1}, r"unknown \(layers.1"),
    ],
)
def test_a_config_of_another_model_is_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        WhisperEar.from_pretrained(folder)


def test_damaged_missing_or_foreign_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        WhisperEar.from_pretrained(folder)
    save_file({"weight": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="holds 0 tensors"):
        WhisperEar.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors, but weights are read from safetensors only"):
        WhisperEar.from_pretrained(folder)


def test_the_encoder_of_large_v2_has_636_8_million_parameters():
    with torch.device("meta"):
        ear = WhisperEar.from_config(
            {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
        )
    assert sum(parameter.numel() for parameter in ear.parameters()) == 636_784_640


@pytest.mark.shared
def test_the_recorded_whisper_folder_loads_every_encoder_tensor(shared):
    folder = shared / "parity/salmonn/tiny_whisper"
    ear = WhisperEar.from_pretrained(folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("model.encoder."):
            assert torch.equal(ear.encoder.state_dict()[name.removeprefix("model.encoder.")], tensor)
