"""A folder exported for devices is the trained student, without torch and without the machine it is from."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import soundfile
import tiny
import torch
from onnxruntime import InferenceSession
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill.cli import main
from distill.config import load_config
from distill.demo.scratch import build_llm
from distill.evaluation.efficiency import Efficiency, make_rows, measure_all, read_efficiency
from distill.evaluation.efficiency import main as measure
from distill.evaluation.evaluate import list_models
from distill.evaluation.report import write_report
from distill.exporting.gguf import to_iq4_nl, write_gguf
from distill.exporting.onnx import write_onnx
from distill.run import run
from students.device.__main__ import main as run_device
from students.device.export import MAX_ERROR, WHOLE, choose, describe, write_graphs
from students.device.modules import list_pieces
from students.device.student import DeviceStudent
from students.device.verify import ask_student, compare
from students.student import load_student
from teachers.ears.beats import BeatsConfig, BeatsEar
from teachers.ears.eat import EatConfig, EatEar
from teachers.salmonn import Salmonn

ROOT = Path(__file__).parents[2]
F32 = ["--head", "f32", "--ears", "f32"]  # so that no near tie of toys decides otherwise
SAMPLES = [tiny.make_sample(1), tiny.make_sample(2, seconds=1.3), tiny.make_sample(3, seconds=0.4)]
WITHOUT_TORCH = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "bitsandbytes", "peft", "accelerate"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Forbidden())
from students.device.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run whose 4-bit student's LLM is 64 wide, and the student's answers."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_parts(folder / "parts")
    tokenizer = AutoTokenizer.from_pretrained(folder / "parts" / "student-llm")
    build_llm(len(tokenizer), 64, 1, tokenizer).save_pretrained(folder / "parts" / "wide")
    tokenizer.save_pretrained(folder / "parts" / "wide")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    tiny.make_shards(folder / "data", num_samples=6)
    tiny.make_shards(folder / "data", num_samples=4, split="test")
    path = tiny.write_config(folder / "toy.yaml", folder / "data", folder / "teacher", folder / "parts",
                             student__llm=folder / "parts" / "wide", teacher__online=True,
                             train__learning_rate=0.02, eval__max_new_tokens=8)  # fmt: skip
    config = load_config(path)
    assert run(config) == 0
    return config.run_folder


class Exported(type(Path())):
    """The exported folder, and what the student's held before."""

    before: dict[str, bytes]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def exported(finished):
    out = Exported(finished.parent / "device")
    out.before = read_files(finished / "student")
    assert main(["export", str(finished), str(out), "--device", "openvino", *F32]) == 0
    return out


def test_it_answers_as_the_student_greedy_and_by_beams_in_batches_of_any_size(finished, exported):
    student, device = load_student(finished / "student"), DeviceStudent(exported)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.0}, {"repetition_penalty": 1.3}):
        expected = student.generate(SAMPLES, max_new_tokens=8, **options)
        assert device.generate(SAMPLES, max_new_tokens=8, **options) == expected
        assert [device.generate([s], max_new_tokens=8, **options)[0] for s in SAMPLES] == expected


def test_the_manifest_says_how_far_each_precision_is_from_the_student(exported):
    device = json.loads((exported / "device.json").read_text())
    whole = device["measured"]["head f32, ears f32, products exact"]
    assert whole["logit_error"] < 1e-4 < MAX_ERROR == device["measured"]["max_error"]
    assert len(device["measured"]) == 7 and whole["texts_equal"] == whole["clips"] == 4
    card = (exported / "README.md").read_text()
    assert card.count("| head ") == 6 and "4 of 4" in card
    assert set(device["files"]) == {file.name for file in exported.iterdir()} - {"device.json", "README.md"}


def test_a_student_that_ends_at_once_is_verified_too(finished, exported):
    expected = ask_student(load_student(finished / "student"), SAMPLES, max_new_tokens=1)
    assert [len(ids) for ids in expected.ids] == [len(logits_SV) for logits_SV in expected.logits] == [1, 1, 1]
    found = compare(exported, expected, "exact", max_new_tokens=1)
    assert found.logit_error < 1e-4 and found.texts_equal == found.clips == 3


def test_it_answers_where_torch_cannot_be_imported_under_another_home(finished, exported, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "moved")
    soundfile.write(tmp_path / "a.wav", tiny.tone(1), 16_000)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, moved, tmp_path / "a.wav", "--max-new-tokens", "8"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    expected = load_student(finished / "student").generate(SAMPLES[:1], max_new_tokens=8)
    assert (done.stdout, done.returncode) == (expected[0] + "\n", 0), done.stderr


def test_transcribe_takes_it_and_cuts_what_is_longer_than_its_ears(exported, tmp_path, capsys):
    long_N = np.concatenate([tiny.tone(1, 1.5), np.zeros(8000, np.float32), tiny.tone(2, 1.5)])
    soundfile.write(tmp_path / "a.wav", long_N, 16_000)
    assert main(["transcribe", str(exported), str(tmp_path / "a.wav"), "--json", "--max-new-tokens", "4"]) == 0
    segments = json.loads(capsys.readouterr().out)["segments"]
    assert len(segments) == 2 and segments[0]["end"] == segments[1]["start"] == pytest.approx(1.75, abs=0.3)


def test_pieces_of_a_stream_are_the_answer(exported):
    device = DeviceStudent(exported)
    device.ends = []  # so that it says more than a word
    answer = device.generate(SAMPLES[1:2], max_new_tokens=8)[0]
    assert "".join(device.stream(SAMPLES[1].waveform_N, max_new_tokens=8)) == answer


def test_a_stream_says_what_is_certain_as_soon_as_it_is(exported, monkeypatch):
    """Of chosen ids, as what toys say is chance: no half character, no blank that may be the last, no half end."""
    device = DeviceStudent(exported)
    device.rows.end = dataclasses.replace(device.rows.end, text="</s>")
    ids = device.tokenizer.encode("one café two <")
    steps = [ids[:length] for length in range(1, len(ids) + 1)]

    def say(samples, *, on_ids, max_new_tokens):
        for step in steps:
            on_ids([step])
        return steps[-1:]

    monkeypatch.setattr(device, "answer_ids", say)
    pieces = list(device.stream(SAMPLES[1].waveform_N))
    assert "".join(pieces) == device.read(ids) == "one café two <"
    assert len(pieces) > 3 and pieces[-1].endswith("<") and not any("\ufffd" in piece for piece in pieces)


def test_an_export_changed_no_byte_of_the_student(finished, exported):
    assert read_files(finished / "student") == exported.before


def test_a_folder_that_was_changed_or_is_of_another_version_is_refused(exported, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "moved")
    (moved / "llm.bin").write_bytes((moved / "llm.bin").read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"llm\.bin has sha256 .*, but device\.json says"):
        DeviceStudent(moved)
    text = (moved / "device.json").read_text()
    (moved / "device.json").write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="is of version 7, but this runner reads 1"):
        DeviceStudent(moved)
    (moved / "banks.npz").unlink()
    (moved / "device.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"banks\.npz is missing"):
        DeviceStudent(moved)


def test_what_a_device_does_not_take_is_said(finished, exported, capsys):
    assert main(["export", str(finished), str(exported), "--device", "openvino"]) == 1
    assert "an export starts empty" in capsys.readouterr().err
    assert main(["export", str(finished), "elsewhere", "--device", "openvino", "--merge"]) == 1
    assert "a device's folder is whole" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"lasts 3\.00 s, but these ears take"):
        DeviceStudent(exported).generate([tiny.make_sample(1, seconds=3.0)])
    with pytest.raises(ValueError, match="max_new_tokens is 5000, but the prompt has"):
        DeviceStudent(exported).generate(SAMPLES[:1], max_new_tokens=5000)


def test_every_block_of_the_page_about_devices_works_in_order(finished, exported, tmp_path, monkeypatch, capsys):
    """Its first line is what made `exported`, in another type."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-device").symlink_to(exported)
    for folder in ("recordings", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs/demo").symlink_to(finished)
    soundfile.write("recordings/0.wav", tiny.tone(1), 16_000)
    said = []
    for language, text in re.findall(r"(?m)^```(\w+)\n([^`]*)^```", (ROOT / "docs/device.md").read_text()):
        if language == "python":
            exec(text, {})
        for words in (shlex.split(line, comments=True) for line in text.splitlines() if language == "bash"):
            is_runner = words[:3] == ["python", "-m", "students.device"]
            if "--device" not in words:
                assert (run_device(words[3:]) if is_runner else main(words[1:])) == 0, words
        said.append(capsys.readouterr().out)
    by_commands, in_python, _ = said
    assert by_commands and in_python  # not alike: a toy is unsure, and the last bit of a sum may choose its next word
    assert sorted(path.name for path in tmp_path.glob("for-*")) == ["for-llama", "for-onnx", "for-vllm"]


def test_evaluating_shows_the_folder_beside_student_and_teacher(finished, exported, capsys):
    shutil.copytree(exported, finished / "device")
    assert main(["evaluate", str(finished), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["device"]["scores"] == card["student"]["scores"] and card["device"]["first_token_ms"] > 0
    assert main(["report", str(finished)]) == 0
    assert "on a device" in capsys.readouterr().out


def test_costs_of_an_answer_are_measured_in_a_process_of_its_own(finished, exported, capsys):
    config = load_config(finished / "config.yaml")
    places = list_models(config, [exported])
    assert [*places][:2] == ["teacher", "student"] and places[str(exported)] == exported
    with pytest.raises(FileNotFoundError, match="--export is nowhere, but that is no folder"):
        list_models(config, [Path("nowhere")])

    found = measure_all(config, {"device": exported}, {"device": 0.25})
    measure([str(finished / "config.yaml"), "student", str(finished / "student")])  # in this very process
    student = Efficiency(**json.loads(capsys.readouterr().out))
    assert 0 < found[0].gb < student.gb and found[0].wer == 0.25 and student.wer is None
    for one in (*found, student):
        assert one.first_ms > 0 and one.second_ms > 0 and one.tokens_per_second > 0 and one.rtf > 0
    assert read_efficiency(finished) == found and make_rows(found)[1][0] == "device"
    assert "WER (%) against GB at the peak" in write_report(finished).read_text()


@pytest.mark.parametrize(("form", "most"), [("vllm", 2e-2), ("bnb", 0.3), ("gguf-q8_0", 2e-2), ("gguf-iq4_nl", 0.3)])
def test_each_other_format_is_read_back_and_its_error_said(finished, tmp_path, form, most, capfd):
    out = tmp_path / "out"
    assert main(["export", str(finished), str(out), "--format", form]) == 0
    said = re.search(rf"{form}: logits (\S+) off, KL (\S+) nats", capfd.readouterr().err)
    assert 0 < float(said[1]) < most
    assert said[0].split(": ")[1] in (out / "USE.md").read_text()
    assert list(out.rglob("*.gguf" if "gguf" in form else "llm/model.safetensors"))


@pytest.mark.parametrize(("option", "package", "module", "extra"), [
    ("--device openvino", "openvino", "distill.exporting.device", "device"),
    ("--format gguf-q8_0", "gguf", "distill.exporting.gguf", "formats"),
    ("--format onnx-ears", "onnx", "distill.exporting.onnx", "formats"),
])  # fmt: skip
def test_an_option_whose_package_is_missing_names_the_extra_that_has_it(
    finished, tmp_path, monkeypatch, capfd, option, package, module, extra
):
    for name in [name for name in sys.modules if name == module or name.startswith("students.device.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(finished), str(tmp_path / "out"), *option.split()]) == 1
    expected = f"{package} is not installed, but {option} needs it; pip install 'distill-audio[{extra}]'."
    assert expected in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_the_ears_as_onnx_say_how_far_they_are_from_torch(finished, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["export", str(finished), str(out), "--format", "onnx-ears"]) == 0
    said = re.search(
        r"onnx-ears: (outputs off by whisper (\S+), connector (\S+) over \d clips)", capfd.readouterr().err
    )
    assert float(said[2]) < 1e-5 and float(said[3]) < 1e-5
    assert said[1] in (out / "USE.md").read_text()
    assert sorted(p.name for p in out.iterdir()) == [
        "USE.md", "connector.bin", "connector.onnx", "whisper.bin", "whisper.onnx"
    ]  # fmt: skip


def test_a_gguf_file_holds_what_was_quantized_bit_by_bit(tmp_path):
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=40, tie_word_embeddings=True)  # fmt: skip
    llm = LlamaForCausalLM(config)
    llm.save_pretrained(tmp_path / "llm")
    (tmp_path / "llm/tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    kind = gguf.GGMLQuantizationType.Q8_0
    held = write_gguf(tmp_path / "llm", tmp_path / "llm.gguf", "Q8_0")
    for name, parameter in llm.named_parameters():
        array = parameter.detach().numpy()
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind) if array.ndim == 2 else array
        np.testing.assert_array_equal(held[name], expected)
    wide = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    read = gguf.quants.dequantize(to_iq4_nl(wide), gguf.GGMLQuantizationType.IQ4_NL)
    assert np.abs(read - wide).max() < 0.15 * np.abs(wide).max()


SECONDS = {
    "beats": lambda: BeatsEar(BeatsConfig(32, 64, 64, 2, 4, conv_pos=16, conv_pos_groups=4)),
    "eat": lambda: EatEar(EatConfig(embed_dim=64, depth=2, num_heads=4, ffn_dim=64)),
}


@pytest.mark.parametrize(
    ("kind", "window_seconds", "ears_seconds"),
    [("beats", 0.34, "30"), ("eat", 0.0, "30"), ("eat", 0.34, "clip+0.1"), ("beats", 0.0, "clip")],
)
def test_a_second_ear_is_heard_in_a_batch_as_in_torch(finished, tmp_path, kind, window_seconds, ears_seconds):
    trained = load_student(finished / "student")
    torch.manual_seed(1)
    config = dataclasses.replace(trained.config, second="it", second_kind=kind, window_seconds=window_seconds,
                                 ears_seconds=ears_seconds, windows="audio")  # fmt: skip
    student = Salmonn(config, trained.llm, trained.tokenizer, trained.whisper, SECONDS[kind]()).eval()
    write_graphs(student, tmp_path)
    choose(tmp_path, WHOLE)
    describe(student, "toy", WHOLE).write(tmp_path)
    found = DeviceStudent(tmp_path, check_files=False).hear([sample.waveform_N for sample in SAMPLES])
    batch = student.collate(SAMPLES, with_answer=False)
    with torch.no_grad():
        heard = student.hear(batch)
        expected = student.project(heard.queries_BWQE)
    for tokens_LD, row_WQD, num_windows in zip(found, expected, heard.num_windows_B):
        np.testing.assert_allclose(tokens_LD, row_WQD[:num_windows].flatten(0, 1), atol=2e-3)


@pytest.mark.parametrize(("kind", "window_seconds"), [("beats", 0.34), ("eat", 0.0)])
def test_onnx_graphs_of_two_ears_hear_as_torch_does_at_another_length_and_from_another_folder(
    finished, tmp_path, kind, window_seconds
):
    trained = load_student(finished / "student")
    config = dataclasses.replace(trained.config, second="it", second_kind=kind, window_seconds=window_seconds)
    student = Salmonn(config, trained.llm, trained.tokenizer, trained.whisper, SECONDS[kind]())
    (tmp_path / "out").mkdir()
    said = write_onnx(student, tmp_path / "out", SAMPLES)
    assert [name for name in ("whisper", "second", "connector") if f"{name} " in said] == [
        "whisper",
        "second",
        "connector",
    ]
    moved = shutil.copytree(tmp_path / "out", tmp_path / "moved")
    shutil.rmtree(tmp_path / "out")
    lengths = torch.tensor([80, 64])
    for piece in list_pieces(student):
        inputs = [torch.randn(2, *(80 if size < 0 else size for size in shape[1:])) if len(shape) == 3 else lengths
                  for shape in piece.shapes]  # fmt: skip
        (got,) = InferenceSession(moved / f"{piece.name}.onnx").run(
            None, {name: x.numpy() for name, x in zip(piece.inputs, inputs)}
        )
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), piece.module(*inputs), rtol=1e-3, atol=1e-4)
