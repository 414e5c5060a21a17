"""BEATs against its authors' numbers, its batch rule, and what its loader refuses."""

import argparse
import json
import pickle
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from teachers.ears.beats import FIXED_CFG, MIN_SAMPLES, BeatsConfig, BeatsEar, bucket_positions, convert_weights
from teachers.files.weights import load_strictly_

TINY = {
    "embed_dim": 24,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_buckets": 32,
    "max_distance": 80,
}


@pytest.fixture
def ear() -> BeatsEar:
    torch.manual_seed(0)
    return BeatsEar.from_config(TINY).requires_grad_(False)


def make_official(ear: BeatsEar) -> dict:
    """What an official file of this model would hold."""
    weights = ear.state_dict()
    kernel = weights.pop("encoder.pos_conv.weight")
    weights["encoder.pos_conv.0.weight_g"] = kernel.norm(dim=(0, 1), keepdim=True)
    weights["encoder.pos_conv.0.weight_v"] = 0.5 * kernel
    weights["encoder.pos_conv.0.bias"] = weights.pop("encoder.pos_conv.bias")
    table = weights.pop("encoder.relative_attention_bias.weight")
    for number in range(len(ear.encoder.layers)):
        weights[f"encoder.layers.{number}.self_attn.relative_attention_bias.weight"] = table
    return {"cfg": {**TINY, **FIXED_CFG, "encoder_layerdrop": 0.05}, "model": weights}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def make_batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    waveforms_BN = torch.zeros(len(lengths), max(lengths))
    for waveform_N, length in zip(waveforms_BN, lengths):
        waveform_N[:length] = 0.1 * torch.randn(length, generator=generator)
    return waveforms_BN, torch.tensor(lengths)


def test_a_batch_row_equals_the_row_alone(ear):
    waveforms_BN, num_samples_B = make_batch(64_000, 40_000, MIN_SAMPLES)
    frames_BRE, num_frames_B = ear(waveforms_BN, num_samples_B)
    assert num_frames_B.tolist() == [8 * ((1 + (n - 400) // 160) // 16) for n in num_samples_B.tolist()]
    for row, num_samples in enumerate(num_samples_B.tolist()):
        alone, num_alone = ear(waveforms_BN[row : row + 1, :num_samples], num_samples_B[row : row + 1])
        assert alone.shape[1] == num_alone[0] == num_frames_B[row]
        assert relative(frames_BRE[row, : num_alone[0]], alone[0]) < 2e-6
        assert (frames_BRE[row, num_alone[0] :] == 0).all()


def test_clips_shorter_than_a_patch_or_longer_than_30_s_are_refused(ear):
    for num_samples in (MIN_SAMPLES - 1, 480_001):
        with pytest.raises(ValueError, match=f"is {num_samples} samples .* BEATs hears 2800 to 480000"):
            ear(torch.zeros(1, num_samples), torch.tensor([num_samples]))


def test_it_stays_in_eval_mode_and_hears_the_same_while_a_model_trains(ear):
    batch = make_batch(16_000)
    expected = ear(*batch)[0]
    model = torch.nn.ModuleList([ear]).train()
    assert not any(module.training for module in ear.modules()) and model.training
    assert torch.equal(ear(*batch)[0], expected)


def test_bfloat16_stays_within_two_hundredths(ear):
    batch = make_batch(32_000, 20_000)
    expected = ear(*batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(ear(*batch)[0], expected) < 2e-2
    assert relative(ear.to(torch.bfloat16)(*batch)[0], expected) < 2e-2


def test_float16_autocast_gives_finite_frames(ear):
    with torch.autocast("cpu", dtype=torch.float16):
        assert ear(*make_batch(32_000))[0].isfinite().all()


def test_attention_equals_the_materialized_formula(ear):
    attention = ear.encoder.layers[0].self_attn
    frames_BRE = torch.randn(2, 40, ear.width)
    bias_HRR = ear.encoder.position_bias(40)
    is_padding_BR = torch.arange(40) >= torch.tensor([[40], [24]])
    query, key, value = (
        project(frames_BRE).view(2, 40, 4, 8).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    first, second = attention.grep_linear(query).view(2, 4, 40, 2, 4).sum(-1).sigmoid().chunk(2, -1)
    gate = first * (second * attention.grep_a - 1.0) + 2.0
    scores = query @ key.transpose(2, 3) / 8**0.5 + gate * bias_HRR
    weights = scores.masked_fill(is_padding_BR[:, None, None], -torch.inf).softmax(-1)
    expected = attention.out_proj((weights @ value).transpose(1, 2).reshape(2, 40, -1))
    assert relative(attention(frames_BRE, bias_HRR, is_padding_BR), expected) < 2e-6


def test_position_bias_depends_on_key_minus_query_alone(ear):
    bias_HRR = ear.encoder.position_bias(12)
    table = ear.encoder.relative_attention_bias.weight
    for query, key in [(0, 11), (11, 0), (5, 5), (3, 9)]:
        bucket = bucket_positions(torch.tensor(key - query), 32, 80)
        assert torch.equal(bias_HRR[:, query, key], table[bucket])


def test_an_official_file_loads_back_to_the_same_frames(ear, tmp_path):
    torch.save(make_official(ear), tmp_path / "beats.pt")
    loaded = BeatsEar.from_pretrained(tmp_path / "beats.pt").requires_grad_(False)
    batch = make_batch(20_000)
    assert relative(loaded(*batch)[0], ear(*batch)[0]) < 1e-6


@pytest.mark.parametrize("kind", [dict, argparse.Namespace, types.SimpleNamespace])
def test_a_file_that_was_saved_again_with_all_fields_of_its_config_loads(ear, tmp_path, kind):
    content = make_official(ear)
    every = {"predictor_class": 527, "predictor_dropout": 0.1, "finetuned_model": False}
    cfg = {**every, **content["cfg"]}
    if ear.predictor is not None:
        cfg["finetuned_model"] = True
    torch.save({"cfg": kind(**cfg), "model": content["model"]}, tmp_path / "again.pt")
    again = BeatsEar.from_pretrained(tmp_path / "again.pt")
    assert again.config == ear.config
    waveforms_BN, num_samples_B = make_batch(9_000)
    torch.testing.assert_close(again(waveforms_BN, num_samples_B)[0], ear(waveforms_BN, num_samples_B)[0])


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_file_that_holds_code_is_refused_and_its_code_not_run(ear, tmp_path):
    torch.save({**make_official(ear), "extra": Bomb(tmp_path / "ran")}, tmp_path / "beats.pt")
    with pytest.raises(ValueError, match=r"beats.pt holds Python objects .* only tensors"):
        BeatsEar.from_pretrained(tmp_path / "beats.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match=r"plain.pt"):
        BeatsEar.from_pretrained(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(ear, tmp_path, kept):
    torch.save(make_official(ear), tmp_path / "beats.pt")
    content = (tmp_path / "beats.pt").read_bytes()
    (tmp_path / "beats.pt").write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"beats.pt .*(download|take the file)"):
        BeatsEar.from_pretrained(tmp_path / "beats.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("cfg"), "holds model, but a BEATs file holds cfg and model"),
        (lambda file: file["cfg"].pop("max_distance"), "cfg without max_distance"),
        (
            lambda file: file["cfg"].update(layer_norm_first=True),
            "layer_norm_first True, but every official BEATs has False",
        ),
        (lambda file: file["cfg"].update(encoder_layers=3), "missing .*encoder.layers.2"),
        (lambda file: file["model"].update(new=torch.zeros(1)), r"1 unknown \(new\)"),
        (lambda file: file["cfg"].update(encoder_ffn_embed_dim=64), r"misshapen .*\(48, 32\) instead of \(64, 32\)"),
        (lambda file: file["model"].pop("encoder.pos_conv.0.weight_g"), "no weight-normed"),
        (
            lambda file: file["model"].update(
                {"encoder.layers.1.self_attn.relative_attention_bias.weight": torch.zeros(32, 4)}
            ),
            "all layers of BEATs share one",
        ),
    ],
)
def test_a_file_of_another_architecture_is_refused(ear, tmp_path, change, message):
    file = make_official(ear)
    change(file)
    torch.save(file, tmp_path / "beats.pt")
    with pytest.raises(ValueError, match=message):
        BeatsEar.from_pretrained(tmp_path / "beats.pt")


def test_the_official_sizes_have_90_7_million_parameters():
    with torch.device("meta"):
        official = BeatsEar.from_config(BeatsConfig(predictor_class=527))
    assert sum(parameter.numel() for parameter in official.parameters()) == 90_716_927


@pytest.fixture(scope="module")
def recorded(shared) -> dict[str, torch.Tensor]:
    return load_file(shared / "parity/beats/tiny_beats_io.safetensors")


@pytest.fixture(scope="module")
def finetuned(shared) -> BeatsEar:
    return BeatsEar.from_pretrained(shared / "parity/beats/tiny_beats_finetuned.pt").requires_grad_(False)


@pytest.mark.shared
def test_every_stage_equals_the_recorded_original(recorded, finetuned):
    stages = {}
    watched = {f"layer{n}": layer for n, layer in enumerate(finetuned.encoder.layers)}
    for name, layer in watched.items():
        layer.register_forward_hook(lambda _, __, output, name=name: stages.update({name: output}))
    finetuned.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: stages.update(enc_in=inputs[0]))
    waveforms_BN = recorded["pcm"][:1].float() / 32768
    stages["features"], num_frames_B = finetuned(waveforms_BN, recorded["lengths"][:1])
    stages["patch_ln"] = finetuned.embed(recorded["single0.fbank"])
    stages["lprobs"] = finetuned.classify(stages["features"], num_frames_B)
    for name in ["patch_ln", "enc_in", "layer0", "layer1", "layer2", "features", "lprobs"]:
        assert relative(stages[name], recorded[f"single0.{name}"]) < 1e-5, name


@pytest.mark.shared
def test_a_padded_batch_equals_the_recorded_original_with_the_exact_mask(shared, recorded):
    pretrained = BeatsEar.from_pretrained(shared / "parity/beats/tiny_beats_pretrained.pt").requires_grad_(False)
    frames_BRE, num_frames_B = pretrained(recorded["pcm"].float() / 32768, recorded["lengths"])
    assert num_frames_B.tolist() == (~recorded["pad.exact_mask_tokens"]).sum(1).tolist()
    assert relative(frames_BRE, recorded["pad.features_exact_mask"]) < 1e-5


@pytest.mark.shared
def test_position_buckets_equal_the_recorded_original(shared):
    recorded = load_file(shared / "parity/beats/rel_pos_buckets.safetensors")
    assert torch.equal(bucket_positions(recorded["rel"], 320, 800), recorded["bucket"])


@pytest.mark.shared
def test_the_keys_and_shapes_of_the_official_size_load(shared):
    official = json.loads((shared / "parity/beats/base_beats_keys.json").read_text())
    # One number behind every tensor: its shape costs no memory.
    weights = {name: torch.ones(1).expand(shape) for name, shape in official["shapes"].items()}
    with torch.device("meta"):
        ear = BeatsEar.from_config(BeatsConfig(predictor_class=527))
    load_strictly_(ear, convert_weights(weights, "base"), "base")
    assert all(not tensor.is_meta for tensor in ear.state_dict().values())
