"""The table of costs: published parameter counts, FLOPs as torch counts them, and every config that we ship."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

from distill.cli import main
from distill.config import Config, TeacherConfig, load_config
from distill.sizes.costs import (
    Blueprint,
    Usage,
    build_on_meta,
    count_flops,
    count_layers,
    describe_student,
    describe_teacher,
    measure,
    measure_sizes,
    model_config,
)
from students.quantize import nf4_bytes
from teachers.ears.encoders import build_encoder, find_encoder
from teachers.files.checkpoint import save_checkpoint
from teachers.fourbit import count_bytes
from teachers.int8 import narrow_llm_
from teachers.lora import Lora

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
WHOLE = [path for path in CONFIGS if "base:" not in path.read_text()]  # the page on recipes has the others
STAGES = [path for path in WHOLE if path.stem.startswith("teacher_")]  # of a teacher's training: they have no student


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    return folder


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("meta-llama/Llama-3.2-3B-Instruct", 3212.750),
        ("meta-llama/Llama-3.2-1B-Instruct", 1235.814),
        ("meta-llama/Llama-3.1-8B-Instruct", 8030.261),
        ("lmsys/vicuna-13b-v1.1", 13015.864),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494.033),
        ("Qwen/Qwen2.5-1.5B", 1543.714),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1777.088),
    ],
)
def test_a_known_llm_has_its_published_parameters(name, millions):
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(model_config(name))
    assert count(llm) / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "mels", "millions"),
    [
        ("openai/whisper-small", 80, 88.154),
        ("openai/whisper-large-v2", 80, 636.8),
        ("openai/whisper-large-v3-turbo", 128, 637.0),
    ],
)
def test_a_known_whisper_encoder_has_its_published_parameters(name, mels, millions):
    config = model_config(name)
    with torch.device("meta"):
        assert count(build_encoder("whisper", config.to_dict())) / 1e6 == pytest.approx(millions, abs=0.05)
    assert config.num_mel_bins == mels


def test_beats_has_its_published_parameters_with_and_without_its_predictor():
    for file, millions in (("BEATs_iter3_plus_AS2M.pt", 90.3), ("BEATs_iter3_plus_AS2M_finetuned_cpt2.pt", 90.7)):
        sizes = find_encoder("beats").sizes_of(file)
        with torch.device("meta"):
            assert count(build_encoder("beats", sizes)) / 1e6 == pytest.approx(millions, abs=0.05)


def test_flops_are_those_that_torch_counts_in_a_real_forward(parts):
    model = tiny.make_teacher(parts, windows="audio").eval().requires_grad_(False)
    table = {part.name: part for part in measure(Blueprint(model.config, None, torch.float32), Usage(1.0, 7, 5))}
    batch = model.collate([tiny.make_sample(seconds=1.0)])
    num_tokens = model.num_audio_tokens(16_000)
    length = 7 + num_tokens + 5
    embeds_BTD = torch.randn(1, length, model.project.out_features)
    queries_BWQE = model.hear(batch).queries_BWQE
    mel_BMX = model.whisper.log_mel(batch.waveforms_BN, batch.num_samples_B)
    forwards = {
        "Whisper encoder": lambda: model.whisper.encode(mel_BMX),
        "Q-Former": lambda: model.qformer(torch.randn(1, 100, model.whisper.width), num_tokens),
        "projection": lambda: model.project(queries_BWQE),
        "LLM body": lambda: model.llm.model(inputs_embeds=embeds_BTD, use_cache=False),
        "LLM head": lambda: model.llm.lm_head(embeds_BTD[:, :5]),
    }
    for name, forward in forwards.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            forward()
        assert table[name].flops == counter.get_total_flops() > 0, name


def test_flops_of_many_layers_are_those_of_each_whether_they_are_alike_or_not():
    with torch.device("meta"):
        llm = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
                                     num_attention_heads=4)).requires_grad_(False)  # fmt: skip
    embeds_BTD = torch.empty(1, 7, 32, device="meta")
    mask_B1TT = torch.empty(1, 1, 7, 7, device="meta")
    found = []
    for _ in range(2):
        found.append(count_flops(lambda: llm(inputs_embeds=embeds_BTD, attention_mask=mask_B1TT, use_cache=False)))
        assert count_layers(llm, lambda: llm(inputs_embeds=embeds_BTD, attention_mask=mask_B1TT)) == found[-1]
        assert len(llm.layers) == 5
        llm.layers[3].mlp = torch.nn.Identity()
    assert found[0] - found[1] == 2 * 7 * 3 * 32 * 48


def test_flops_of_a_llm_are_two_a_weight_and_token_plus_attention(parts):
    model = tiny.make_teacher(parts, lora=True).requires_grad_(False)
    lora = Lora(rank=4, alpha=8)
    table = {part.name: part for part in measure(Blueprint(model.config, lora, torch.float32), Usage(1.0, 7, 5))}
    length, width = 7 + model.num_audio_tokens(16_000) + 5, model.project.out_features
    weights = sum(p.numel() for n, p in model.llm.model.layers.named_parameters() if p.ndim == 2 and "lora" not in n)
    rotary = (
        2 * length * width // model.llm.config.num_attention_heads // 2
    )  # counted or not, as transformers writes it
    assert table["LLM body"].flops - 2 * length * weights - 4 * length**2 * width in (0, rotary)
    forwards = []
    for llm in (model.llm, tiny.make_teacher(parts).llm.requires_grad_(False)):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            llm.model(inputs_embeds=torch.randn(1, length, width), use_cache=False)
        forwards.append(counter.get_total_flops())
    assert table["LoRA"].flops == forwards[0] - forwards[1]
    assert table["LoRA"].parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_parameters_and_bytes_are_those_of_the_built_model(parts):
    model = tiny.make_teacher(parts)
    table = measure(Blueprint(model.config, None, torch.float32), Usage())
    assert sum(part.parameters for part in table) == count(model)
    assert sum(part.bytes for part in table) == 4 * count(model)


def test_a_4_bit_llm_keeps_its_embeddings_whole(parts):
    model = tiny.make_teacher(parts)
    table = {p.name: p for p in measure(Blueprint(model.config, None, torch.bfloat16, is_4bit=True), Usage())}
    matrices = sum(p.numel() for p in model.llm.model.layers.parameters() if p.ndim == 2)
    norms = table["LLM body"].parameters - matrices
    assert table["LLM body"].bytes == pytest.approx(nf4_bytes(matrices) + 2 * norms, abs=len(table) * 8)
    assert table["LLM embeddings"].bytes == 2 * table["LLM embeddings"].parameters


def test_an_8_bit_llm_has_the_bytes_of_one_that_was_narrowed(parts):
    model = tiny.make_teacher(parts)
    table = {p.name: p for p in measure(Blueprint(model.config, None, torch.float32, is_8bit=True), Usage())}
    narrow_llm_(model.llm, "int8")
    assert table["LLM body"].bytes == count_bytes(model.llm.model) - count_bytes(model.llm.get_input_embeddings())


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_teacher_that_is_made_of_given_parts_is_described_and_has_no_student(path, capsys):
    assert main(["stats", "model", str(path)]) == 0
    text = capsys.readouterr().out
    assert "teacher (meta-llama/Llama-3.2-3B-Instruct)" in text and "LoRA" in text and "student" not in text


@pytest.mark.parametrize("path", [path for path in WHOLE if path not in STAGES], ids=lambda path: path.stem)
def test_teacher_and_student_of_every_whole_config_are_described_without_their_files(path, tmp_path):
    is_given = bool(load_config(path).teacher.path)
    config = load_config(path, [f"runs={tmp_path}", *([f"teacher.path={tmp_path / 'x'}"] if is_given else [])])
    teacher, given = describe_teacher(config)
    theirs, own = (measure_sizes(x, given) for x in (teacher, describe_student(config, teacher)))
    assert {"Whisper encoder", "Q-Former", "projection", "LLM embeddings", "LLM body", "LoRA"} <= own.keys()
    size, their_size = (sum(bytes_ for _, bytes_ in sizes.values()) for sizes in (own, theirs))
    assert size < 0.7 * their_size


def test_every_part_of_a_recipes_student_has_flops():
    config = load_config(CONFIGS[0].with_name("salmonn_3b_to_05b.yaml"))
    teacher, given = describe_teacher(config)
    table = {part.name: part for part in measure(describe_student(config, teacher), Usage(), given)}
    assert all(
        table[name].flops > 0 for name in ("Whisper encoder", "BEATs", "Q-Former", "LLM body", "LoRA", "LLM head")
    )


def test_the_command_reads_a_checkpoints_sizes_without_its_weights(parts, tmp_path, capsys):
    save_checkpoint(tiny.make_teacher(parts, lora=True), tmp_path / "salmonn.pth")
    (tmp_path / "c.yaml").write_text("name: c\n")
    teacher = [f"teacher.path={tmp_path / 'salmonn.pth'}"]
    names = [f"teacher.llm={parts / 'llm'}", f"teacher.whisper={parts / 'whisper'}"]
    student = [f"student.llm={parts / 'student-llm'}"]
    assert main(["stats", "model", str(tmp_path / "c.yaml"), *teacher, *names, *student]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Q-Former") == 2 and "LoRA" in printed and "GFLOP a sample" in printed


def test_a_script_reads_what_models_cost_as_json_alone(capsys):
    assert main(["stats", "model", "demo", "--seconds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (model,) = found["models"]
    assert found["usage"]["seconds"] == 2 and model["student"]["parts"][0]["flops"] > 0
    teacher, given = describe_teacher(load_config("demo"))
    sizes = {part["name"]: (part["parameters"], part["bytes"]) for part in model["teacher"]["parts"]}
    assert sizes.items() >= measure_sizes(teacher, given).items()


def test_a_model_of_unknown_size_is_refused_with_what_would_do(parts):
    with pytest.raises(FileNotFoundError, match=r"model is 'nobody/nothing', but it is no folder here.*name one of"):
        model_config("nobody/nothing")


def test_a_folder_on_this_disk_comes_before_the_published_sizes(parts):
    assert model_config(str(parts / "llm")).hidden_size == tiny.SIZES.llm_width


def test_qwen2_audio_has_its_published_parameters_and_no_q_former():
    teacher, given = describe_teacher(Config(teacher=TeacherConfig(path="Qwen/Qwen2-Audio-7B-Instruct")))
    model = build_on_meta(teacher, given)
    assert count(model) / 1e9 == pytest.approx(8.397, abs=1e-3)
    assert model.num_audio_tokens(480_000) == 750
