"""A student that only answers: fast where the processor can, and nothing of what was trained is changed by it."""

import copy

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import students.answering
from distill.distiller import Distiller, Run
from students.answering import AS_TRAINED
from students.hearing import Connector
from students.pretrained import Student
from students.quantize import dequantize, quantize_4bit_
from students.student import build_student, load_student, save_student, train_own_
from teachers.ears.precision import has_amx_bf16
from teachers.files.loading import save_salmonn
from teachers.fourbit import FLAG, bnb, pack_for_good_, packed_for_answers
from teachers.int8 import RowEmbedding, RowLinear, narrow_head_, narrow_linears_, narrow_llm_
from teachers.lora import Lora, add_lora_

LORA = Lora(rank=4, targets=("q_proj", "v_proj"))


@pytest.fixture
def packing(monkeypatch):
    """A processor on which bitsandbytes packs. What it multiplies then is not looked at: this one may not know how."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


@pytest.fixture
def amx(monkeypatch):
    """A processor that multiplies bfloat16 in tiles."""
    monkeypatch.setattr(students.answering, "has_amx_bf16", lambda: True)


def make_llm(*, hidden_size: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=100, hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=128, tie_word_embeddings=True)  # fmt: skip
    llm = AutoModelForCausalLM.from_config(config).eval()
    for parameter in llm.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return llm


def make_4bit(**sizes) -> torch.nn.Module:
    llm = make_llm(**sizes)
    quantize_4bit_(llm)
    add_lora_(llm, LORA)
    return llm.eval()


def layers_of(llm) -> list:
    return [module for module in llm.modules() if isinstance(module, bnb.nn.Linear4bit)]


def is_packed(layer) -> bool:
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def slope(llm, embeds_BTD) -> torch.Tensor:
    """The gradient of what the LLM says in what it hears."""
    embeds_BTD = embeds_BTD.clone().requires_grad_()
    logits = llm(inputs_embeds=embeds_BTD).logits
    return torch.autograd.grad((logits * torch.linspace(-1, 1, logits.shape[-1])).sum(), embeds_BTD)[0]


# Packed for the time of an answer


@pytest.mark.parametrize("ending", [None, ValueError, KeyboardInterrupt])
def test_after_packed_answers_gradients_weights_and_state_are_those_before_bit_by_bit(packing, ending):
    llm, embeds_BTD = make_4bit(), torch.randn(2, 7, 64)
    before, state = slope(llm, embeds_BTD), {name: t.clone() for name, t in llm.state_dict().items()}
    weights = [dequantize(layer.weight) for layer in layers_of(llm)]

    def answer():
        with packed_for_answers(llm) as num_layers, torch.no_grad():
            assert num_layers == len(layers_of(llm)) == 14
            llm(inputs_embeds=embeds_BTD)
            assert all(map(is_packed, layers_of(llm)))
            with packed_for_answers(llm) as num_inner:
                assert num_inner == 0
            assert all(map(is_packed, layers_of(llm)))
            if ending:
                raise ending

    if ending:
        with pytest.raises(ending):
            answer()
    else:
        answer()
    assert not any(is_packed(layer) or getattr(layer, FLAG) for layer in layers_of(llm))
    assert torch.equal(slope(llm, embeds_BTD), before) and float(before.abs().max()) > 0
    after = llm.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], t) for name, t in state.items())
    assert all(torch.equal(dequantize(layer.weight), w) for layer, w in zip(layers_of(llm), weights))


def test_an_interruption_while_the_layers_are_made_ready_leaves_all_of_them_as_they_were(packing, monkeypatch):
    llm = make_4bit()
    data = [layer.weight.data_ptr() for layer in layers_of(llm)]
    calls = []

    def interrupted(state):
        calls.append(state)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return copy.deepcopy(state)

    monkeypatch.setattr("teachers.fourbit.copy.copy", interrupted)
    with pytest.raises(KeyboardInterrupt), packed_for_answers(llm):
        pass
    assert [layer.weight.data_ptr() for layer in layers_of(llm)] == data
    assert not any(getattr(layer, FLAG) for layer in layers_of(llm))


def test_what_is_packed_holds_the_same_4_bit_codes(packing):
    llm, embeds_BTD = make_4bit(), torch.randn(1, 3, 64)
    layer = llm.model.layers[0].mlp.up_proj
    codes = layer.weight.data.clone()
    with packed_for_answers(llm), torch.no_grad():
        llm(inputs_embeds=embeds_BTD)
        packed = layer.weight.data.clone()
        back, _ = bnb.functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(layer.weight.quant_state))
    assert not torch.equal(packed.flatten(), codes.flatten()) and torch.equal(back, codes)


def test_layers_without_whole_blocks_answer_unpacked(packing):
    llm = make_llm(hidden_size=32)
    quantize_4bit_(llm)
    llm.eval()
    with packed_for_answers(llm) as num_layers, torch.no_grad():
        assert llm(inputs_embeds=torch.randn(1, 3, 32)).logits.isfinite().all()
        packed = [layer for layer in layers_of(llm) if is_packed(layer)]
        assert num_layers == len(packed) == 2 and {layer.in_features for layer in packed} == {128}


def test_without_such_a_processor_nothing_is_packed(monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    llm = make_4bit()
    with packed_for_answers(llm) as num_layers, torch.no_grad():
        llm(inputs_embeds=torch.randn(1, 3, 64))
        assert num_layers == 0 and not any(map(is_packed, layers_of(llm)))
    assert pack_for_good_(llm) == 0


# Fewer bits


@pytest.mark.parametrize(("bits", "most"), [("bf16", 4e-3), ("int8", 1.2e-2)])
@pytest.mark.parametrize("num_rows", [3, 50])
def test_a_linear_layer_in_fewer_bits_is_off_by_what_its_bits_cost(bits, most, num_rows):
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(128, 96), torch.randn(2, num_rows, 128)
    small = RowLinear(linear, bits)
    with torch.no_grad():
        exact, near = linear(rows), small(rows)
    assert near.shape == exact.shape and near.dtype == exact.dtype
    assert 0 < float((near - exact).norm() / exact.norm()) < most


def test_a_matrix_that_int8_holds_exactly_is_multiplied_exactly():
    linear = torch.nn.Linear(64, 32)
    linear.weight.data = torch.randint(-127, 128, linear.weight.shape).float()
    linear.weight.data[:, 0] = 127
    rows = torch.randn(40, 64)
    with torch.no_grad():
        torch.testing.assert_close(RowLinear(linear, "int8")(rows), linear(rows))


def test_a_layer_of_a_teacher_gives_a_row_what_it_gives_many():
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(128, 96), torch.randn(40, 128)
    small = RowLinear(linear, "int8", fast=False)
    with torch.no_grad():
        torch.testing.assert_close(small(rows[:1]), small(rows)[:1], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(RowLinear(linear, "int8")(rows[:1]), small(rows)[:1], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_teachers_llm_in_int8_says_nearly_the_same_and_keeps_its_head_and_lora_whole():
    llm, ids = make_llm(), torch.arange(40)[None]
    add_lora_(llm, Lora(rank=4))
    exact, head = llm(ids).logits, llm.get_output_embeddings()
    narrow_llm_(llm, "int8")
    narrow = {name for name, layer in llm.named_modules() if isinstance(layer, RowLinear)}
    assert len(narrow) == 7 * len(llm.model.layers) and llm.get_output_embeddings() is head
    assert not any("lora_" in name for name in narrow)
    assert 0 < float((llm(ids).logits - exact).norm() / exact.norm()) < 0.02


def test_scales_stay_in_float32_where_the_rest_is_rounded():
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
    narrow_linears_(module, "int8")
    scale = module[0].scale.clone()
    module.to(torch.bfloat16)
    assert module[0].weight.dtype == torch.int8 and module[1].weight.dtype == torch.bfloat16
    assert torch.equal(module[0].scale, scale)


def test_a_gradient_passes_through_a_layer_in_int8():
    linear, rows = torch.nn.Linear(64, 32), torch.randn(3, 64, requires_grad=True)
    RowLinear(linear, "int8")(rows).sum().backward()
    torch.testing.assert_close(rows.grad[0], linear.weight.detach().sum(0), atol=0.1, rtol=0)


@pytest.mark.parametrize("bits", ["bf16", "int8"])
def test_a_tied_head_and_its_embeddings_stay_one_matrix_and_say_nearly_the_same(bits):
    llm, ids = make_llm(), torch.arange(6)[None]
    with torch.no_grad():
        exact, embedded = llm(ids).logits, llm.get_input_embeddings()(ids)
    narrow_head_(llm, bits)
    head, embedding = llm.get_output_embeddings(), llm.get_input_embeddings()
    assert isinstance(embedding, RowEmbedding) and head.weight is embedding.weight
    with torch.no_grad():
        assert embedding(ids).dtype == embedded.dtype
        torch.testing.assert_close(embedding(ids), embedded, atol=3e-3, rtol=1e-2)
        assert float((llm(ids).logits - exact).norm() / exact.norm()) < 0.05
        assert llm.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 9)


# Students


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A student in 4 bits, whose ears are its teacher's own and so are saved with it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.make_parts(folder / "parts")
    teacher = tiny.make_teacher(folder / "parts")
    teacher.whisper.requires_grad_(True)
    teacher.own_names = frozenset(n for n, p in teacher.named_parameters() if p.requires_grad)
    student = build_student(
        teacher, str(folder / "parts" / "llm"), lora=LORA, connector=Connector("new"), say=lambda text: None
    )
    save_student(student, folder / "student", lora=LORA, quantization="nf4")
    return folder / "student"


def test_a_student_for_inference_has_ears_and_head_in_bf16_with_amx_and_packs_its_layers(saved, packing, amx):
    student = load_student(saved, for_inference=True)
    assert {p.dtype for p in student.whisper.parameters()} == {torch.bfloat16}
    assert student.llm.get_output_embeddings().weight.dtype == torch.bfloat16
    assert "Whisper in bf16, head and embeddings in bf16, " in student.only_answers
    assert "4-bit layers packed for AVX512-BF16" in student.only_answers
    assert any(getattr(layer, FLAG) for layer in layers_of(student.llm))


def test_a_student_for_inference_on_a_plain_processor_answers_as_the_one_that_was_trained(saved, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr(students.answering, "has_amx_bf16", lambda: False)
    samples = [tiny.make_sample(1), tiny.make_sample(2)]
    fast, exact = load_student(saved, for_inference=True), load_student(saved)
    assert fast.only_answers == AS_TRAINED
    with torch.no_grad():
        assert torch.equal(fast(fast.collate(samples))[0], exact(exact.collate(samples))[0])
    small = load_student(saved, for_inference=True, head="int8")
    assert small.llm.get_input_embeddings().weight.dtype == torch.int8
    assert small.generate(samples, max_new_tokens=3)


def test_a_student_that_only_answers_is_neither_trained_nor_saved(saved, tmp_path):
    student = load_student(saved, for_inference=True)
    with pytest.raises(ValueError, match=r"student was loaded to answer alone \(.*\), but training needs its weights"):
        train_own_(student)
    with pytest.raises(ValueError, match=r"model was loaded to answer alone .* load it without for_inference"):
        save_salmonn(student, tmp_path / "again")
    with pytest.raises(ValueError, match=r"head is 'fp8', but must be one of auto, whole, bf16, int8"):
        load_student(saved, for_inference=True, head="fp8")


def test_a_student_made_fast_is_written_as_it_was_trained_and_trains_on_from_that(saved, tmp_path, amx):
    student = Student.from_pretrained(saved, device="cpu")
    assert "in bf16" in student.model.only_answers
    copied = student.save_pretrained(tmp_path / "copy")
    assert (copied / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    exact, again = load_student(saved), load_student(copied)
    assert all(torch.equal(a, b) for a, b in zip(exact.whisper.parameters(), again.whisper.parameters()))
    shards = tiny.make_shards(tmp_path / "data", num_samples=4)
    distiller = Distiller(None, student, train=shards, run=Run(tmp_path / "run", precision="float32"))
    assert distiller.student is not student.model and not distiller.student.only_answers


def test_a_student_asked_for_float32_is_exact_on_every_processor(saved, packing, amx):
    student = Student.from_pretrained(saved, device="cpu", dtype=torch.float32)
    assert not student.model.only_answers and {p.dtype for p in student.model.whisper.parameters()} == {torch.float32}


def test_amx_is_read_off_the_processors_flags(tmp_path):
    path = tmp_path / "cpuinfo"
    assert not has_amx_bf16(path)
    path.write_text("model name\t: x\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert not has_amx_bf16(path)
    path.write_text("flags\t\t: fpu avx2 amx_bf16 amx_tile\n")
    assert has_amx_bf16(path)
