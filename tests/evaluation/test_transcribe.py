"""`distill transcribe`: many recordings of any length, in five formats; what cannot be read is named."""

import json

import numpy as np
import pytest
import soundfile
import tiny

from distill.cli import main
from shards.sample import SAMPLE_RATE
from students.student import save_student
from teachers.lora import Lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student whose ears take 2 s, and recordings of 0.6 and 5 s; the longer one pauses at 1.5 and 3 s."""
    root = tmp_path_factory.mktemp("transcribe")
    tiny.make_parts(root / "parts")
    lora = Lora(rank=4, alpha=8)
    save_student(tiny.make_teacher(root / "parts", lora=True), root / "student", lora=lora, quantization="none")
    (root / "clips").mkdir()
    long_N = tiny.tone(2, seconds=5.0)
    for pause in (1.5, 3.0):
        long_N[int(pause * SAMPLE_RATE) - 3200 : int(pause * SAMPLE_RATE) + 3200] = 0
    for name, waveform_N in (("a", tiny.tone(1)), ("b", long_N)):
        soundfile.write(root / "clips" / f"{name}.wav", np.asarray(waveform_N), SAMPLE_RATE, subtype="PCM_16")
    (root / "notes.txt").write_text("no audio")
    return root


def run(folder, *words) -> int:
    return main(["transcribe", str(folder / "student"), *map(str, words), "--max-new-tokens", "4"])


def test_a_folder_is_answered_with_times_and_an_unreadable_file_is_named(folder, capsys):
    assert run(folder, folder / "clips", folder / "notes.txt", folder / "gone.wav", "--json") == 1
    captured = capsys.readouterr()
    a, b, notes, gone = [json.loads(line) for line in captured.out.splitlines()]
    assert [(s["start"], s["end"]) for s in a["segments"]] == [(0.0, 0.6)] and a["error"] is None
    cuts = [s["end"] for s in b["segments"]]
    assert cuts == pytest.approx([1.5, 3.0, 4.9], abs=0.3) or cuts[:2] == pytest.approx([1.5, 3.0], abs=0.2)
    assert [s["start"] for s in b["segments"]] == [0.0, *cuts[:-1]] and cuts[-1] == 5.0
    assert b["text"] == " ".join(s["text"] for s in b["segments"])
    assert "notes.txt" in notes["error"] and "gone.wav" in gone["error"] and not gone["segments"]
    assert "2 of 4 files could not be read" in captured.err


def test_subtitles_are_written_a_file_a_recording(folder, tmp_path, capsys):
    assert run(folder, folder / "clips", "--format", "srt") == 1
    assert "--format is srt, but 2 recordings need a file each; give --out." in capsys.readouterr().err
    for kind, head in (("srt", "1\n00:00:00,000 --> 00:00:00,600\n"), ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:00.6")):
        assert run(folder, folder / "clips", "--format", kind, "--out", tmp_path / kind) == 0
        assert (tmp_path / kind / f"a.{kind}").read_text().startswith(head)
        assert (tmp_path / kind / f"b.{kind}").read_text().count(" --> ") >= 3


def test_one_recording_is_one_text_and_several_are_rows(folder, capsys):
    assert run(folder, folder / "clips" / "a.wav") == 0
    alone = capsys.readouterr().out
    assert run(folder, folder / "clips" / "a.wav", folder / "clips" / "b.wav", "--batch-size", "2") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == f"{folder / 'clips' / 'a.wav'}\t{alone.strip()}"
    assert run(folder, folder / "clips", "--format", "tsv") == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head == "file\tstart\tend\ttext" and first.split("\t")[1:3] == ["0.000", "0.600"]


def test_no_recording_at_all_is_refused_at_once(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "gone.wav") == 1
    assert "gone.wav, but there is no such file; give wav, flac" in capsys.readouterr().err
