"""Manifests: what is read, what each refusal names, and that memory does not grow."""

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from clips import write_annotation

from shards.manifests.manifest import check_paths, check_tasks, read_manifest, scan_manifest, write_manifest
from shards.manifests.records import RowError

ROW = {"path": "a.wav", "text": "one", "task": "asr"}


def test_both_forms_give_the_same_entries(tmp_path):
    rows = [ROW, {**ROW, "Q": "what?", "task": "QA", "expand_wav": ["b.wav", "c.wav"], "speaker": "7"}]
    rows.append({**ROW, "text": None, "source": "other", "start": 1, "end": 2.5})
    array = write_annotation(tmp_path / "train.json", rows)
    lines = tmp_path / "train.jsonl"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows))
    first, second, third = read_manifest(array)
    assert first.path == tmp_path / "a.wav"
    assert (first.text, first.task, first.question, first.source) == ("one", "asr", None, tmp_path.name)
    assert second.paths == (tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "c.wav")
    assert (second.question, second.speaker) == ("what?", "7")
    assert (third.text, third.source, third.start, third.end) == (None, "other", 1.0, 2.5)
    assert [entry.key for entry in read_manifest(lines)] == [entry.key for entry in read_manifest(array)]


def test_a_missing_text_is_unlabelled_and_an_empty_one_is_wrong(tmp_path):
    path = write_annotation(tmp_path / "m.json", [{"path": "a.wav", "task": "asr"}, {**ROW, "text": " "}])
    unlabelled, wrong = scan_manifest(path)
    assert unlabelled.text is None
    assert isinstance(wrong, RowError)
    assert (wrong.reason, wrong.field, wrong.number) == ("empty_text", "annotation[1].text", 1)


def test_paths_are_relative_to_the_manifest_or_to_a_root_and_absolute_ones_stand(tmp_path):
    path = write_annotation(tmp_path / "m.json", [ROW, {**ROW, "path": "/audio/b.wav"}])
    assert [entry.path for entry in read_manifest(path)] == [tmp_path / "a.wav", Path("/audio/b.wav")]
    root = Path("/data")
    assert [entry.path for entry in read_manifest(path, root=root)] == [root / "a.wav", root / "audio/b.wav"]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"text": "one", "task": "asr"}, ".path"),
        ({**ROW, "path": 3}, ".path"),
        ({**ROW, "task": None}, ".task"),
        ({**ROW, "text": ["one"]}, ".text"),
        ({**ROW, "Q": 1}, ".Q"),
        ({**ROW, "text": "half a \ud83d"}, ".text"),
        ({**ROW, "path": "a\0.wav"}, ".path"),
        ({**ROW, "expand_wav": "b.wav"}, ".expand_wav"),
        ({**ROW, "expand_wav": [1]}, ".expand_wav"),
        ({**ROW, "start": "0", "end": "2"}, ".end"),
        ({**ROW, "start": 2.0}, ".end"),
        ({**ROW, "start": 2.0, "end": 1.0}, ".end"),
        ({**ROW, "start": 0, "end": 1, "expand_wav": ["b.wav"]}, ".end"),
        ("a.wav", ""),
    ],
)
def test_a_wrong_field_is_named_with_its_place(tmp_path, row, field):
    path = write_annotation(tmp_path / "m.json", [ROW, row])
    with pytest.raises(RowError) as caught:
        list(read_manifest(path))
    assert caught.value.field == f"annotation[1]{field}"
    assert str(path) in str(caught.value)
    lines = tmp_path / "m.jsonl"
    lines.write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n{json.dumps(ROW)}\n")
    good, bad, after = scan_manifest(lines)
    assert (bad.field, good.number, after.number) == (f"line 2: {field}", 0, 2)


@pytest.mark.parametrize("line", ["[" * 100_000, "{", '{"path": NaN}', "nonsense", "\ufffd\udc80"], ids=range(5))
def test_a_line_that_is_not_json_is_one_bad_row(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + line.encode("utf-8", "surrogateescape") + b"\n")
    _, bad = scan_manifest(path)
    assert (bad.reason, bad.field) == ("json", "line 2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        '{"annotation": [',
        '{"annotation": [{"path": "a", "task": "asr"} {',
        '{"annotation": [{]}',
        '{"annotation": []} {"annotation": []}',
        '{"annotation": [], "annotation": []}',
        "[] []",
    ],
)
def test_a_broken_array_is_an_error_that_names_the_file_and_the_line(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_text("\n\n" + text)
    with pytest.raises(ValueError, match=r"m\.json .*at line 3"):
        list(read_manifest(path))


def test_an_array_under_another_name_is_an_error(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"data": [{"path": "a.wav"}], "version": 12}')
    with pytest.raises(ValueError, match="has no array 'annotation'"):
        list(read_manifest(path))


def test_other_fields_before_the_array_are_passed_over(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"version": 12, "about": {"a": [1, 2, "]}"]}, "annotation": [ROW], "more": 1}))
    assert [entry.text for entry in read_manifest(path)] == ["one"]


def test_rows_that_cross_the_pieces_a_file_is_read_in_are_whole(tmp_path, monkeypatch):
    rows = [{**ROW, "text": f"row {number} " + "é" * (number % 50)} for number in range(200)]
    path = write_annotation(tmp_path / "m.json", rows)
    for piece_chars in (1, 2, 7, 64):
        monkeypatch.setattr("shards.manifests.records.PIECE_CHARS", piece_chars)
        assert [entry.text for entry in read_manifest(path)] == [row["text"] for row in rows]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_memory_does_not_grow_with_the_manifest(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("shards.manifests.records.PIECE_CHARS", 4096)

    def peak(num_rows: int) -> int:
        path = tmp_path / f"{num_rows}{suffix}"
        row = json.dumps({**ROW, "text": "a transcript of the usual length, give or take a word " * 2})
        with path.open("w") as file:
            file.write("" if suffix == ".jsonl" else '{"annotation": [')
            file.write((",\n" if suffix == ".json" else "\n").join([row] * num_rows))
            file.write("" if suffix == ".jsonl" else "]}")
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_manifest(path)) == num_rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is allocated once
    assert peak(2_000) < peak(500) + 80_000  # bytes; the longer file has 240,000 more


def test_an_unknown_task_names_the_nearest(tmp_path):
    path = write_annotation(tmp_path / "m.json", [ROW, {**ROW, "task": "asrr"}])
    with pytest.raises(
        ValueError, match=r"annotation\[1\] is 'asrr', but .* for QA, asr alone; did you mean 'asr'\?.* --prompts"
    ):
        list(check_tasks(read_manifest(path), {"asr", "QA"}))
    assert len(list(check_tasks(read_manifest(path), None))) == 2


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "clip001.wav").touch()
    path = write_annotation(tmp_path / "m.json", [{**ROW, "path": "audio/clip01.wav"}])
    with pytest.raises(FileNotFoundError, match=r"annotation\[0\]\.path is .*clip01\.wav.*: clip001\.wav\."):
        list(check_paths(read_manifest(path)))
    wrong_folder = write_annotation(tmp_path / "n.json", [{**ROW, "path": "adio/clip001.wav"}])
    with pytest.raises(FileNotFoundError, match=r"nearest in .*: audio"):
        list(check_paths(read_manifest(wrong_folder)))
    with pytest.raises(FileNotFoundError, match=r"nearest in .*: m\.json"):
        list(read_manifest(tmp_path / "mm.json"))


def test_a_key_is_unique_free_of_dots_and_changes_with_the_row(tmp_path):
    rows = [ROW, ROW, {**ROW, "text": "two"}, {**ROW, "Q": "x"}, {**ROW, "expand_wav": ["b.wav"]}]
    keys = [entry.key for entry in read_manifest(write_annotation(tmp_path / "m.json", rows))]
    assert len(set(keys)) == len(keys)
    assert keys == sorted(keys)
    digests = [key.partition("-")[2] for key in keys]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert not any("." in key or "/" in key for key in keys)


@pytest.mark.parametrize("name", ["copy.json", "copy.jsonl", "elsewhere/copy.json"])
def test_a_manifest_that_is_written_again_leads_to_the_same_recordings(tmp_path, name):
    rows = [ROW, {**ROW, "Q": "what?", "expand_wav": ["b.wav"], "speaker": "7"}, {**ROW, "text": None, "end": 2.0}]
    entries = list(read_manifest(write_annotation(tmp_path / "m.json", rows)))
    (tmp_path / "elsewhere").mkdir()
    assert write_manifest(tmp_path / name, entries) == 3
    for first, second in zip(entries, read_manifest(tmp_path / name), strict=True):
        assert [path.resolve() for path in second.paths] == [path.resolve() for path in first.paths]
        for field in ("text", "task", "question", "source", "speaker", "start", "end"):
            assert getattr(second, field) == getattr(first, field)


def test_a_write_that_fails_leaves_the_old_manifest_and_nothing_else(tmp_path):
    path = write_annotation(tmp_path / "m.json", [ROW])
    before = path.read_bytes()

    def entries():
        yield from read_manifest(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_manifest(path, entries())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count"),
    [("fsdd/train", 6000), ("fsdd/test", 400), ("kathleen/train", 1031), ("esc10/train", 480), ("gender/all", 50)],
)
def test_real_manifests_give_their_rows_and_all_recordings_are_there(shared, name, count):
    assert sum(1 for _ in check_paths(read_manifest(shared / f"data/{name}.json"))) == count


FORMS = {
    "byte-order mark": lambda rows: ("m.json", b"\xef\xbb\xbf" + json.dumps({"annotation": rows}).encode()),
    "UTF-16": lambda rows: ("m.json", json.dumps({"annotation": rows}, ensure_ascii=False).encode("utf-16")),
    "lines with a mark": lambda rows: ("m.jsonl", b"\xef\xbb\xbf" + to_lines(rows)),
    "lines in UTF-16": lambda rows: ("m.jsonl", to_lines(rows).decode().encode("utf-16")),
    "lines named .json": lambda rows: ("m.json", to_lines(rows)),
    "one line named .json": lambda rows: ("m.json", to_lines(rows[:1]) + b"\n" + to_lines(rows[1:])),
    "an array named .jsonl": lambda rows: ("m.jsonl", json.dumps(rows, indent=1).encode()),
    "an array on a line named .jsonl": lambda rows: ("m.jsonl", json.dumps(rows).encode()),
    "SALMONN's form named .jsonl": lambda rows: ("m.jsonl", json.dumps({"annotation": rows}, indent=1).encode()),
    "lines that end in CR LF, some empty": lambda rows: ("m.jsonl", to_lines(rows).replace(b"\n", b"\r\n \r\n")),
}


def to_lines(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_read_in_whatever_form_they_come(tmp_path, form):
    rows = [{**ROW, "speaker": 7}, {**ROW, "text": "zwei é", "speaker": 8.0}, {**ROW, "speaker": None, "Q": None}]
    name, data = FORMS[form](rows)
    (tmp_path / name).write_bytes(data)
    entries = list(read_manifest(tmp_path / name))
    assert [entry.text for entry in entries] == ["one", "zwei é", "one"]
    assert [entry.speaker for entry in entries] == ["7", "8", None]


BAD_ROWS = {
    "a number that is infinite": '{"path": "a.wav", "text": "x", "task": "asr", "duration": 1e999}',
    "NaN": '{"path": "a.wav", "text": "x", "task": "asr", "start": NaN, "end": 1}',
    "Infinity": '{"path": "a.wav", "text": "x", "task": "asr", "start": 0, "end": -Infinity}',
    "400 digits": f'{{"path": "a.wav", "text": "x", "task": "asr", "start": 0, "end": 1{"0" * 400}}}',
    "5000 digits": f'{{"path": "a.wav", "text": "x", "task": "asr", "duration": 1{"0" * 5000}}}',
    "half a surrogate": '{"path": "a.wav", "text": "x\\ud83d", "task": "asr"}',
    "half a surrogate in the path": '{"path": "\\udc00.wav", "text": "x", "task": "asr"}',
    "a key twice": '{"path": "a.wav", "text": "x", "text": "y", "task": "asr"}',
    "over a megabyte": json.dumps({**ROW, "text": "word " * 300_000}),
    "no UTF-8": '{"path": "a.wav", "text": "caf\udce9", "task": "asr"}',
    "no object": '"a.wav"',
    "no task": '{"path": "a.wav", "text": "x", "task": null}',
    "a speaker that is true": '{"path": "a.wav", "text": "x", "task": "asr", "speaker": true}',
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_a_bad_row_is_one_bad_row_and_the_rest_is_read(tmp_path, name, kind):
    good, path = json.dumps(ROW), tmp_path / name
    text = f"{good}\n{BAD_ROWS[kind]}\n{good}\n"
    if name == "m.json":
        text = f'{{"annotation": [{good},\n{BAD_ROWS[kind]},\n{good}]}}'
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    first, bad, last = scan_manifest(path)
    assert (first.text, last.text, last.number) == ("one", "one", 2)
    assert isinstance(bad, RowError)
    assert bad.number == 1
    str(bad).encode()


@pytest.mark.parametrize("text, rule", [("x\ud83d", "whole characters of UTF-8 without NUL"),
                                        ("x\0", "whole characters of UTF-8 without NUL"), (7, "a string")])  # fmt: skip
def test_what_a_text_that_is_refused_breaks_is_said(tmp_path, text, rule):
    write_annotation(tmp_path / "m.json", [{**ROW, "text": text}])
    (bad,) = scan_manifest(tmp_path / "m.json")
    assert f"but must be {rule}; mend the row." in str(bad)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_annotation(tmp_path / "m.json", [{**ROW, "path": "~/audio/a.wav", "expand_wav": ["~/b.wav"]}])
    (entry,) = read_manifest(Path("~/m.json"))
    assert entry.paths == (tmp_path / "audio/a.wav", tmp_path / "b.wav")


def test_a_compressed_manifest_is_refused_with_the_way_to_read_it(tmp_path):
    (tmp_path / "m.json").write_bytes(gzip.compress(json.dumps([ROW]).encode()))
    with pytest.raises(ValueError, match=r"is compressed, .* run gunzip"):
        list(read_manifest(tmp_path / "m.json"))


def test_a_manifest_that_was_cut_or_spoilt_anywhere_is_read_or_refused_by_name(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{**ROW, "text": f"row {number}", "start": 0, "end": 1.5, "Q": None} for number in range(4)]
    for form in (json.dumps({"version": 1, "annotation": rows}, indent=1), to_lines(rows).decode(), json.dumps(rows)):
        for _ in range(150):
            data, at = bytearray(form.encode()), int(rng.integers(len(form)))
            if rng.random() < 0.5:
                data = data[:at]
            else:
                data[at : at + int(rng.integers(3))] = rng.bytes(int(rng.integers(3)))
            path = tmp_path / f"m.{rng.choice(['json', 'jsonl'])}"
            path.write_bytes(data)
            try:
                found = list(scan_manifest(path))
            except ValueError as error:
                assert str(path) in str(error)
            else:
                assert all(isinstance(row, RowError) or row.task for row in found)
