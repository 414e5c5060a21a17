"""Published data sets, in miniature and in their own formats, become the entries that a manifest needs."""

import json
from argparse import ArgumentParser

import pytest
from clips import to_bytes, tone

from shards.audio.decode import load_audio
from shards.manifests.datasets import table as datasets
from shards.manifests.datasets.table import read_dataset
from shards.manifests.manifest import read_manifest


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


@pytest.fixture
def librispeech(tmp_path):
    """The official folders: three subsets with a speaker each, and SPEAKERS.TXT above them."""
    for subset, speaker in (("train-clean-100", "103"), ("train-other-500", "20"), ("dev-clean", "84")):
        chapter = tmp_path / "LibriSpeech" / subset / speaker / "1240"
        chapter.mkdir(parents=True)
        (chapter / f"{speaker}-1240.trans.txt").write_text(f"{speaker}-1240-0000 CHAPTER ONE\n")
    (tmp_path / "LibriSpeech/SPEAKERS.TXT").write_text(
        "; Some pipe(|) separated metadata\n;ID  |SEX| SUBSET           |MINUTES| NAME\n"
        "20   | F | train-other-500  | 30.07 | Gesine\n84   | F | dev-clean        | 8.02  | Christie Nowak\n"
        "103  | M | train-clean-100  | 25.19 | |CBW|Simon\n"
    )
    return tmp_path / "LibriSpeech"


def test_librispeech_leaves_dev_and_test_out_unless_they_are_asked_for(librispeech):
    assert {entry.speaker for entry in read_dataset("librispeech", librispeech)} == {"103", "20"}
    asked = {"dev-clean": "84", "train-clean-100": "103"}
    for subset, speaker in asked.items():
        assert [e.speaker for e in read_dataset("librispeech", librispeech, subsets=[subset])] == [speaker]
    assert [e.speaker for e in read_dataset("librispeech", librispeech / "dev-clean")] == ["84"]


def test_librispeechs_gender_is_read_from_its_table_of_speakers(librispeech):
    entries = list(read_dataset("librispeech", librispeech, task="gender_recognition"))
    assert [(e.speaker, e.text, e.task) for e in entries] == [
        ("103", "Male", "gender_recognition"), ("20", "Female", "gender_recognition")]  # fmt: skip
    below = read_dataset("librispeech", librispeech / "dev-clean", task="gender_recognition")
    assert [e.text for e in below] == ["Female"]
    (librispeech / "SPEAKERS.TXT").write_text("103 | M | train-clean-100 | 25.19 | A\n")
    with pytest.raises(ValueError, match=r"speaker 20 is not in SPEAKERS\.TXT"):
        list(read_dataset("librispeech", librispeech, task="gender_recognition"))
    (librispeech / "SPEAKERS.TXT").unlink()
    with pytest.raises(FileNotFoundError, match=r"SPEAKERS\.TXT"):
        list(read_dataset("librispeech", librispeech, task="gender_recognition"))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("librispeech", "phone_recognition"),
        ("librispeech", "audiocaption"),
        ("gigaspeech", "gender_recognition"),
        ("clotho", "asr"),
        ("audiocaps", "QA"),
        ("wavcaps", "asr"),
        ("musicnet", "audiocaption"),
    ],
)
def test_a_task_that_the_labels_do_not_answer_is_refused(tmp_path, name, task):
    with pytest.raises(ValueError, match=rf"task is '{task}', but the labels of {name} answer "):
        list(read_dataset(name, tmp_path, task=task))


@pytest.mark.parametrize(("name", "subset"), [("gigaspeech", "XXL"), ("clotho", "dev"), ("librispeech", "clean")])
def test_a_part_that_a_data_set_has_not_is_refused(tmp_path, name, subset):
    with pytest.raises(ValueError, match=f"subset is '{subset}', but those of {name} are "):
        list(read_dataset(name, tmp_path, subsets=[subset]))


def write_gigaspeech(folder, segments, **recording):
    """GigaSpeech.json of one recording, as it is published; a segment is in the subsets it names."""
    table = folder / "GigaSpeech.json"
    recording = {"title": "x", "path": "audio/POD0.opus", "aid": "POD0", "subsets": ["{XL}"], **recording}
    table.write_text(json.dumps({"dataset": "GigaSpeech", "audios": [{**recording, "segments": segments}]}))
    return table


def segment(number, text, start, end, *subsets, speaker="N/A"):
    return {"sid": f"POD0_S{number}", "speaker": speaker, "begin_time": start, "end_time": end, "text_tn": text,
            "subsets": [f"{{{subset}}}" for subset in subsets]}  # fmt: skip


def test_gigaspeech_gives_parts_of_long_recordings_without_tags(tmp_path):
    segments = [
        segment(0, "AS THEY'RE LEAVING <COMMA> YES", 1.5, 4, "XL"),
        segment(1, "WHO <QUESTIONMARK>", 5, 6.25, "XL", speaker="Ann"),
        segment(2, "<MUSIC>", 7, 8, "XL"),
    ]
    first, second = read_dataset("gigaspeech", write_gigaspeech(tmp_path, segments))
    assert first.path == tmp_path / "audio/POD0.opus"
    assert (first.text, first.speaker, first.start, first.end) == ("as they're leaving yes", "POD0", 1.5, 4.0)
    assert (second.text, second.speaker, second.start, second.end) == ("who", "Ann", 5.0, 6.25)


def test_gigaspeechs_subsets_are_chosen_and_dev_and_test_never_trained_on(tmp_path):
    parts = {"A": "XS S M L XL", "B": "M L XL", "C": "L XL", "D": "XL", "E": "DEV", "F": "TEST"}
    segments = [segment(i, text, i, i + 1, *names.split()) for i, (text, names) in enumerate(parts.items())]
    table = write_gigaspeech(tmp_path, segments)

    def texts(*subsets):
        return "".join(entry.text for entry in read_dataset("gigaspeech", table, subsets=subsets))

    assert texts() == "abcd"
    wanted = {"XS": "a", "S": "a", "M": "ab", "L": "abc", "XL": "abcd", "DEV": "e", "TEST": "f"}
    assert {subset: texts(subset) for subset in wanted} == wanted
    assert texts("DEV", "TEST") == "ef"
    with pytest.raises(ValueError, match="holds nothing of gigaspeech in M"):
        list(read_dataset("gigaspeech", write_gigaspeech(tmp_path, segments[-1:]), subsets=["M"]))


def test_a_part_of_a_gigaspeech_recording_is_loaded_from_its_place(tmp_path):
    (tmp_path / "a.opus").write_bytes(to_bytes(tone(5.0, 48_000), 48_000, form="OGG", subtype="OPUS"))
    table = write_gigaspeech(tmp_path, [segment(0, "HUM", 2, 3.5, "XL")], path="a.opus")
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


@pytest.fixture
def wavcaps(tmp_path):
    """The published folders of WavCaps: four tables, and its blacklists beside them."""
    folder = tmp_path / "json_files"
    rows = {
        "AudioSet_SL/as_final.json": ["Yone.wav", "Ytwo.wav"],
        "FreeSound/fsd_final.json": ["11", "12"],
        "SoundBible/sb_final.json": ["11"],  # another clip than FreeSound's
        "BBC_Sound_Effects/bbc_final.json": ["NHU05"],
    }
    for name, ids in rows.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps({"data": [{"id": i, "caption": f"{name[0]}{i}"} for i in ids]}))
    (folder / "blacklist").mkdir()
    lists = {
        "test": {"AudioSet": ["Ytwo.wav"], "FreeSound": []},
        "all": {"AudioSet": ["Ytwo.wav"], "FreeSound": ["11"]},
    }
    for name, ids in lists.items():
        (folder / f"blacklist/blacklist_exclude_{name}_ac.json").write_text(json.dumps(ids))
    return folder


def test_wavcaps_leaves_out_what_its_blacklists_name(wavcaps, capsys):
    def captions(labels=wavcaps, **asked):
        return {entry.text for entry in read_dataset("wavcaps", labels, **asked)}

    assert captions() == {"AYone.wav", "F11", "F12", "S11", "BNHU05"}  # without what the tests hold
    assert "1 rows left out by blacklist_exclude_test_ac.json" in capsys.readouterr().err
    whole = wavcaps / "blacklist/blacklist_exclude_all_ac.json"
    assert captions(exclude=[whole]) == {"AYone.wav", "F12", "S11", "BNHU05"}
    assert captions(wavcaps / "AudioSet_SL/as_final.json") == {"AYone.wav"}
    (wavcaps / "blacklist/blacklist_exclude_test_ac.json").unlink()
    assert len(captions()) == 6
    assert "nothing is left out, but it holds clips of AudioCaps' and Clotho's tests" in capsys.readouterr().err
    whole.write_text("[]")
    with pytest.raises(ValueError, match=r"blacklist_exclude_all_ac\.json is no blacklist of WavCaps"):
        captions(exclude=[whole])
    with pytest.raises(FileNotFoundError, match=r"blacklist_exclude_test_ac\.json"):
        captions(exclude=[wavcaps / "blacklist/blacklist_exclude_test_ac.json"])


def test_published_folders_of_recordings_are_found(wavcaps, tmp_path):
    for name in ("audio/FreeSound_flac/12.flac", "clotho/development/a.wav"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    found = {e.text: e.path for e in read_dataset("wavcaps", wavcaps, tmp_path / "audio")}
    assert found["F12"] == tmp_path / "audio/FreeSound_flac/12.flac"
    table = tmp_path / "clotho/clotho_captions_development.csv"
    table.write_text("file_name,caption_1,caption_2,caption_3,caption_4,caption_5\na.wav,1,2,3,4,5\n")
    assert {e.path for e in read_dataset("clotho", table)} == {tmp_path / "clotho/development/a.wav"}


def test_musicnets_own_folder_gives_what_is_for_training_and_its_test_when_asked(tmp_path):
    (tmp_path / "musicnet_metadata.csv").write_text("id,composer\n1727,Schubert\n")
    for part, number in (("train", 1727), ("test", 1759)):
        for kind in ("labels", "data"):
            (tmp_path / f"{part}_{kind}").mkdir()
        (tmp_path / f"{part}_labels/{number}.csv").write_text("start_time,end_time,instrument\n0,88200,1\n")
        (tmp_path / f"{part}_data/{number}.wav").touch()
    (train,) = read_dataset("musicnet", tmp_path)
    (test,) = read_dataset("musicnet", tmp_path, subsets=["test"])
    assert train.path == tmp_path / "train_data/1727.wav" and test.path == tmp_path / "test_data/1759.wav"


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
    told = capsys.readouterr()
    assert "2 rows, 1 of them without their recording" in told.out
    assert f"missing, the first of them: {tmp_path / '2.flac'}" in told.err
    entries = list(read_manifest(tmp_path / "out.json"))
    assert [(entry.task, entry.source) for entry in entries] == [("audiocaption_v2", "wavcaps")] * 2
