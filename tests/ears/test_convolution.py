"""No ear convolves in fewer than 32 bits on a CPU, whatever it is in and whatever the processor."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from teachers.ears.convolution import Float32Conv1d, convolve_in_float32_
from teachers.ears.encoders import build_encoder
from teachers.ears.whisper import ear_from_tower

WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
           "max_source_positions": 100, "num_mel_bins": 80}  # fmt: skip
TOWER = Qwen2AudioConfig(
    audio_config={**WHISPER, "num_mel_bins": 128},
    text_config={"model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32,
                 "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
    audio_token_index=3,
)  # fmt: skip
EARS = {
    "whisper": lambda: build_encoder("whisper", WHISPER),
    "beats": lambda: build_encoder("beats", {"embed_dim": 32, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64,
                                             "encoder_layers": 1, "encoder_attention_heads": 2, "conv_pos": 16,
                                             "conv_pos_groups": 4}),
    "eat": lambda: build_encoder("eat", {"embed_dim": 32, "depth": 1, "num_heads": 2, "ffn_dim": 64}),
    "qwen2-audio": lambda: ear_from_tower(Qwen2AudioForConditionalGeneration(TOWER).model.audio_tower),
}  # fmt: skip


class Convolutions(TorchDispatchMode):
    """Notes the types that convolutions run in."""

    def __init__(self):
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func.__name__:
            self.dtypes += [x.dtype for x in args if isinstance(x, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", EARS)
@torch.no_grad()
def test_ears_convolve_in_float32_and_under_autocast_too(name, dtype):
    ear, waveforms_BN = EARS[name]().to(dtype), torch.randn(1, 16_000)
    with Convolutions() as seen:
        frames_BRE = ear(waveforms_BN, torch.tensor([16_000]))[0]
    assert seen.dtypes and set(seen.dtypes) == {torch.float32} and frames_BRE.dtype == dtype
    with Convolutions() as seen, torch.autocast("cpu", torch.bfloat16):
        ear.float()(waveforms_BN, torch.tensor([16_000]))
    assert seen.dtypes and set(seen.dtypes) == {torch.float32}


def test_a_convolution_of_the_shape_that_is_wrong_in_bfloat16_is_right():
    torch.manual_seed(0)
    plain = torch.nn.Conv1d(8, 8, 16).bfloat16()  # off by 1.06 under AMX
    inputs_BEX = torch.randn(2, 8, 100).bfloat16()
    expected = torch.nn.functional.conv1d(inputs_BEX.double(), plain.weight.double(), plain.bias.double())
    convolve_in_float32_(plain)
    error = (plain(inputs_BEX).double() - expected).norm() / expected.norm()
    assert type(plain) is Float32Conv1d and float(error) < 5e-3


def test_a_transformed_convolution_keeps_names_gradients_and_wider_types():
    torch.manual_seed(0)
    plain, inputs_BEXX = torch.nn.Conv2d(1, 4, 3, 3).double(), torch.randn(1, 1, 9, 9).double().requires_grad_()
    names, expected = list(plain.state_dict()), plain(inputs_BEXX)
    convolve_in_float32_(plain)
    assert list(plain.state_dict()) == names and torch.equal(plain(inputs_BEXX), expected)
    assert torch.autograd.gradcheck(plain, inputs_BEXX)
