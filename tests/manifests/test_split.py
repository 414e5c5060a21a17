"""Splits share no speaker and no recording; subsets are always the same rows."""

import json
import shutil
from argparse import ArgumentParser
from collections import Counter

import pytest
from clips import write_annotation, write_clips

from shards.manifests import split as split_module
from shards.manifests import subset as subset_module
from shards.manifests.manifest import read_manifest
from shards.manifests.split import split
from shards.manifests.subset import subset


@pytest.fixture
def manifest(tmp_path):
    """Twenty speakers of one to five rows, three sources, three tasks."""
    rows, clips = [], write_clips(tmp_path, 60)
    for speaker in range(20):
        for _ in range(1 + speaker % 5):
            number = len(rows)
            task = ("asr", "QA", "audiocaption")[number % 3]
            rows.append({**clips[number], "speaker": f"s{speaker}", "source": f"set{speaker % 3}", "task": task})
    return write_annotation(tmp_path / "all.json", rows)


def run_split(manifest, name="", **options):
    train, valid = manifest.with_name(f"train{name}.json"), manifest.with_name(f"valid{name}.json")
    report = split(manifest, train, valid, **options)
    return report, list(read_manifest(train)), list(read_manifest(valid))


@pytest.mark.parametrize(("by", "field"), [("speaker", "speaker"), ("source", "source"), ("recording", "path")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_group_is_on_both_sides_and_no_row_is_lost(manifest, by, field, seed):
    report, train, valid = run_split(manifest, by=by, valid_share=0.4, seed=seed)
    assert not {getattr(entry, field) for entry in train} & {getattr(entry, field) for entry in valid}
    assert sorted(entry.path for entry in train + valid) == sorted(entry.path for entry in read_manifest(manifest))
    assert 0 < len(valid) <= 0.4 * 60
    assert (report.num_train, report.num_valid) == (len(train), len(valid))


def test_speakers_that_share_a_recording_stay_together(tmp_path):
    clips = write_clips(tmp_path, 12)
    rows = [{**clip, "speaker": f"s{number // 2}"} for number, clip in enumerate(clips)]
    rows[0]["expand_wav"], rows[2]["expand_wav"] = [clips[3]["path"]], [clips[5]["path"]]  # s0 with s1, s1 with s2
    manifest = write_annotation(tmp_path / "all.json", rows)
    for seed in range(8):
        _, train, valid = run_split(manifest, valid_share=0.5, seed=seed)
        assert not {path for entry in train for path in entry.paths} & {path for entry in valid for path in entry.paths}
        together = [{"s0", "s1", "s2"} & {entry.speaker for entry in side} for side in (train, valid)]
        assert sorted(map(len, together)) == [0, 3]


def test_a_split_is_reproducible_and_depends_on_the_seed(manifest):
    first, again, other = (
        [entry.path for entry in run_split(manifest, str(i), valid_share=0.3, seed=seed)[2]]
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


@pytest.mark.parametrize("by", ["speaker", "recording"])
def test_a_split_is_the_same_wherever_the_data_lie(manifest, tmp_path, by):
    shutil.copytree(tmp_path, tmp_path / "elsewhere" / tmp_path.name)
    moved = tmp_path / "elsewhere" / tmp_path.name / manifest.name
    here, there = (run_split(path, by=by, valid_share=0.3)[2] for path in (manifest, moved))
    assert [entry.path.name for entry in here] == [entry.path.name for entry in there]


def test_the_speaker_is_read_from_the_path_where_the_manifest_has_none(tmp_path):
    rows = []
    for speaker in ("anna", "ben", "carl"):
        rows += [{**row, "path": f"{speaker}/{row['path']}"} for row in write_clips(tmp_path / speaker, 4)]
    manifest = write_annotation(tmp_path / "all.json", rows)
    with pytest.raises(ValueError, match=r"annotation\[0\]\.speaker is missing, .* give speaker_pattern"):
        run_split(manifest)
    _, train, valid = run_split(manifest, valid_share=0.4, speaker_pattern=r"/(\w+)/clip")
    assert len({entry.path.parent.name for entry in valid}) == 1
    assert len(train) == 8


def test_what_cannot_be_split_is_refused(manifest, tmp_path):
    with pytest.raises(ValueError, match="valid_share is 0, but must lie between 0 and 1"):
        run_split(manifest, valid_share=0)
    with pytest.raises(ValueError, match="by is 'person', but must be one of"):
        run_split(manifest, by="person")
    one = write_annotation(tmp_path / "one.json", write_clips(tmp_path, 2))
    with pytest.raises(ValueError, match="has 1 groups by source, but a split needs two"):
        run_split(one, by="source")


def test_the_smallest_group_is_taken_where_none_fits(manifest):
    _, _, valid = run_split(manifest, valid_share=0.001)
    assert len(valid) == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_is_taken_of_each_task(manifest, tmp_path, share):
    report = subset(manifest, tmp_path / "mini.json", share=share)
    chosen = list(read_manifest(tmp_path / "mini.json"))
    for task in ("asr", "QA", "audiocaption"):
        assert sum(entry.task == task for entry in chosen) == round(20 * share)
    assert (report.num_rows, report.num_chosen) == (60, len(chosen))


def test_a_subset_keeps_the_order_is_reproducible_and_grows_with_its_share(manifest, tmp_path):
    def paths(name, **options):
        subset(manifest, tmp_path / name, **options)
        return [entry.path for entry in read_manifest(tmp_path / name)]

    small, large = paths("a.json", share=0.2), paths("b.json", share=0.6)
    assert small == paths("c.json", share=0.2)
    assert small != paths("d.json", share=0.2, seed=1)
    assert set(small) < set(large)
    assert large == sorted(large)


def test_only_the_chosen_tasks_are_kept(manifest, tmp_path):
    subset(manifest, tmp_path / "mini.json", tasks=["QA", "asr"])
    assert {entry.task for entry in read_manifest(tmp_path / "mini.json")} == {"QA", "asr"}
    with pytest.raises(ValueError, match="has no task 'sing', but it was asked for; it has QA, asr, audiocaption"):
        subset(manifest, tmp_path / "mini.json", tasks=["sing"])


def test_hours_are_the_most_that_fits(manifest, tmp_path):
    report = subset(manifest, tmp_path / "mini.json", hours=10 / 3600, workers=1)
    chosen = list(read_manifest(tmp_path / "mini.json"))
    seconds = [0.5 + 0.01 * int(entry.path.stem[4:]) for entry in chosen]
    assert report.seconds == pytest.approx(sum(seconds))
    assert 10 - 1.09 < report.seconds <= 10  # the next clip, of at most 1.09 s, did not fit
    with pytest.raises(ValueError, match="has 60 rows, but none is left"):
        subset(manifest, tmp_path / "mini.json", hours=1e-6, workers=1)


def test_rows_are_the_most_and_a_clips_captions_come_together(tmp_path):
    rows = [
        {"path": f"{clip}.wav", "text": f"{number}", "task": task}
        for number in range(5)
        for clip in range(20)
        for task in ("audiocaption", "asr")
    ]
    (tmp_path / "all.json").write_text(json.dumps({"annotation": rows}))
    for options, most in (({"rows": 12}, 12), ({"share": 0.3}, 30), ({"rows": 3}, 5)):
        subset(tmp_path / "all.json", tmp_path / "mini.json", **options)
        clips = Counter((e.path.name, e.task) for e in read_manifest(tmp_path / "mini.json"))
        assert set(clips.values()) == {5} and len(clips) == 2 * (most // 5)
    with pytest.raises(ValueError, match="rows is 0, but must be at least 1"):
        subset(tmp_path / "all.json", tmp_path / "mini.json", rows=0)


def test_the_commands_write_their_manifests(manifest, tmp_path, capsys):
    def run(module, *arguments) -> int:
        parser = ArgumentParser()
        module.add_arguments(parser)
        return module.main(parser.parse_args([str(argument) for argument in arguments]))

    train, valid = tmp_path / "train.json", tmp_path / "valid.json"
    assert run(split_module, manifest, train, valid, "--valid-share", 0.2, "--by", "recording") == 0
    assert "train: 48 rows of 48 groups, valid: 12 rows of 12 groups" in capsys.readouterr().out
    assert run(subset_module, train, tmp_path / "mini.jsonl", "--share", 0.25, "--hours", 1, "--workers", 1) == 0
    assert "12 of 48 rows" in capsys.readouterr().out


@pytest.mark.shared
def test_fsdd_splits_into_speakers(shared, tmp_path):
    manifest = shared / "data/fsdd/train.json"
    pattern = r"/\d_([a-z]+)_\d+"
    report = split(manifest, tmp_path / "t.json", tmp_path / "v.json", valid_share=0.25, speaker_pattern=pattern)
    assert (report.train_groups, report.valid_groups) == (4, 1)
    assert report.num_train + report.num_valid == 6000
