"""EAT against its authors' numbers in both file formats, its batch rule, and what its loader refuses."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from teachers.ears.eat import EAT_FBANK, EatConfig, EatEar, build_positions, convert_weights
from teachers.files.weights import load_strictly_

TINY = EatConfig(embed_dim=32, depth=2, num_heads=4, ffn_dim=64)
IMAGE = "modality_encoders.IMAGE."


@pytest.fixture
def ear() -> EatEar:
    torch.manual_seed(0)
    return EatEar.from_config(TINY).requires_grad_(False)


@pytest.fixture
def tagger() -> EatEar:
    torch.manual_seed(0)
    return EatEar.from_config({**vars(TINY), "num_classes": 5}).requires_grad_(False)


def name_officially(ear: EatEar, prefix: str, image: str, norm: str) -> dict[str, torch.Tensor]:
    """The tensors under the names of an official file, with positions for 10 s alone."""
    weights = {}
    for name, tensor in ear.state_dict().items():
        for layer in ("qkv", "proj"):
            name = name.replace(f".{layer}.", f".attn.{layer}.")
        for layer in ("fc1", "fc2"):
            name = name.replace(f".{layer}.", f".mlp.{layer}.")
        name = name.replace("patch_embedding.", f"{image}local_encoder.proj.").replace("pre_norm.", norm)
        name = name.replace("extra_tokens", f"{image}extra_tokens")
        if name == "positions":
            name, tensor = f"{image}fixed_positional_encoder.positions", tensor[None, :512].clone()
        weights[prefix + name] = tensor
    return weights


def name_as_fairseq(ear: EatEar, prefix: str = "") -> dict[str, torch.Tensor]:
    return name_officially(ear, prefix, IMAGE, f"{IMAGE}context_encoder.norm.")


def save_hugging_face(ear: EatEar, folder, **changes) -> None:
    save_file(name_officially(ear, "model.", "", "pre_norm."), folder / "model.safetensors")
    config = {"model_type": "eat", "num_heads": 4, "patch_size": 16, "layer_norm_first": False, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def make_batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    waveforms_BN = torch.zeros(len(lengths), max(lengths))
    for waveform_N, length in zip(waveforms_BN, lengths):
        waveform_N[:length] = 0.1 * torch.randn(length, generator=generator) + 0.05
    return waveforms_BN, torch.tensor(lengths)


def test_a_batch_row_equals_the_row_alone(ear):
    waveforms_BN, num_samples_B = make_batch(50_000, 30_000, 400)
    frames_BRE, num_frames_B = ear(waveforms_BN, num_samples_B)
    assert num_frames_B.tolist() == [8 * -(-(1 + (n - 400) // 160) // 16) for n in num_samples_B.tolist()]
    for row, num_samples in enumerate(num_samples_B.tolist()):
        alone, num_alone = ear(waveforms_BN[row : row + 1, :num_samples], num_samples_B[row : row + 1])
        assert alone.shape[1] == num_alone[0] == num_frames_B[row]
        assert relative(frames_BRE[row, : num_alone[0]], alone[0]) < 2e-6
        assert (frames_BRE[row, num_alone[0] :] == 0).all()


def test_30_s_give_1504_frames_and_more_is_refused(ear):
    frames_BRE, num_frames_B = ear(*make_batch(480_000))
    assert frames_BRE.shape == (1, 1504, 32) and num_frames_B.tolist() == [1504]
    for num_samples in (399, 480_001):
        with pytest.raises(ValueError, match=f"is {num_samples} samples .* EAT hears 400 to 480000"):
            ear(torch.zeros(1, num_samples), torch.tensor([num_samples]))


def test_a_block_equals_transformers_bert_layer(ear):
    block = ear.blocks[0]
    config = BertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=64, layer_norm_eps=1e-6, attn_implementation="eager"
    )
    bert = BertLayer(config).eval()
    attention = bert.attention
    for layer, weight, bias in zip(
        (attention.self.query, attention.self.key, attention.self.value),
        block.qkv.weight.chunk(3),
        block.qkv.bias.chunk(3),
    ):
        layer.load_state_dict({"weight": weight, "bias": bias})
    attention.output.dense.load_state_dict(block.proj.state_dict())
    attention.output.LayerNorm.load_state_dict(block.norm1.state_dict())
    bert.intermediate.dense.load_state_dict(block.fc1.state_dict())
    bert.output.dense.load_state_dict(block.fc2.state_dict())
    bert.output.LayerNorm.load_state_dict(block.norm2.state_dict())
    tokens_BRE = torch.randn(2, 9, 32)
    expected = bert(tokens_BRE)
    expected = expected[0] if isinstance(expected, tuple) else expected
    with torch.no_grad():
        assert relative(block(tokens_BRE, torch.ones(2, 9, dtype=torch.bool)), expected) < 2e-6


def test_it_stays_in_eval_mode_while_a_model_trains(ear):
    model = torch.nn.ModuleList([ear]).train()
    assert not any(module.training for module in ear.modules()) and model.training


def test_bfloat16_stays_within_two_hundredths(ear):
    batch = make_batch(32_000, 20_000)
    expected = ear(*batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(ear(*batch)[0], expected) < 2e-2
    assert relative(ear.to(torch.bfloat16)(*batch)[0], expected) < 2e-2


def test_a_fairseq_file_loads_the_student_and_drops_the_teacher(ear, tmp_path):
    weights = {
        **name_as_fairseq(ear),
        f"{IMAGE}decoder.proj.weight": torch.zeros(3),
        "_ema": {"blocks.0": torch.ones(2)},
    }
    torch.save({"args": None, "cfg": {"model": {"num_heads": 4}}, "model": weights}, tmp_path / "eat.pt")
    loaded = EatEar.from_pretrained(tmp_path / "eat.pt")
    batch = make_batch(300_000)  # past the positions that the file stores
    assert torch.equal(loaded(*batch)[0], ear(*batch)[0])


@pytest.mark.parametrize("prefixed", ["model.", "model.modality_encoders.", "model.blocks."])
def test_a_fine_tuned_fairseq_file_loads_with_its_head(tagger, tmp_path, prefixed):
    cfg = {"model": {"num_classes": 5, "pretrained_model_args": {"task": None, "model": {"num_heads": 4}}}}
    # Whether a file's head is named with `model.` before it varies.
    weights = {
        name if name.startswith(prefixed) else name.removeprefix("model."): tensor
        for name, tensor in name_as_fairseq(tagger, "model.").items()
    }
    torch.save({"cfg": cfg, "model": weights}, tmp_path / "eat.pt")
    loaded = EatEar.from_pretrained(tmp_path / "eat.pt")
    mel_BXM, num_frames_B = EAT_FBANK(*make_batch(16_000))
    tokens_BRE = tagger.encode(mel_BXM, num_frames_B)[0]
    assert torch.equal(loaded.classify(loaded.encode(mel_BXM, num_frames_B)[0]), tagger.classify(tokens_BRE))
    expected = (F.layer_norm(tokens_BRE[:, 0], (32,), eps=1e-6) @ tagger.head.weight.T + tagger.head.bias).sigmoid()
    torch.testing.assert_close(tagger.classify(tokens_BRE), expected)


def test_a_fine_tuned_hugging_face_folder_loads_with_its_head(tagger, tmp_path):
    save_hugging_face(tagger, tmp_path)
    loaded = EatEar.from_pretrained(tmp_path)
    assert loaded.config.num_classes == 5 and loaded.fc_norm.eps == 1e-5
    assert torch.equal(loaded(*make_batch(16_000))[0], tagger(*make_batch(16_000))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type bert, but eat is needed"),
        ({"layer_norm_first": True}, "layer_norm_first True, but every EAT has False"),
        ({"patch_size": 8}, "patch_size 8, but every EAT has 16"),
    ],
)
def test_a_folder_of_another_architecture_is_refused(ear, tmp_path, change, message):
    save_hugging_face(ear, tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        EatEar.from_pretrained(tmp_path)


def test_missing_tensors_and_damaged_files_are_refused(ear, tmp_path):
    weights = name_as_fairseq(ear)
    weights.pop("blocks.1.attn.proj.bias")
    torch.save({"cfg": {"model": {"num_heads": 4}}, "model": weights}, tmp_path / "eat.pt")
    with pytest.raises(ValueError, match=r"1 missing \(blocks.1.proj.bias\)"):
        EatEar.from_pretrained(tmp_path / "eat.pt")
    torch.save({"cfg": {"model": {"num_heads": 4}}, "model": {"weight": torch.ones(1)}}, tmp_path / "eat.pt")
    with pytest.raises(ValueError, match=r"has no positions, pre_norm\.weight"):
        EatEar.from_pretrained(tmp_path / "eat.pt")
    torch.save({"model": {}}, tmp_path / "eat.pt")
    with pytest.raises(ValueError, match=r"has no cfg with num_heads"):
        EatEar.from_pretrained(tmp_path / "eat.pt")
    save_hugging_face(ear, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        EatEar.from_pretrained(tmp_path)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["tiny_eat_fairseq_pretrain.pt", "tiny_eat_hf"])
def test_both_formats_equal_the_recorded_original(shared, name):
    recorded = load_file(shared / "parity/eat/tiny_eat_io.safetensors")
    ear = EatEar.from_pretrained(shared / "parity/eat" / name).requires_grad_(False)
    gunshots_XM = load_file(shared / "parity/preprocess/preprocess.safetensors")["gunshots.eat_mel"]
    padded_BXM = F.pad(gunshots_XM, (0, 0, 0, 24), value=-EAT_FBANK.mean / EAT_FBANK.std)[None]
    targets = []
    ear.blocks[0].fc2.register_forward_hook(lambda _, __, output: targets.append(output))
    for mel_BXM, case in [(recorded["mel.128"][0], "128"), (padded_BXM, "1024")]:
        tokens_BRE, num_frames_B = ear.encode(mel_BXM, torch.tensor([int(case)]))
        assert num_frames_B.tolist() == [int(case) // 2]
        assert relative(tokens_BRE, recorded[f"features.{case}"]) < 1e-5
    assert relative(targets[-1], recorded["layer0_ffn_target.1024"]) < 1e-5


@pytest.mark.shared
def test_positions_equal_those_in_the_official_file(shared):
    file = torch.load(shared / "parity/eat/tiny_eat_fairseq_pretrain.pt", weights_only=True)
    stored_BRE = file["model"]["modality_encoders.IMAGE.fixed_positional_encoder.positions"]
    torch.testing.assert_close(build_positions(1024, 48), stored_BRE[0], atol=1e-5, rtol=0)


@pytest.mark.shared
def test_the_keys_and_shapes_of_the_official_size_load(shared):
    official = json.loads((shared / "parity/eat/base_eat_keys.json").read_text())["fairseq_pretrain"]
    weights = dict(convert_weights({name: torch.ones(1).expand(shape) for name, shape in official.items()}))
    weights["positions"] = build_positions(1504, 768)
    with torch.device("meta"):
        ear = EatEar.from_config(EatConfig())
    load_strictly_(ear, weights, "base")
    assert all(not tensor.is_meta for tensor in ear.state_dict().values())
