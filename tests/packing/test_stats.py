"""The counts of a manifest and of its shards, as a table and as pictures."""

from argparse import ArgumentParser

import pytest
from clips import to_bytes, tone, write_annotation, write_clips

from shards.packing import stats as stats_module
from shards.packing.pack import pack
from shards.packing.stats import measure


@pytest.fixture
def manifest(tmp_path):
    rows = write_clips(tmp_path, 6, seconds=1.0)
    rows[4] = {**rows[4], "task": "QA", "Q": "what?", "source": "other"}
    del rows[5]["text"]
    (tmp_path / "long.wav").write_bytes(to_bytes(tone(29.0)))
    rows.append({"path": "clip000.wav", "text": "two", "task": "asr", "expand_wav": ["long.wav"]})
    return write_annotation(tmp_path / "m.json", rows)


def test_counts_are_by_task_and_data_set(manifest, tmp_path):
    stats = measure(manifest, workers=1)
    source = tmp_path.name
    assert set(stats.counts) == {("asr", source), ("QA", "other")}
    asr = stats.counts["asr", source]
    assert (asr.samples, asr.unlabelled, asr.unknown) == (6, 1, 0)
    assert asr.seconds == pytest.approx(1.0 + 1.01 + 1.02 + 1.03 + 1.05 + (1.0 + 0.1 + 29.0))
    assert asr.longest == pytest.approx(30.1)
    assert stats.total.samples == 7
    assert stats.total.bins.tolist() == [6] + [0] * 13 + [1]


def test_shards_have_the_counts_of_their_manifest(manifest, tmp_path):
    rows = measure(manifest, workers=1)
    pack(manifest, tmp_path / "out", max_bad_share=0.2, workers=1)
    packed = measure(tmp_path / "out")
    assert packed.total.samples == 6  # asr of 30.1 s is left out
    assert packed.counts["QA", "other"].seconds == pytest.approx(rows.counts["QA", "other"].seconds)


def test_a_part_of_a_recording_counts_as_long_as_it_is(tmp_path):
    (tmp_path / "long.wav").write_bytes(to_bytes(tone(20.0)))
    rows = [{"path": "long.wav", "text": "a", "task": "asr", "start": 2, "end": 5.5}]
    assert measure(write_annotation(tmp_path / "m.json", rows), workers=1).total.seconds == 3.5


def test_a_recording_whose_header_tells_nothing_is_counted_as_unknown(tmp_path):
    rows = write_clips(tmp_path, 3)
    (tmp_path / "clip001.wav").write_bytes(b"<html>")
    total = measure(write_annotation(tmp_path / "m.json", rows), workers=1).total
    assert (total.samples, total.unknown) == (3, 1)


def test_the_table_and_the_histogram_say_what_was_counted(manifest, tmp_path):
    text = str(measure(manifest, workers=1))
    lines = text.splitlines()
    assert lines[0].split() == [
        "task",
        "data",
        "set",
        "samples",
        "unlabelled",
        "unknown",
        "hours",
        "mean",
        "s",
        "max",
        "s",
    ]
    assert lines[1].split() == ["QA", "other", "1", "0", "0", "0.00", "1.0", "1.0"]
    assert lines[3].split() == ["all", "7", "1", "0", "0.01", "5.2", "30.1"]
    assert f"   0-2 s  {'█' * 40} 6" in lines
    assert f"  28 s +  {'█' * 7:<40} 1" in lines


def test_the_command_prints_the_table_and_draws_the_picture(manifest, tmp_path, capsys):
    parser = ArgumentParser()
    stats_module.add_arguments(parser)
    png = tmp_path / "lengths.png"
    assert stats_module.main(parser.parse_args([str(manifest), "--png", str(png), "--workers", "1"])) == 0
    assert "unlabelled" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_an_index_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.json is named, but no such file exists"):
        measure(tmp_path)


@pytest.mark.shared
def test_the_table_of_real_data_has_its_counts(shared):
    stats = measure(shared / "data/esc10/train.json", workers=1)
    counts = {task: count.samples for (task, _), count in stats.counts.items()}
    assert counts == {"audiocaption_v2": 240, "QA": 240}
    assert stats.total.seconds == pytest.approx(480 * 5.0, rel=0.02)
