"""The audit: every fault is found with its reason, only what is lossless is fixed, and nothing is replaced."""

import json
from argparse import ArgumentParser

import numpy as np
import pytest
import soundfile
from clips import to_bytes, tone, write_annotation, write_clips

from distill.cli import main
from shards.manifests.manifest import KnownTasks, read_manifest
from shards.packing import audit as audit_module
from shards.packing import pack as pack_module
from shards.packing.audit import audit
from shards.packing.findings import REASONS
from shards.packing.pack import pack


def read_findings(out) -> dict[int, dict[str, str]]:
    """Row -> reason -> verdict."""
    findings = {}
    for line in (out / "audit.jsonl").read_text().splitlines():
        finding = json.loads(line)
        assert finding["path"] and finding["message"] and isinstance(finding["numbers"], dict)
        findings.setdefault(finding["number"], {})[finding["reason"]] = finding["verdict"]
    return findings


def kept_rows(report) -> list[str | None]:
    return [entry.text for entry in read_manifest(report.cleaned[0])]


def with_value(value: float) -> bytes:
    waveform_N = tone(1.0)
    waveform_N[100] = value
    return to_bytes(waveform_N, subtype="FLOAT")


FAULTS = {
    "decode": (b"<html>", {"decode": "drop"}),
    "truncated": (to_bytes(tone(2.0))[:20_000], {"truncated": "drop"}),
    "empty": (to_bytes(np.zeros(0, np.float32)), {"too_short": "drop"}),
    "silent": (to_bytes(np.zeros(16_000, np.float32)), {"silent": "drop"}),
    "clipped": (to_bytes(np.clip(3 * tone(1.0), -1, 1)), {"clipped": "drop"}),
    "nan": (with_value(np.nan), {"nonfinite": "drop"}),
    "loud": (with_value(20_000.0), {"out_of_range": "drop"}),
    "long": (to_bytes(tone(31.0)), {"too_long": "drop"}),
    "window": (to_bytes(tone(0.2)), {"under_window": "fix"}),
    "rate": (to_bytes(tone(1.0, 8_000), 8_000), {"wrong_rate": "fix"}),
    "stereo": (to_bytes(np.stack([tone(1.0)] * 2, 1)), {"stereo": "fix"}),
    "two": (
        to_bytes(np.stack([tone(31.0, 22_050)] * 2, 1), 22_050),
        dict(wrong_rate="fix", stereo="fix", too_long="drop"),
    ),
    "mp3": (to_bytes(tone(4.0), form="MP3", subtype="MPEG_LAYER_III")[:-3_000], {"truncated": "drop"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_recording_gets_its_reason_and_its_verdict(tmp_path, name):
    data, expected = FAULTS[name]
    rows = write_clips(tmp_path, 1)
    (tmp_path / "odd").write_bytes(data)
    manifest = write_annotation(tmp_path / "m.json", [{"path": "odd", "text": "words", "task": "asr"}, *rows])
    report = audit([manifest], tmp_path / "out", workers=1)
    assert read_findings(tmp_path / "out") == {0: expected}
    is_kept = "drop" not in expected.values()
    assert kept_rows(report) == (["words"] if is_kept else []) + ["tone 0"]
    assert (report.num_rows, report.num_kept, report.num_dropped) == (2, 1 + is_kept, 1 - is_kept)


def test_what_the_audit_keeps_packs_without_a_bad_sample(tmp_path):
    rows = []
    for number, (name, (data, _)) in enumerate(FAULTS.items()):
        (tmp_path / name).write_bytes(data)
        rows.append({"path": name, "text": f"a {name} tone", "task": ("asr", "audiocaption")[number % 2]})
    manifest = write_annotation(tmp_path / "m.json", rows)
    report = audit([manifest], tmp_path / "audited", workers=1)
    packed = pack(report.cleaned[0], tmp_path / "packed", workers=1)
    assert (packed.num_samples, packed.bad) == (report.num_kept, ())
    assert packed.seconds == pytest.approx(report.seconds, abs=0.4)  # one clip is padded to a window


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"path": "clip000.wav", "text": "", "task": "asr"}, {"empty_text": "drop"}),
        ({"path": "clip000.wav", "text": 3, "task": "asr"}, {"type": "drop"}),
        ({"path": "clip000.wav", "text": "word " * 60, "task": "asr"}, {"long_text": "drop"}),
        ({"path": "clip000.wav", "text": "word " * 60, "task": "audiocaption"}, {}),
        ({"path": "clip000.wav", "text": "word " * 900, "task": "audiocaption"}, {"long_text": "drop"}),
        ({"path": "clip000.wav", "text": "one </s> two", "task": "asr"}, {"control_text": "keep"}),
        ({"path": "clip000.wav", "text": "a <|im_end|> b", "task": "audiocaption"}, {"control_text": "keep"}),
        ({"path": "clip000.wav", "text": "x", "task": "QA", "Q": "<|eot_id|>?"}, {"control_text": "keep"}),
        ({"path": "clip000.wav", "text": "s / > < |x| [laughs] <noise>", "task": "asr"}, {}),
        ({"path": "nothing.wav", "text": "one", "task": "asr"}, {"missing": "drop"}),
        ({"path": ".", "text": "one", "task": "asr"}, {"unreadable": "drop"}),
        ({"path": "/dev/zero", "text": "one", "task": "asr"}, {"unreadable": "drop"}),
        ({"path": "clip000.wav", "task": "asr"}, {}),
        ({"path": "clip000.wav", "text": "two", "task": "QA"}, {"missing_question": "drop"}),
        ({"path": "clip000.wav", "text": "two", "task": "QA", "Q": " "}, {"missing_question": "drop"}),
        ({"path": "clip000.wav", "text": "two", "task": "QA", "Q": "How many tones?"}, {}),
    ],
)
def test_a_faulty_row_gets_its_reason(tmp_path, row, expected):
    write_clips(tmp_path, 1)
    audit(
        [write_annotation(tmp_path / "m.json", [row])], tmp_path / "out", tasks=KnownTasks(questions={"QA"}), workers=1
    )
    assert read_findings(tmp_path / "out") == ({0: expected} if expected else {})


def test_a_line_that_is_not_json_is_dropped_and_the_rest_kept(tmp_path):
    (row,) = write_clips(tmp_path, 1)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(f"{{\n{json.dumps(row)}\n")
    report = audit([manifest], tmp_path / "out", workers=1)
    assert read_findings(tmp_path / "out") == {0: {"json": "drop"}}
    assert report.cleaned == [tmp_path / "out/m.jsonl"]
    assert kept_rows(report) == ["tone 0"]


def test_a_row_of_an_unknown_task_is_dropped_with_the_nearest_and_the_rest_kept(tmp_path):
    first, second = write_clips(tmp_path, 2)
    manifest = write_annotation(tmp_path / "m.json", [{**first, "task": "asrr"}, second])
    report = audit([manifest], tmp_path / "out", tasks=KnownTasks({"asr", "QA"}), workers=1)
    assert read_findings(tmp_path / "out") == {0: {"unknown_task": "drop"}}
    assert "did you mean 'asr'?" in (tmp_path / "out/audit.jsonl").read_text()
    assert kept_rows(report) == ["tone 1"]


def test_the_shortest_and_the_longest_clip_can_be_chosen_and_pack_takes_the_same(tmp_path, capsys):
    for name, seconds in (("a", 0.5), ("b", 2.0), ("c", 5.0), ("d", 5.0)):
        (tmp_path / f"{name}.wav").write_bytes(to_bytes(tone(seconds)))
    rows = [{"path": f"{name}.wav", "text": "x", "task": "audiocaption" if name == "d" else "asr"} for name in "abcd"]
    manifest = write_annotation(tmp_path / "m.json", rows)
    limits = ["--min-seconds", "1", "--max-seconds", "4", "--workers", "1"]
    parser = ArgumentParser()
    audit_module.add_arguments(parser)
    assert audit_module.main(parser.parse_args([str(manifest), "--out", str(tmp_path / "out"), *limits])) == 0
    found = read_findings(tmp_path / "out")
    assert (found[0]["too_short"], found[2]["too_long"], found[3]["too_long"]) == ("drop", "drop", "fix")
    packer = ArgumentParser()
    pack_module.add_arguments(packer)
    packed = [str(tmp_path / "out/m.json"), str(tmp_path / "packed"), *limits]
    assert pack_module.main(packer.parse_args(packed)) == 0
    assert "2 samples" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--max-seconds is 40, but a sample holds 30 at most"):
        audit_module.main(parser.parse_args([str(manifest), "--max-seconds", "40"]))
    with pytest.raises(ValueError, match="min_seconds is 5, but must be from 0 to below max_seconds"):
        audit_module.main(parser.parse_args([str(manifest), "--min-seconds", "5", "--max-seconds", "4"]))


@pytest.mark.parametrize("too_long", ["fix", "drop"])
def test_a_long_clip_is_cut_where_a_policy_or_its_label_allows(tmp_path, too_long):
    (tmp_path / "a.wav").write_bytes(to_bytes(tone(31.0)))
    rows = [{"path": "a.wav", "text": "a tone", "task": task} for task in ("audiocaption", "asr")]
    rows += [{"path": "a.wav", "task": "asr"}]
    manifest = write_annotation(tmp_path / "m.json", rows)
    audit([manifest], tmp_path / "auto", workers=1)
    assert [found["too_long"] for found in read_findings(tmp_path / "auto").values()] == ["fix", "drop", "fix"]
    report = audit([manifest], tmp_path / "out", policy={"too_long": too_long}, workers=1)
    assert {found["too_long"] for found in read_findings(tmp_path / "out").values()} == {too_long}
    assert report.seconds == (90.0 if too_long == "fix" else 0.0)


def test_the_same_samples_in_another_file_are_a_duplicate(tmp_path):
    first, second = write_clips(tmp_path, 2)
    samples_N, rate = soundfile.read(tmp_path / "clip000.wav", dtype="int16")
    soundfile.write(tmp_path / "copy.flac", samples_N, rate)
    copy = {**first, "path": "copy.flac"}
    other_task = {**copy, "task": "audiocaption"}
    manifest = write_annotation(
        tmp_path / "m.json", [first, second, copy, other_task, {**other_task, "text": "two captions"}, other_task]
    )
    report = audit([manifest], tmp_path / "out", workers=1)
    assert read_findings(tmp_path / "out") == {2: {"duplicate": "keep"}, 5: {"duplicate": "keep"}}
    assert report.num_kept == 6
    report = audit([manifest], tmp_path / "out", policy={"duplicate": "drop"}, workers=1)
    assert kept_rows(report) == ["tone 0", "tone 1", "tone 0", "two captions"]


def test_a_recording_of_a_later_manifest_is_dropped_from_the_earlier(tmp_path):
    rows = write_clips(tmp_path, 4)
    joined = {**rows[0], "expand_wav": [rows[3]["path"]]}
    train = write_annotation(tmp_path / "train.json", [*rows[:3], joined])
    test = write_annotation(tmp_path / "test.json", [rows[2], rows[3]])
    report = audit([train, test], tmp_path / "out", workers=1)
    assert read_findings(tmp_path / "out") == {2: {"two_splits": "drop"}, 3: {"two_splits": "drop"}}
    assert report.cleaned == [tmp_path / "out/train.json", tmp_path / "out/test.json"]
    assert kept_rows(report) == ["tone 0", "tone 1"]
    assert len(list(read_manifest(report.cleaned[1]))) == 2


def test_two_manifests_of_one_name_are_cleaned_into_two(tmp_path):
    manifests = []
    for name in ("a", "b"):
        rows = write_clips(tmp_path / name, 2, seconds=0.5 if name == "a" else 0.7)
        manifests.append(write_annotation(tmp_path / name / "train.json", rows))
    report = audit(manifests, tmp_path / "out", workers=1)
    assert [path.name for path in report.cleaned] == ["a-train.json", "b-train.json"]
    assert [entry.source for path in report.cleaned for entry in read_manifest(path)] == ["a", "a", "b", "b"]


def test_findings_are_the_same_whatever_the_workers(tmp_path):
    rows = write_clips(tmp_path, 70)
    for number in range(0, 70, 9):
        (tmp_path / f"clip{number:03d}.wav").write_bytes(b"")
    manifest = write_annotation(tmp_path / "m.json", rows)
    for workers in (1, 2):
        audit([manifest], tmp_path / f"out{workers}", workers=workers)
    for name in ("audit.jsonl", "m.json"):
        assert (tmp_path / "out1" / name).read_text() == (tmp_path / "out2" / name).read_text()


def test_too_large_a_share_is_an_error_and_leaves_no_cleaned_manifest(tmp_path):
    rows = write_clips(tmp_path, 4)
    (tmp_path / "clip000.wav").write_bytes(b"")
    manifest = write_annotation(tmp_path / "m.json", rows)
    with pytest.raises(ValueError, match=r"loses 25\.00% of its rows \(1 decode\), but 20\.00% are accepted"):
        audit([manifest], tmp_path / "out", stop_above=0.2, workers=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["audit.jsonl"]
    assert audit([manifest], tmp_path / "out", stop_above=0.25, workers=1).num_kept == 3


def test_a_policy_names_reasons_that_exist_and_verdicts_that_make_sense(tmp_path):
    manifest = write_annotation(tmp_path / "m.json", write_clips(tmp_path, 1))
    with pytest.raises(ValueError, match="reason 'silence' unknown; did you mean 'silent'"):
        audit([manifest], tmp_path / "out", policy={"silence": "drop"}, workers=1)
    with pytest.raises(ValueError, match="policy of decode is 'keep', but no decoder reads it; use drop"):
        audit([manifest], tmp_path / "out", policy={"decode": "keep"}, workers=1)


def test_every_reason_has_a_verdict_that_it_allows():
    assert all(reason.verdict in (*reason.choices, "auto") for reason in REASONS.values())


def test_a_folder_given_as_a_manifest_is_refused_with_the_way_to_say_it(tmp_path):
    manifest = write_annotation(tmp_path / "train.json", write_clips(tmp_path, 1))
    with pytest.raises(ValueError, match=r"manifests is .*audited in part, .* say --out .*audited"):
        audit([manifest, tmp_path / "audited"], tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table(tmp_path, capsys):
    rows = write_clips(tmp_path, 3)
    (tmp_path / "clip001.wav").write_bytes(b"<html>")
    manifest = write_annotation(tmp_path / "m.json", [*rows, rows[0]])
    parser = ArgumentParser()
    audit_module.add_arguments(parser)
    out = str(tmp_path / "out")
    args = parser.parse_args([str(manifest), "--out", out, "--drop", "duplicate", "--workers", "1"])
    assert audit_module.main(args, tasks=KnownTasks({"asr"})) == 0
    printed = capsys.readouterr().out
    assert "decode           drop             1   25.00%  no decoder reads it" in printed
    assert "duplicate        drop             1   25.00%" in printed
    assert "4 rows, 2 kept (0.00 h), 2 dropped" in printed


@pytest.mark.shared
def test_every_odd_file_gets_the_verdict_its_listing_implies(shared, tmp_path):
    files = json.loads((shared / "data/odd/files.json").read_text())
    rows = [{"path": str(shared / "data/odd" / file["path"]), "text": "odd", "task": "caption"} for file in files]
    report = audit([write_annotation(tmp_path / "odd.json", rows)], tmp_path / "out", workers=1)
    findings = read_findings(tmp_path / "out")
    status = {"ok": None, "decode_error": "decode", "open_error": "decode", "header_mismatch": None}
    for number, file in enumerate(files):
        found = findings.get(number, {})
        dropped = [reason for reason, verdict in found.items() if verdict == "drop"]
        expected = status[file["status"].partition(":")[0]]
        assert dropped == ([expected] if expected else []), file["path"]
        if expected is None:
            assert ("stereo" in found) == (file["ch"] > 1), file["path"]
            assert ("wrong_rate" in found) == (file["sr"] != 16_000), file["path"]
    assert report.num_kept == sum(file["status"] in ("ok", "header_mismatch") for file in files)


def test_a_silent_left_channel_is_silent_unless_the_mean_is_heard(tmp_path, capsys):
    silence_N = np.zeros(16_000, np.float32)
    (tmp_path / "half.wav").write_bytes(to_bytes(np.stack([silence_N, tone(1.0)], 1)))
    (tmp_path / "left.wav").write_bytes(to_bytes(np.stack([tone(1.0), silence_N], 1)))
    rows = [{"path": name, "text": "words", "task": "asr"} for name in ("half.wav", "left.wav")]
    manifest = write_annotation(tmp_path / "m.json", rows)
    for channels, kept in (("left", 1), ("mean", 2)):
        assert main(["audit", str(manifest), "--out", str(tmp_path / channels), "--channels", channels]) == 0
        assert len(list(read_manifest(tmp_path / channels / "m.json"))) == kept
    finding = (tmp_path / "left" / "audit.jsonl").read_text()
    assert "peaks at 0.0e+00 in what is heard of it, but at" in finding


@pytest.mark.shared
@pytest.mark.parametrize(("names", "count"), [(("gender/all",), 50), (("kathleen/test",), 100), (("fsdd/test",), 400)])
def test_real_data_comes_through_with_the_counts_of_its_manifests(shared, tmp_path, names, count):
    report = audit([shared / f"data/{name}.json" for name in names], tmp_path / "out", workers=1)
    assert (report.num_rows, report.num_kept) == (count, count)
