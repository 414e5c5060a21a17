"""4-bit students train, answer, train on and are written as their weights say, on every processor."""

import ast
import copy
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    JetMoeConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

import teachers.fourbit
from benchmarks.house import parse, python_files
from distill.config import load_config
from distill.export import export
from distill.run import run
from distill.training.ranks import build_accelerator
from distill.training.sharding import shard_frozen_, unshard_, whole_blocks
from students.hearing import Connector
from students.quantize import dequantize, dequantize_, measure_share, quantize_4bit_, to_4bit
from students.student import build_student, load_student, save_student
from teachers.fourbit import FLAG, bnb, keep_unpacked_
from teachers.lora import Lora, add_lora_

ROOT = Path(__file__).resolve().parents[2]
LORA = Lora(rank=4, targets=("q_proj", "v_proj"))
SIZES = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
ROUTED = {**SIZES, "intermediate_size": 64, "num_experts_per_tok": 2}
LATENT = {"moe_intermediate_size": 64, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
          "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
          "num_key_value_heads": 4}  # fmt: skip
EXPERTS = {
    "mixtral": MixtralConfig(**ROUTED, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(**ROUTED, moe_intermediate_size=64, num_experts=4, head_dim=16),
    "deepseek": DeepseekV3Config(**{**ROUTED, **LATENT}, n_routed_experts=4),
    "gpt-oss": GptOssConfig(**ROUTED, num_local_experts=4, head_dim=16),  # transposed, with biases, its own gate
}


@pytest.fixture(autouse=True)
def packing(monkeypatch):
    """A processor on which bitsandbytes packs a layer when it answers."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert getattr(bnb.nn.Linear4bit(64, 64), FLAG)


def make_llm(config) -> torch.nn.Module:
    """A LLM of random weights in evaluation, its experts one after the other."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    for parameter in llm.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return llm


def small(**changes) -> Qwen2Config:
    """Whose query, key and value have biases."""
    return Qwen2Config(**{**SIZES, "intermediate_size": 96, **changes})


def slope(llm, embeds_BTD) -> torch.Tensor:
    """The gradient of what the LLM says in what it hears."""
    embeds_BTD = embeds_BTD.clone().requires_grad_()
    logits = llm(inputs_embeds=embeds_BTD).logits
    return torch.autograd.grad((logits * torch.linspace(-1, 1, logits.shape[-1])).sum(), embeds_BTD)[0]


@pytest.fixture(scope="module", params=["made here", "stored so"])
def llm_folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    make_llm(small()).save_pretrained(folder)
    if request.param == "stored so":
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                     bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=options).save_pretrained(folder)
    return folder


def load_4bit(folder) -> torch.nn.Module:
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cpu()
    quantize_4bit_(llm)
    add_lora_(llm, LORA)
    return llm.eval()


def test_gradients_weights_and_state_after_an_answer_are_those_before_it_bit_by_bit(llm_folder):
    llm, embeds_BTD = load_4bit(llm_folder), torch.randn(2, 7, 64)
    layer = llm.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.bias is not None
    weight = dequantize(layer.weight)
    before, state = slope(llm, embeds_BTD), {name: t.clone() for name, t in llm.state_dict().items()}
    llm.generate(inputs_embeds=embeds_BTD, max_new_tokens=3, pad_token_id=0)
    assert torch.equal(slope(llm, embeds_BTD), before) and float(before.abs().max()) > 0
    after = llm.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], t) for name, t in state.items())
    assert torch.equal(dequantize(layer.weight), weight)


def test_a_stored_4_bit_llm_multiplies_as_its_weights_read_back_do(llm_folder):
    llm, embeds_BTD = load_4bit(llm_folder), torch.randn(1, 5, 64)
    layer = llm.model.layers[0].mlp.up_proj
    torch.testing.assert_close(layer(embeds_BTD), embeds_BTD @ dequantize(layer.weight).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.to("cpu")])
def test_a_layer_stays_unpacked_when_it_is_copied_pickled_moved_and_loaded_into(copied):
    llm = make_llm(small())
    quantize_4bit_(llm)
    other = copied(llm)
    other.load_state_dict(copied(llm).state_dict(), strict=False)
    layers = [m for m in other.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not any(getattr(layer, FLAG) for layer in layers)


def test_layers_of_32_by_32_answer():
    llm = make_llm(small(hidden_size=32, intermediate_size=32))
    quantize_4bit_(llm)
    with torch.no_grad():
        assert llm(inputs_embeds=torch.randn(1, 3, 32)).logits.isfinite().all()


def test_a_packed_weight_is_neither_read_nor_trained():
    layer = to_4bit(torch.nn.Linear(64, 64), torch.float32).eval()
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.raises(ValueError, match=r"weight is packed for answers on AVX512-BF16, but 4 bits are read .* load "):
        dequantize(layer.weight)
    with pytest.raises(ValueError, match=r"0\.weight is packed for answers"):
        keep_unpacked_(torch.nn.Sequential(layer))


def test_a_bitsandbytes_without_the_switch_is_refused():
    layer = to_4bit(torch.nn.Linear(64, 64), torch.float32)
    delattr(layer, FLAG)
    with pytest.raises(RuntimeError, match=rf"bitsandbytes is \S+, but its Linear4bit has no {FLAG}"):
        keep_unpacked_(torch.nn.Sequential(layer))


IMPORT = """
import importlib.machinery, sys, types
class Packing:  # lets bitsandbytes find a processor with AVX512-BF16
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), setattr(module, "has_avx512bf16", lambda: True))
        return spec
sys.meta_path.insert(0, Packing())
kernels = sys.modules["kernels"] = types.ModuleType("kernels")
kernels.__spec__ = importlib.machinery.ModuleSpec("kernels", None)
kernels.get_kernel = lambda *names, **options: print("fetched", names)
import distill.run, teachers.qwen2_audio
import bitsandbytes.nn.modules
assert bitsandbytes.nn.modules.has_avx512bf16() and sys.modules["kernels"] is kernels
slow = {"scipy.signal", "torch._inductor.lowering", "matplotlib.pyplot", "pandas"} & set(sys.modules)
assert not slow, slow
import torch
assert torch.compile.__module__ == "torch"
"""


def test_importing_the_product_fetches_no_code_raises_no_alarm_and_loads_no_compiler():
    process = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert "fetched" not in process.stdout and "gemm_4bit_forward" not in process.stderr


def test_bitsandbytes_is_imported_in_one_place():
    found = set()
    for path in python_files():
        if "bitsandbytes" not in path.read_text():  # and so not in an import
            continue
        for node in ast.walk(parse(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            if any((name or "").split(".")[0] == "bitsandbytes" for name in names):
                found.add(path.name)
    source = Path(teachers.fourbit.__file__).read_text()
    assert not found and 'import_module("bitsandbytes")' in source


# Runs


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, teacher__online=True, precision="float32", train__save_every=1, train__keep=4,
                   train__min_learning_rate=1e-4, eval__max_new_tokens=2)  # fmt: skip
    tiny.make_shards(folder / "data", split="valid", num_samples=3)
    return folder


def train_to(toys: Path, name: str, *words: str, ranks: int = 1) -> list[dict[str, torch.Tensor]]:
    """Train on one or two processes; the trained tensors after each step that the folder keeps."""
    config = load_config(toys / "toy.yaml", [f"name={name}", *words])
    context, port = multiprocessing.get_context("fork"), tiny.free_port()
    if ranks == 1:
        run(config)
    else:
        processes = [context.Process(target=run_as_rank, args=(rank, port, config)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert len({process.exitcode for process in processes}) == 1
    return [load_file(path) for path in sorted((toys / "runs" / name).glob("checkpoints/*/trainable.safetensors"))]


def run_as_rank(rank: int, port: int, config) -> None:
    """What torchrun starts twice; the imports are already done here."""
    tiny.become_rank(rank, port)
    run(config)


def are_equal(one: list[dict], other: list[dict]) -> bool:
    """Whether two runs kept the same four steps, bit by bit."""
    pairs = list(zip(one, other, strict=True))
    return len(pairs) == 4 and all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_with_validations_in_one_piece_or_two_is_the_run_without_bit_by_bit(toys, on_the_cpu, ranks):
    words = ["train.micro_batch_size=2"]
    never = train_to(toys, f"never{ranks}", *words, "train.eval_every=0", ranks=ranks)
    assert are_equal(never, train_to(toys, f"after2{ranks}", *words, "train.eval_every=2", ranks=ranks))
    train_to(toys, f"pieces{ranks}", *words, "train.eval_every=1", "train.stop_after=2", ranks=ranks)
    assert are_equal(never, train_to(toys, f"pieces{ranks}", *words, "train.eval_every=1", ranks=ranks))


def gradients(llm) -> list[torch.Tensor]:
    """Of LoRA, over a prompt that is the same on every rank."""
    llm.zero_grad()
    embeds_BTD = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    llm.base_model(inputs_embeds=embeds_BTD).last_hidden_state.square().sum().backward()
    return [embeds_BTD.grad, *(p.grad.clone() for p in llm.parameters() if p.grad is not None)]


def compare_split_with_whole(rank: int, port: int, llm) -> None:
    """As one of two ranks: gradients before, while and after each rank has a part of the frozen weights."""
    tiny.become_rank(rank, port)
    accelerator, whole = build_accelerator(), gradients(llm)
    frozen = [p.clone() for p in llm.parameters() if not p.requires_grad]
    shard_frozen_(accelerator, llm)
    split = [gradients(llm), gradients(llm)]
    with whole_blocks(llm), torch.no_grad():
        for length in range(1, 3 + rank):  # ranks answer at a time of their own
            llm(inputs_embeds=torch.zeros(1, length, 64))
    split.append(gradients(llm))
    unshard_(llm)
    for found in (*split, gradients(llm)):
        assert len(found) == len(whole) > 2 and all(map(torch.equal, found, whole))
    assert all(map(torch.equal, (p for p in llm.parameters() if not p.requires_grad), frozen))


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral", "gpt-oss"])
def test_blocks_whose_frozen_weights_are_split_over_ranks_have_the_gradients_of_whole_ones_bit_by_bit(name, on_the_cpu):
    own = {"qwen2": small(), "gpt2": GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0)}
    llm = make_llm({**EXPERTS, **own}[name])
    if name != "gpt2":
        quantize_4bit_(llm)
    add_lora_(llm, Lora(rank=4, targets=("all-linear",)))
    context, port = multiprocessing.get_context("fork"), tiny.free_port()
    ranks = [context.Process(target=compare_split_with_whole, args=(rank, port, llm)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]


# Experts


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_4_bits_are_the_fused_ones_that_their_weights_read_back_make(name):
    llm, embeds_BTD = make_llm(EXPERTS[name]), torch.randn(2, 7, 64)
    shapes = {name: p.shape for name, p in llm.named_parameters()}
    quantize_4bit_(llm)
    whole = copy.deepcopy(llm)
    dequantize_(whole)
    assert {name: p.shape for name, p in whole.named_parameters()} == shapes
    assert torch.equal(llm(inputs_embeds=embeds_BTD).logits, whole(inputs_embeds=embeds_BTD).logits)
    # a transposed weight's product is added up in another order by its backward
    atol = 1e-4 if name == "gpt-oss" else 0
    torch.testing.assert_close(slope(llm, embeds_BTD), slope(whole, embeds_BTD), rtol=0, atol=atol)
    whole.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(llm(inputs_embeds=embeds_BTD).logits, whole(inputs_embeds=embeds_BTD).logits)


def test_the_share_in_4_bits_counts_experts_embeddings_and_head():
    llm = make_llm(EXPERTS["mixtral"])
    total = sum(p.numel() for p in llm.parameters())
    quantize_4bit_(llm)
    share = measure_share(llm)
    attention, experts = 2 * (2 * 64 * 64 + 2 * 32 * 64), 2 * 4 * 3 * 64 * 64
    assert share.num_4bit == attention + experts and sum(share.whole.values()) == total - share.num_4bit
    assert str(share).startswith(f"{share.num_4bit / total:.1%} of the LLM's weights are in 4 bits (")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            JetMoeConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16,
                         intermediate_size=64, num_local_experts=4),
            r"is nf4, but 9\d% of the layers' weights in this JetMoeForCausalLM have no 4-bit form here "
            r"\(model\.layers\.0\.\S+\.weight of a JetMoeParallelExperts and others\); set it to none",
        ),
        (GPT2Config(vocab_size=100, n_embd=64, n_layer=1, n_head=4), r"100% of the layers' .* of a Conv1D and others"),
    ],
)  # fmt: skip
def test_a_llm_that_would_stay_whole_is_refused_by_name_and_share(config, message):
    with pytest.raises(ValueError, match=message):
        quantize_4bit_(make_llm(config))


def test_convolutions_and_routers_of_a_hybrid_stay_whole():
    llm = make_llm(NemotronHConfig(**SIZES))
    quantize_4bit_(llm)
    assert 0.98 < measure_share(llm).value < 1


# Students


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    return folder


def save_llm(parts: Path, name: str, config, **options) -> str:
    """A LLM with the toys' tokenizer; its path."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts / "llm")
    config.vocab_size, config.eos_token_id, config.bos_token_id = len(tokenizer), tokenizer.eos_token_id, None
    make_llm(config).save_pretrained(parts / name)
    if options:
        llm = AutoModelForCausalLM.from_pretrained(parts / name, quantization_config=BitsAndBytesConfig(**options))
        llm.save_pretrained(parts / name)
    tokenizer.save_pretrained(parts / name)
    return str(parts / name)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("mixtral", MixtralConfig(**ROUTED, num_local_experts=4), {}),
        ("stored", small(), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    ],
)
def test_a_student_is_saved_loaded_and_merged_and_its_card_says_its_share(parts, tmp_path, name, config, options):
    llm = save_llm(parts, name, config, **options)
    student = build_student(tiny.make_teacher(parts), llm, lora=LORA, connector=Connector("new")).eval()
    for parameter in (p for n, p in student.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(parameter, std=0.1)
    samples = [tiny.make_sample(1), tiny.make_sample(2)]
    answers = student.generate(samples, max_new_tokens=4)
    with torch.no_grad():
        logits = student(student.collate(samples))[0]
    save_student(student, tmp_path / "run/student", lora=LORA, quantization="nf4")
    loaded = load_student(tmp_path / "run/student")
    with torch.no_grad():
        assert torch.equal(loaded(loaded.collate(samples))[0], logits)
    assert loaded.generate(samples, max_new_tokens=4) == answers
    share = str(measure_share(student.llm))
    assert share in (export(tmp_path / "run", tmp_path / "small") / "README.md").read_text()
    merged = load_student(export(tmp_path / "run", tmp_path / "merged", merge=True))
    assert measure_share(merged.llm).num_4bit == 0
    with torch.no_grad():
        torch.testing.assert_close(merged(merged.collate(samples))[0], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("quant_type", "quantization", "message"),
    [
        (
            "nf4",
            "none",
            r"student\.quantization is none, but \S+% of the LLM's weights are in 4 bits .*; set it to",
        ),
        ("fp4", "nf4", r"of the LLM is stored in fp4, but student\.quantization is nf4; name the folder of the whole"),
    ],
)
def test_a_stored_4_bit_llm_is_not_called_what_it_is_not(parts, quant_type, quantization, message):
    llm = save_llm(parts, quant_type, small(), load_in_4bit=True, bnb_4bit_quant_type=quant_type)
    with pytest.raises(ValueError, match=message):
        build_student(tiny.make_teacher(parts), llm, lora=LORA, quantization=quantization, connector=Connector("new"))
