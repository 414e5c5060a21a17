"""Exports of a student whose ears have LoRA: each hears with it, or is refused by name."""

import json
import re
import shutil

import pytest
import tiny
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file
from transformers import AutoTokenizer

from distill.cli import main
from distill.config import load_config
from distill.demo.scratch import build_llm
from distill.run import run
from students.device.modules import list_pieces
from students.device.student import DeviceStudent
from students.student import load_student
from teachers.int8 import RowLinear

SAMPLES = [tiny.make_sample(1), tiny.make_sample(2, seconds=1.3)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that trained LoRA on the ears so fast that they hear otherwise than their Whisper."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_parts(folder / "parts")
    tokenizer = AutoTokenizer.from_pretrained(folder / "parts/student-llm")
    build_llm(len(tokenizer), 64, 1, tokenizer).save_pretrained(folder / "parts/student-llm")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    tiny.make_shards(folder / "data", num_samples=6)
    tiny.make_shards(folder / "data", num_samples=4, split="test")
    path = tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts",
                             teacher__online=True, train__learning_rate=0.02, student__ears_lora_rank=2)  # fmt: skip
    config = load_config(path)
    assert run(config) == 0
    student = load_student(config.run_folder / "student")
    deaf = float((frames_of(student) - frames_of(student, without_lora=True)).abs().max())
    assert deaf > 0.05  # what an export that forgot LoRA would be off by
    return config.run_folder


@torch.no_grad()
def frames_of(model, *, without_lora: bool = False) -> torch.Tensor:
    batch = model.collate(SAMPLES)
    kept = {name: p.clone() for name, p in model.whisper.named_parameters() if "lora_B" in name}
    for name in kept if without_lora else ():
        model.whisper.get_parameter(name).zero_()
    frames_BRE = model.frames(batch.waveforms_BN, batch.num_samples_B)[0]
    for name, tensor in kept.items():
        model.whisper.get_parameter(name).copy_(tensor)
    return frames_BRE


def export(finished, out, *words: str):
    assert main(["export", str(finished), str(out), *words]) == 0
    return out


def test_a_whole_merged_export_hears_with_it_and_its_card_says_so(finished, tmp_path):
    out = export(finished, tmp_path / "out", "--merge", "--whole")
    exported = load_student(shutil.move(out, tmp_path / "moved"))
    assert torch.equal(frames_of(exported), frames_of(load_student(finished / "student")))
    assert "whisper`, with LoRA of rank 2\n" in (tmp_path / "moved/README.md").read_text()


def test_ears_are_put_in_int8_beside_it_and_the_folder_holds_no_ears(finished, tmp_path, capfd):
    out = export(finished, tmp_path / "out", "--ears-bits", "int8")
    assert re.search(r"ears in int8: error of their frames on 4 clips whisper 0\.0", capfd.readouterr().err)
    exported, trained = load_student(out), load_student(finished / "student")
    assert sum(isinstance(module, RowLinear) for module in exported.whisper.modules()) == 6
    error = (frames_of(exported) - frames_of(trained)).norm() / frames_of(trained).norm()
    assert 0 < float(error) < 0.03
    ears = [name for name in load_file(out / "model.safetensors") if name.startswith("whisper.")]
    assert len(ears) == 12 and all("lora_" in name for name in ears)


def test_a_device_hears_with_it_and_answers_as_the_student(finished, tmp_path):
    out = export(finished, tmp_path / "out", "--device", "openvino", "--head", "f32", "--ears", "f32")
    measured = json.loads((out / "device.json").read_text())["measured"]
    assert measured["head f32, ears f32, products exact"]["logit_error"] < 1e-4
    student = load_student(finished / "student")
    assert DeviceStudent(out).generate(SAMPLES, max_new_tokens=6) == student.generate(SAMPLES, max_new_tokens=6)


def test_onnx_ears_hear_with_it(finished, tmp_path, capfd):
    out, student = export(finished, tmp_path / "out", "--format", "onnx-ears"), load_student(finished / "student")
    assert re.search(r"onnx-ears: outputs off by whisper \S+e-0[6-9]", capfd.readouterr().err)
    mel_BMX = next(iter(list_pieces(student))).inputs["mel"] + torch.linspace(-1, 1, 80)[:, None]
    (got,) = InferenceSession(out / "whisper.onnx").run(None, {"mel": mel_BMX.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), student.whisper.encode(mel_BMX), rtol=1e-3, atol=1e-4)


def test_salmonns_own_code_which_could_not_hear_with_it_gets_no_file(finished, tmp_path, capfd):
    assert main(["export", str(finished), str(tmp_path / "out"), "--salmonn"]) == 1
    assert "ears_lora_rank of the student is 2, but SALMONN's code, which reads" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
