"""Published data sets, in miniature and in their own formats, become the entries that a manifest needs."""

import json
from argparse import ArgumentParser

import pytest
from clips import to_bytes, tone

from shards import datasets
from shards.audio import load_audio
from shards.datasets import read_dataset
from shards.manifest import read_manifest


def fields(entries) -> list[tuple]:
    return [(entry.path.name, entry.text, entry.task, entry.question) for entry in entries]


def test_librispeech_gives_a_lower_case_transcript_and_a_speaker_a_file(tmp_path):
    chapter = tmp_path / "train-clean-100/103/1240"
    chapter.mkdir(parents=True)
    chapter.joinpath("103-1240.trans.txt").write_text(
        "103-1240-0000 CHAPTER ONE\n103-1240-0001 MISSUS RACHEL'S HOUSE\n"
    )
    entries = list(read_dataset("librispeech", tmp_path))
    assert fields(entries) == [
        ("103-1240-0000.flac", "chapter one", "asr", None),
        ("103-1240-0001.flac", "missus rachel's house", "asr", None),
    ]
    assert entries[0].path.parent == chapter
    assert {entry.speaker for entry in entries} == {"103"}
    assert [(entry.number, entry.source) for entry in entries] == [(0, "librispeech"), (1, "librispeech")]


def test_gigaspeech_gives_parts_of_long_recordings_without_tags(tmp_path):
    segments = [
        {
            "sid": "POD0_S0",
            "speaker": "N/A",
            "begin_time": 1.5,
            "end_time": 4,
            "text_tn": "AS THEY'RE LEAVING <COMMA> YES",
        },
        {"sid": "POD0_S1", "speaker": "Ann", "begin_time": 5, "end_time": 6.25, "text_tn": "WHO <QUESTIONMARK>"},
        {"sid": "POD0_S2", "speaker": "N/A", "begin_time": 7, "end_time": 8, "text_tn": "<MUSIC>"},
    ]
    table = tmp_path / "GigaSpeech.json"
    recording = {"title": "x", "path": "audio/POD0.opus", "aid": "POD0", "segments": segments}
    table.write_text(json.dumps({"dataset": "GigaSpeech", "version": "v1", "audios": [recording]}))
    first, second = read_dataset("gigaspeech", table)
    assert first.path == tmp_path / "audio/POD0.opus"
    assert (first.text, first.speaker, first.start, first.end) == ("as they're leaving yes", "POD0", 1.5, 4.0)
    assert (second.text, second.speaker, second.start, second.end) == ("who", "Ann", 5.0, 6.25)


def test_a_part_of_a_gigaspeech_recording_is_loaded_from_its_place(tmp_path):
    (tmp_path / "a.opus").write_bytes(to_bytes(tone(5.0, 48_000), 48_000, form="OGG", subtype="OPUS"))
    segment = {"speaker": "N/A", "begin_time": 2, "end_time": 3.5, "text_tn": "HUM"}
    table = tmp_path / "GigaSpeech.json"
    table.write_text(json.dumps({"audios": [{"path": "a.opus", "aid": "A", "segments": [segment]}]}))
    (entry,) = read_dataset("gigaspeech", table)
    assert len(load_audio(entry.paths, start=entry.start, end=entry.end)) == 24_000


def test_clotho_gives_an_entry_a_caption(tmp_path):
    table = tmp_path / "clotho_captions_development.csv"
    table.write_text(
        "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
        'Distorted Machine.wav,"A machine, then a hum",two,three,four,five\n'
    )
    entries = list(read_dataset("clotho", table, tmp_path / "development"))
    assert [entry.text for entry in entries] == ["A machine, then a hum", "two", "three", "four", "five"]
    assert {entry.path for entry in entries} == {tmp_path / "development/Distorted Machine.wav"}
    assert {entry.task for entry in entries} == {"audiocaption"}


@pytest.mark.parametrize(
    "name", ["r1nicOVtvkQ.wav", "r1nicOVtvkQ_130.flac", "r1nicOVtvkQ_130000.wav", "Yr1nicOVtvkQ.wav", "91139.mp3"]
)
def test_audiocaps_finds_its_clip_under_the_names_that_downloaders_give(tmp_path, name):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / name).touch()
    table = tmp_path / "train.csv"
    table.write_text("audiocap_id,youtube_id,start_time,caption\n91139,r1nicOVtvkQ,130,A woman talks\n1,gone,0,A dog\n")
    found, gone = read_dataset("audiocaps", table, tmp_path / "audio")
    assert (found.path.name, found.text) == (name, "A woman talks")
    assert not gone.path.exists()


def test_wavcaps_finds_its_clip_with_and_without_a_suffix_in_the_id(tmp_path):
    for name in ("Yb0RFKhbpFJA.flac", "180913.flac"):
        (tmp_path / name).touch()
    table = tmp_path / "as_final.json"
    rows = [{"id": "Yb0RFKhbpFJA.wav", "caption": "Wind blows.", "duration": 10.0}, {"id": 180913, "caption": "Rain."}]
    table.write_text(json.dumps({"num_captions_per_audio": 1, "data": rows}))
    assert fields(read_dataset("wavcaps", table)) == [
        ("Yb0RFKhbpFJA.flac", "Wind blows.", "audiocaption", None),
        ("180913.flac", "Rain.", "audiocaption", None),
    ]


def test_musicnet_asks_which_instruments_play_in_each_thirty_seconds(tmp_path):
    labels = tmp_path / "train_labels"
    labels.mkdir()
    rate = 44_100
    notes = [(0, 10, 1), (5, 40, 41), (35, 36, 43), (61, 61.5, 1), (64, 64.2, 41)]
    lines = [f"{int(start * rate)},{int(end * rate)},{program},60,0,1,Quarter" for start, end, program in notes]
    (labels / "1727.csv").write_text(
        "start_time,end_time,instrument,note,start_beat,end_beat,note_value\n" + "\n".join(lines)
    )
    entries = list(read_dataset("musicnet", labels, tmp_path / "train_data"))
    assert [(entry.start, round(entry.end, 1), entry.text) for entry in entries] == [
        (0.0, 30.0, "piano, violin"),
        (30.0, 60.0, "violin, cello"),
        (60.0, 64.2, "piano, violin"),
    ]
    assert {(entry.task, entry.question, entry.speaker) for entry in entries} == {
        ("QA", "Which instruments are playing in the music?", "1727")
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("clotho", "file_name,caption\na.wav,one\n", r"line 2\.caption_1 is missing"),
        ("audiocaps", "id,caption\n1,one\n", r"line 2\.youtube_id is missing"),
        ("wavcaps", '{"data": [{"id": "1"}]}', r"data\[0\]\.caption is missing"),
        ("gigaspeech", '{"audios": [3]}', r"audios\[0\]\.segments is missing"),
        ("gigaspeech", '{"data": []}', "has no array 'audios'"),
        ("clotho", "file_name,caption_1\n", "holds nothing of clotho"),
    ],
)
def test_labels_of_another_kind_are_an_error_that_names_the_place(tmp_path, name, text, message):
    table = tmp_path / "labels"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_dataset(name, table))


def test_labels_that_are_not_there_are_an_error_that_names_the_nearest(tmp_path):
    (tmp_path / "clotho_development.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"nearest in .*: clotho_development\.csv"):
        list(read_dataset("clotho", tmp_path / "clotho_developement.csv"))


def test_the_command_writes_a_manifest_and_counts_what_is_missing(tmp_path, capsys):
    (tmp_path / "180913.flac").touch()
    table = tmp_path / "fsd_final.json"
    table.write_text(json.dumps({"data": [{"id": "180913", "caption": "Rain."}, {"id": "2", "caption": "Wind."}]}))
    parser = ArgumentParser()
    datasets.add_arguments(parser)
    args = parser.parse_args(["wavcaps", str(table), str(tmp_path / "out.json"), "--task", "audiocaption_v2"])
    assert datasets.main(args) == 0
    assert "2 rows, 1 of them without their recording" in capsys.readouterr().out
    entries = list(read_manifest(tmp_path / "out.json"))
    assert [(entry.task, entry.source) for entry in entries] == [("audiocaption_v2", "wavcaps")] * 2
