"""A pruned LLM computes what is left of it, leaves out what adds least, and says what that costs."""

import json
import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill.cli import main
from students.prune import (
    batch_texts,
    block_influence,
    cross_entropy_of,
    measure_inputs,
    most_influential,
    prune_,
    read_texts,
)

IDS_BT = torch.arange(3, 27).view(2, 12)
BATCHES = [(IDS_BT, torch.ones_like(IDS_BT))]


def make_llm(layers: int = 4, **sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24} | sizes
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=layers, initializer_range=0.2, **sizes)
    ).eval()


def test_a_layer_that_changes_nothing_has_no_influence_and_goes_first_at_no_cost():
    llm = make_llm()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        torch.nn.init.zeros_(llm.model.layers[2].get_submodule(name).weight)
    influence = block_influence(llm, BATCHES)
    assert influence[2] == pytest.approx(0, abs=1e-6) and min(influence[:2] + influence[3:]) > 1e-3
    assert most_influential(influence, 3) == [0, 1, 3]
    logits = llm(IDS_BT).logits
    pruned = prune_(llm, BATCHES, layers=3)
    assert pruned.layers == [0, 1, 3] and pruned.start_ce == pytest.approx(pruned.whole_ce, abs=1e-5)
    assert torch.allclose(llm(IDS_BT).logits, logits, atol=1e-5)


def test_what_goes_of_heads_and_channels_is_what_adds_nothing():
    llm = make_llm()
    for layer in llm.model.layers:
        layer.self_attn.v_proj.weight.data[8:16] = 0  # of the second group's values: its heads 2 and 3 add nothing
        layer.mlp.up_proj.weight.data[5::2] = 0  # every second channel from the sixth on adds nothing
    logits = llm(IDS_BT).logits
    pruned = prune_(llm, BATCHES, heads=2, ffn=14)
    assert (pruned.heads, pruned.ffn, llm.config.num_key_value_heads) == (2, 14, 1)
    made = LlamaForCausalLM(llm.config).eval()
    made.load_state_dict(llm.state_dict())  # of the shapes that its config says
    assert torch.allclose(made(IDS_BT).logits, logits, atol=1e-5)


def test_the_size_of_what_a_channel_adds_is_that_of_its_input_times_its_column():
    llm = make_llm(layers=1)
    down, seen = llm.model.layers[0].mlp.down_proj, []
    handle = down.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    llm(IDS_BT)
    handle.remove()
    added = torch.stack([torch.outer(seen[0].flatten(0, 1)[:, i], down.weight[:, i]).norm() for i in range(24)])
    assert torch.allclose(measure_inputs(llm, BATCHES, "down_proj")[0], added, rtol=1e-4)


def test_padding_counts_in_no_figure():
    llm, tokens = make_llm(), IDS_BT[:1, :7]
    padded = torch.cat([tokens, torch.full((1, 5), 9)], dim=1)
    mask = (torch.arange(12) < 7).long()[None]
    alone, padding = [(tokens, torch.ones_like(tokens))], [(padded, mask)]
    assert cross_entropy_of(llm, padding) == pytest.approx(cross_entropy_of(llm, alone), rel=1e-5)
    assert block_influence(llm, padding) == pytest.approx(block_influence(llm, alone), rel=1e-4)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    tiny.make_parts(folder)
    tiny.make_shards(folder / "data")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    llm.save_pretrained(folder / "deep")
    tokenizer.save_pretrained(folder / "deep")
    return folder


def test_the_command_writes_a_llm_that_loads_and_prints_three_cross_entropies(toys, tmp_path, capsys):
    shards = str(toys / "data" / "train")
    words = [str(toys / "deep"), str(tmp_path / "small"), "--shards", shards, "--layers", "2", "--heads", "2"]
    assert main(["prune", *words, "--ffn", "16", "--evenly"]) == 0
    printed = capsys.readouterr().out
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    said = json.loads((tmp_path / "small" / "prune.json").read_text())
    batches = batch_texts(AutoTokenizer.from_pretrained(tmp_path / "small"), read_texts(shards, 128, 0))
    assert said["layers"] == [0, 3] and cross_entropy_of(made, batches) == pytest.approx(said["start_ce"], rel=1e-4)
    assert said["uniform_ce"] == pytest.approx(math.log(made.config.vocab_size))
    assert all(f"{said[name]:.3f} nats a token" in printed for name in ("whole_ce", "start_ce", "uniform_ce"))
    assert main(["prune", *words]) == 1
    assert "holds a config.json already; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "5"], "--layers is 5, but the LLM has 4; give 1 to 4."),
        (["--heads", "3"], "--heads is 3, but 2 heads share their keys and values and go together; give a multiple"),
        (["--ffn", "49"], "--ffn is 49, but the LLM has 48; give 1 to 48."),
        ([], "--layers, --heads and --ffn are not given, but something is to be pruned"),
    ],
)
def test_what_a_llm_has_not_is_not_kept(toys, tmp_path, capsys, words, message):
    shards = str(toys / "data" / "train")
    assert main(["prune", str(toys / "deep"), str(tmp_path / "out"), "--shards", shards, *words]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
