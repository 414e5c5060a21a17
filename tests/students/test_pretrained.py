"""A finished student answers about audio of any length, and goes to a hub and comes back."""

import shutil
from itertools import pairwise

import huggingface_hub
import numpy as np
import pytest
import soundfile
import tiny
import torch

from shards.audio.segmentation import segment_at_quiet
from students import Student, build_student, save_student
from students.asking import Listener, load_waveform
from teachers import Lora, load_salmonn

RATE = 16_000


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_parts(folder / "parts")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    student = build_student(load_salmonn(folder / "teacher"), str(folder / "parts" / "student-llm"), lora=Lora(rank=4),
                            quantization="none")  # fmt: skip
    save_student(student, folder / "student", lora=Lora(rank=4), quantization="none")
    return folder


@pytest.fixture(scope="module")
def student(toys):
    return Student.from_pretrained(toys / "student", device="cpu")


def with_silence(seconds: float, *silences: tuple[float, float]) -> np.ndarray:
    """Noise with silence between these seconds."""
    waveform_N = np.random.default_rng(0).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)
    for start, end in silences:
        waveform_N[int(start * RATE) : int(end * RATE)] = 0
    return waveform_N


def test_a_long_recording_is_cut_in_its_silences():
    waveform_N = with_silence(5, (1.4, 1.8), (3.0, 3.4))
    pieces = segment_at_quiet(waveform_N, 2 * RATE)
    assert [start for start, _ in pieces] == [0, *(end for _, end in pieces[:-1])] and pieces[-1][1] == len(waveform_N)
    assert [round(end / RATE, 1) for _, end in pieces[:2]] == [1.6, 3.2]


@pytest.mark.parametrize("waveform_N", [np.zeros(70_000, np.float32), with_silence(7), with_silence(6.03, (0, 6.0))])
def test_pieces_follow_each_other_and_fit_the_ears(waveform_N):
    pieces = segment_at_quiet(waveform_N, 2 * RATE, RATE // 3)
    assert pieces[0][0] == 0 and pieces[-1][1] == len(waveform_N)
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(RATE // 3 <= end - start <= 2 * RATE for start, end in pieces)


def test_a_recording_that_fits_is_one_piece():
    assert segment_at_quiet(np.zeros(100, np.float32), 100) == [(0, 100)]


def test_segments_are_the_answers_to_their_pieces(student):
    waveform_N = with_silence(3.5, (1.4, 1.8))
    answer = student.transcribe(waveform_N, max_new_tokens=4)
    assert [(round(s.start, 1), round(s.end, 1)) for s in answer.segments] == [(0.0, 1.6), (1.6, 3.5)]
    alone = [
        student.transcribe(waveform_N[int(s.start * RATE) : int(s.end * RATE)], max_new_tokens=4)
        for s in answer.segments
    ]
    assert [s.text for s in answer.segments] == [a.text for a in alone]
    assert answer.text == " ".join(a.text for a in alone if a.text) == str(answer)


def test_paths_arrays_and_tensors_of_any_rate_sound_alike(student, tmp_path):
    x_N = tiny.tone(3, 1.0)
    soundfile.write(tmp_path / "a.wav", x_N, RATE, subtype="PCM_16")
    forms = [
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
        x_N,
        torch.tensor(x_N),
        np.stack([x_N, x_N], 1),
        np.stack([x_N, x_N]),
    ]
    forms.append(np.rint(x_N * 32767).astype(np.int16))
    for form in forms:
        assert np.allclose(load_waveform(form, RATE, student.min_samples), x_N, atol=1e-3)
    assert len(load_waveform(x_N, 8000, student.min_samples)) == 2 * len(x_N)
    answers = student.describe(forms[:3], max_new_tokens=3)
    assert [a.text for a in answers] == [answers[0].text] * 3


def test_a_batch_answers_as_one_by_one_and_in_order(student):
    clips = [tiny.tone(n, 0.5 + 0.4 * (n % 3)) for n in range(5)]
    together = student.answer(clips, "what?", max_new_tokens=4)
    assert [a.text for a in together] == [student.answer(x_N, "what?", max_new_tokens=4).text for x_N in clips]


@pytest.mark.parametrize("audio", [np.zeros(0), np.full(9000, np.nan), np.zeros((2, 2, 2)), np.zeros(9000, int)])
def test_what_is_no_sound_is_refused(student, audio):
    with pytest.raises(ValueError, match=r"audio is an array of .* but must hold finite float or int16 samples"):
        student.transcribe(audio)


def test_a_student_is_saved_and_loaded_and_answers_as_before(student, tmp_path):
    again = Student.from_pretrained(student.save_pretrained(tmp_path / "copy"), device="cpu")
    assert again.settings == student.settings
    clip = tiny.tone(2, 1.0)
    assert again.transcribe(clip, max_new_tokens=5) == student.transcribe(clip, max_new_tokens=5)


def test_a_student_goes_to_the_hub_and_comes_back(student, tmp_path, monkeypatch):
    def create_repo(self, repo_id, *, private, exist_ok):
        (tmp_path / repo_id).mkdir(parents=True)
        (tmp_path / "asked").write_text(f"{private} {exist_ok}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
        return f"hub://{repo_id}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, revision: str(tmp_path / name))
    with pytest.raises(ValueError, match=r"llm of this student is .*, but a hub repository is used on other machines"):
        student.push_to_hub("me/student")
    parts = [student.model.config.llm, student.model.config.whisper]
    monkeypatch.setattr("students.pretrained.HUB_PARTS", ())  # as if the toys' parts had hub ids
    assert student.push_to_hub("me/student") == "hub://me/student"
    assert (tmp_path / "asked").read_text() == "True True" and parts[0] in (
        tmp_path / "me/student/config.json"
    ).read_text()
    clip = tiny.tone(2, 1.0)
    back = Student.from_pretrained("me/student", device="cpu")
    assert back.transcribe(clip, max_new_tokens=5) == student.transcribe(clip, max_new_tokens=5)


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_said_in_one_line():
    with pytest.raises(
        FileNotFoundError, match=r"^student is no/such, but it is no folder here and the hub does not give"
    ):
        Student.from_pretrained("no/such")


def test_a_listener_that_cannot_answer_cannot_be_made():
    with pytest.raises(TypeError, match=r"abstract method '?generate"):
        type("Mute", (Listener,), {"max_samples": 9, "min_samples": 1})()
