"""A prefix is seen by every position before all others, whatever asks: at once, in steps, padded, 4 bits, beams."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from students.quantize import measure_share, quantize_4bit_
from teachers.lora import Lora, add_lora_
from teachers.words.prefix import KEYS, VALUES, add_prefix_, describe_prefix, is_of_prefix, without_prefix

SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.2}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2),
    "one group": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
}
SLIDING = {
    "mistral": MistralConfig(**SIZES, sliding_window=3),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=3,
                               layer_types=["sliding_attention", "full_attention"]),
}  # fmt: skip
P, T = 3, 7
IDS_BT = torch.arange(3, 3 + 2 * T).view(2, T)


def make_llm(config, prefix: int = P) -> torch.nn.Module:
    """A LLM with random weights and, where `prefix` is not 0, a random prefix."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().requires_grad_(False)
    if prefix:
        add_prefix_(llm, prefix)
        randomize_(llm)
    return llm


def randomize_(llm) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in llm.named_parameters():
        if is_of_prefix(name):
            parameter.data = torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits_of(llm, ids_BT=IDS_BT, **options):
    return llm(input_ids=ids_BT, **options).logits


@torch.no_grad()
def logits_behind_a_filled_cache(llm) -> torch.Tensor:
    """What the LLM without prefix says where a cache begins with it, as peft puts one before a LLM."""
    cache = DynamicCache()
    for number, layer in enumerate(llm.model.layers):
        cache.update(*(getattr(layer.self_attn, name)[None].expand(2, -1, -1, -1) for name in (KEYS, VALUES)), number)
    with without_prefix(llm):
        return logits_of(llm, past_key_values=cache, position_ids=torch.arange(T)[None].expand(2, -1),
                         attention_mask=torch.ones(2, P + T))  # fmt: skip


def test_an_attention_is_one_softmax_over_its_prefix_and_what_went_before():
    llm = make_llm(FAMILIES["llama"])
    attention, states_BTD = llm.model.layers[1].self_attn, torch.randn(2, T, 64)
    cos_BTA, sin_BTA = llm.model.rotary_emb(states_BTD, torch.arange(T)[None])

    def turn(x_BHTW):
        first, second = x_BHTW.chunk(2, -1)
        return x_BHTW * cos_BTA[:, None] + torch.cat([-second, first], -1) * sin_BTA[:, None]

    query, key, value = (getattr(attention, f"{n}_proj")(states_BTD).view(2, T, -1, 16).transpose(1, 2) for n in "qkv")
    query, key = turn(query), turn(key)
    heard = torch.zeros(2, T, 4, 16)
    for row in range(2):
        for head in range(4):
            keys = torch.cat([attention.prefix_keys[head // 2], key[row, head // 2]])
            values = torch.cat([attention.prefix_values[head // 2], value[row, head // 2]])
            for place in range(T):
                seen = P + place + 1
                weights = torch.softmax(keys[:seen] @ query[row, head, place] / 4, 0)
                heard[row, place, head] = weights @ values[:seen]
    mask = torch.ones(T, T).tril().bool()[None, None]
    got = attention(states_BTD, position_embeddings=(cos_BTA, sin_BTA), attention_mask=mask)[0]
    torch.testing.assert_close(got, attention.o_proj(heard.flatten(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_llm_says_what_it_says_behind_a_cache_that_was_filled_with_the_prefix(name):
    llm = make_llm(FAMILIES[name])
    torch.testing.assert_close(logits_of(llm), logits_behind_a_filled_cache(llm), atol=2e-5, rtol=1e-4)


def test_so_does_one_in_4_bits_with_lora_whose_share_in_4_bits_counts_no_prefix():
    llm = make_llm(FAMILIES["llama"], prefix=0)
    quantize_4bit_(llm)
    share = measure_share(llm)
    add_lora_(llm, Lora(rank=2))
    add_prefix_(llm, P)
    randomize_(llm)
    torch.testing.assert_close(logits_of(llm), logits_behind_a_filled_cache(llm), atol=2e-5, rtol=1e-4)
    assert measure_share(llm) == share


@pytest.mark.parametrize("name", [*FAMILIES, *SLIDING])
def test_a_row_padded_on_the_left_says_what_it_says_alone_and_in_steps_what_it_says_at_once(name):
    llm = make_llm((FAMILIES | SLIDING)[name])
    alone = logits_of(llm, IDS_BT[:1])
    assert not torch.allclose(alone, logits_of(make_llm((FAMILIES | SLIDING)[name], prefix=0), IDS_BT[:1]), atol=0.1)
    mask = torch.ones(2, T + 2).long()
    mask[0, :2] = 0
    padded = torch.stack([F.pad(IDS_BT[0], (2, 0)), torch.arange(20, 20 + T + 2)])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    batch = logits_of(llm, padded, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(batch[:1, 2:], alone, atol=1e-5, rtol=1e-4)
    cache, steps = DynamicCache(config=llm.config), []
    for start, end in ((0, 5), (5, 6), (6, 9)):
        steps.append(logits_of(llm, padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache,
                               position_ids=places[:, start:end]))  # fmt: skip
    torch.testing.assert_close(torch.cat(steps, 1)[:, 2:], batch[:, 2:], atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == T + 2  # none of it is the prefix


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_to_embeddings_are_those_without_a_cache_padded_or_alone(num_beams):
    llm = make_llm(FAMILIES["llama"])
    how = {"max_new_tokens": 6, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0}
    embeds = llm.get_input_embeddings()(IDS_BT)
    alone = [llm.generate(inputs_embeds=row[None], **how, use_cache=use) for row in embeds for use in (True, False)]
    assert torch.equal(alone[0], alone[1]) and torch.equal(alone[2], alone[3])
    padded, mask = F.pad(embeds, (0, 0, 2, 0)), F.pad(torch.ones(2, T).long(), (2, 0))
    together = llm.generate(inputs_embeds=padded, attention_mask=mask, **how)
    assert torch.equal(together, torch.cat(alone[::2]))


def test_nothing_else_of_a_llm_changes_and_without_its_prefix_it_says_what_it_said_to_the_last_bit():
    plain, llm = make_llm(FAMILIES["llama"], prefix=0), make_llm(FAMILIES["llama"])
    names = {name for name, _ in llm.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert len(names) == 4 and all(map(is_of_prefix, names))
    assert all(torch.equal(tensor, llm.get_parameter(name)) for name, tensor in plain.named_parameters())
    with without_prefix(llm):
        assert torch.equal(logits_of(llm), logits_of(plain))
    changed = (logits_of(llm) - logits_of(plain)).abs().max()
    assert changed > 0.1 and plain.config._attn_implementation == "sdpa"


def test_it_says_its_size_and_what_it_changes_which_at_the_start_is_what_attention_it_draws():
    llm = make_llm(FAMILIES["llama"], prefix=0)
    add_prefix_(llm, 5)
    found = describe_prefix(llm)
    assert (found.tokens, found.layers, found.parameters, found.bytes) == (5, 2, 2 * 2 * 2 * 5 * 16, 4 * 640)
    assert found.difference > 0
    for name, parameter in llm.named_parameters():
        assert not name.endswith(VALUES) or not parameter.any()
        if name.endswith(KEYS):
            parameter.data[:] = 0
    for layer in llm.model.layers:
        layer.self_attn.q_proj.weight.data[:] = 0  # each position then gives each key, the prefix's too, the same
    heard = []
    hook = llm.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, inputs: heard.append(inputs[0]))
    describe_prefix(llm)
    hook.remove()
    share_T = torch.arange(1, 17) / (torch.arange(1, 17) + 5)
    torch.testing.assert_close(heard[0], heard[1] * share_T[:, None], atol=1e-6, rtol=1e-5)
    assert "a prefix of 5 tokens in 2 layers: 0.00064 M parameters, 0.00256 MB; it changes" in str(found)


def test_every_key_and_value_of_it_has_a_gradient_and_nothing_that_is_frozen_has():
    llm = make_llm(FAMILIES["qwen3"], prefix=0)
    add_prefix_(llm, P)
    llm(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    for name, parameter in llm.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.flatten(1).any(1).all())
        assert has_gradient == is_of_prefix(name), name


def test_one_seed_is_one_prefix_whatever_was_drawn_before():
    first, second = (make_llm(FAMILIES["llama"], prefix=0) for _ in range(2))
    add_prefix_(first, P, seed=4)
    torch.randn(7)
    add_prefix_(second, P, seed=4)
    assert torch.equal(logits_of(first), logits_of(second))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2),
        Phi3Config(**SIZES, pad_token_id=0),
        DeepseekV2Config(**SIZES, kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                         v_head_dim=16, n_routed_experts=2, first_k_dense_replace=2),
        LlamaConfig(**SIZES, attn_implementation="eager"),
    ],
)  # fmt: skip
def test_a_family_whose_attention_takes_none_is_refused_by_name_and_left_as_it_was(config):
    llm = make_llm(config, prefix=0)
    names, before = [name for name, _ in llm.named_parameters()], llm.config._attn_implementation
    with pytest.raises(ValueError, match=rf"LLM is a {type(llm).__name__}, but a prefix goes before keys and values"):
        add_prefix_(llm, P)
    assert [name for name, _ in llm.named_parameters()] == names and llm.config._attn_implementation == before


def test_a_second_prefix_is_refused():
    with pytest.raises(ValueError, match=r"LLM is a LlamaForCausalLM with a prefix, but it takes one"):
        add_prefix_(make_llm(FAMILIES["llama"]), P)
