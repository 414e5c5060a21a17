import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console

from distill.config import Config
from distill.evaluation.answering import Cost
from distill.evaluation.curves import MAX_POINTS, line_chart
from distill.evaluation.evaluate import figures
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import retained_quality, score
from distill.evaluation.report import read_metrics, write_report
from distill.evaluation.scorecard import (
    Agreement,
    ModelFigures,
    Scorecard,
    print_scorecard,
    read_scorecard,
    write_scorecard,
)


def predictions(wrong):
    answers = [("one two", "one two"), ("three", "three"), ("four five six", "four five six"), ("seven", "seven")]
    asr = [
        Prediction(f"clip{i}", "asr", "synth", (right,), "nine" if i < wrong else heard)
        for i, (right, heard) in enumerate(answers)
    ]
    captions = ("a low tone", "noise", "a rising sweep")
    return asr + [Prediction(f"sound{i}", "audiocaption_v2", "synth", (c,), c) for i, c in enumerate(captions)]


@pytest.fixture
def card():
    teacher, student = predictions(wrong=0), predictions(wrong=1)
    return Scorecard(
        name="demo",
        teacher=ModelFigures("teacher-1M", 1_000_000, score(teacher), weights_mb=4.0, first_token_ms=20.0),
        student=ModelFigures("student-<0.2M>", 250_000, score(student), weights_mb=0.5, first_token_ms=5.0),
        retained=retained_quality(student, teacher),
        training={"steps": 300, "minutes": 1.5, "launch": "2 ranks, ZeRO-2"},
        agreement=Agreement(120, teacher_ece=0.015, student_ece=0.052, top1=0.968, kl=0.0213),
    )


def write_metrics(folder, lines):
    (folder / "metrics.jsonl").write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )


def show(card, width=160):
    console = Console(file=io.StringIO(), width=width)
    print_scorecard(card, console)
    return console.file.getvalue()


def test_a_scorecard_shows_how_far_the_predictions_agree_and_says_where_tokens_differ(card):
    text = show(card)
    assert all(part in text for part in ("same next token ↑", "96.8%", "0.021", "1.5%", "5.2%", "answers (120)"))
    apart = show(replace(card, agreement=Agreement(120, teacher_ece=0.015, student_ece=0.052)))
    assert "same next token" not in apart and "their tokens differ, so nothing else is compared" in apart
    assert "ECE" not in show(replace(card, agreement=None))


def test_a_scorecard_comes_back_from_its_file_as_it_was(card, tmp_path):
    write_scorecard(card, tmp_path)
    assert read_scorecard(tmp_path) == card
    assert [path.name for path in tmp_path.iterdir()] == ["scorecard.json"]


def test_the_terminal_shows_scores_quality_retained_and_costs(card):
    shown = show(card)
    wer = card.student.scores["asr"].value
    low, high = card.student.scores["asr"].low, card.student.scores["asr"].high
    assert f"{wer:.1%}" in shown and f"[{100 * low:.1f}, {100 * high:.1f}]" in shown
    assert f"{1 - wer:.1%}" in shown  # the teacher has no error: what is retained is the student's word accuracy
    row = next(line for line in shown.splitlines() if "weights" in line)
    assert re.findall(r"[\d.]+×?", row) == ["4", "0.5", "0.12×"]
    assert "steps 300, minutes 1.5, launch 2 ranks, ZeRO-2" in shown
    assert "asr 4, audiocaption_v2 3" in shown


def test_eighty_columns_show_every_name_and_figure_whole(card):
    shown, wide = show(card, width=80), show(card)
    assert all(len(line) <= 80 for line in shown.splitlines() if line[:1] in "│┃┏┡├└")
    for word in re.findall(r"[\w.,%×↓↑\[\]]{3,}", wide.partition("Clips")[0]):
        assert word in shown


def test_a_figure_that_was_not_measured_is_said_to_be_so_and_never_zero(card):
    student = ModelFigures("student", 250_000, card.student.scores)
    shown = show(Scorecard("demo", card.teacher, student))
    row = next(line for line in shown.splitlines() if "first token" in line)
    assert "20" in row and "not measured" in row and "×" not in row
    assert "peak on GPU" not in shown


def test_a_task_that_only_one_model_answered_is_shown(card):
    teacher = ModelFigures("teacher", 1_000_000, {"asr": card.teacher.scores["asr"]})
    lines = show(Scorecard("demo", teacher, card.student)).splitlines()
    row = next(line for line in lines if "audiocaption_v2" in line)
    assert "not measured" in row


def test_a_teacher_at_chance_is_said_to_be_so_and_the_last_column_is_explained():
    right = ["male", "female"] * 4
    answers = [Prediction(f"c{i}", "gender_recognition", "", (r,), "male") for i, r in enumerate(right)]
    guessing = ModelFigures("teacher", 1, score(answers))
    shown = show(Scorecard("demo", guessing, guessing, retained_quality(answers, answers)))
    assert "teacher at chance" in shown and "100.0%" not in shown
    assert "Chance (the commonest right answer to every clip): gender_recognition 50.0%" in shown
    assert "(1 − rate) ÷ (1 − rate) for error rates" in shown


class Page(HTMLParser):
    """What a page consists of: its tags, the files it asks for and the tags it forgot to close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_needs_no_other_file_and_draws_what_was_logged(card, tmp_path):
    terms = {"loss": 2.0, "ce": 1.0, "kl": 1.0, "feature": 0.0, "learning_rate": 1e-4, "seconds": 0.3}
    write_metrics(tmp_path, [{"step": step, **terms} for step in range(1, 30)])
    write_scorecard(card, tmp_path)
    (tmp_path / "config.yaml").write_text("name: <demo>\n")
    text = write_report(tmp_path).read_text()
    page = Page(text)
    assert page.links == [] and page.open == [] and "script" not in page.tags and "url(" not in text
    assert page.tags.count("svg") == 5  # all but the feature loss, which is 0 throughout
    assert "student-&lt;0.2M&gt;" in text and "name: &lt;demo&gt;" in text
    assert "spice" in text and "not available" in text


def test_a_report_needs_neither_scorecard_nor_config(tmp_path):
    write_metrics(tmp_path, [{"step": 1, "loss": 2.0}])
    page = Page(write_report(tmp_path).read_text())
    assert page.tags.count("svg") == 1 and "table" not in page.tags


def test_steps_repeated_after_a_resume_count_once_and_half_a_line_is_counted(tmp_path):
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, '{"step": 3, "lo\n', {"step": 2, "loss": 2.0}]
    write_metrics(tmp_path, records)
    assert read_metrics(tmp_path / "metrics.jsonl") == ([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}], 1)
    assert "1 unreadable line" in write_report(tmp_path).read_text()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl is missing, but a report is drawn from it; name"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"scorecard.json is missing, but .*; run `distill evaluate` first"):
        read_scorecard(tmp_path)


def curve_of(svg):
    return [tuple(map(float, point.split(","))) for point in re.search(r'points="([^"]*)"', svg)[1].split()]


def ticks_of(svg, anchor):
    return [float(text.replace(",", "")) for text in re.findall(rf'text-anchor="{anchor}">([\d.,e+-]+)</text>', svg)]


def test_a_curve_falls_on_the_page_as_its_values_do():
    curve = curve_of(line_chart("loss", range(10), [10 - x for x in range(10)]))
    assert [x for x, _ in curve] == sorted(x for x, _ in curve)
    assert [y for _, y in curve] == sorted(y for _, y in curve)  # y grows downwards
    steps = [second[1] - first[1] for first, second in pairwise(curve)]
    assert max(steps) == pytest.approx(min(steps), abs=0.11)  # drawn to a tenth of a pixel


@pytest.mark.parametrize("values", [[0.0, 1e-5], [3.0, 3.0], [-0.02, 0.7], [1e4, 2.5e6], [0.13, 0.13]])
def test_ticks_are_round_evenly_spaced_and_enclose_the_values(values):
    svg = line_chart("loss", [1, 2], values)
    ticks = ticks_of(svg, "end")
    step = ticks[1] - ticks[0]
    assert f"{step:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")
    assert [b - a for a, b in pairwise(ticks)] == pytest.approx([step] * (len(ticks) - 1))
    assert ticks[0] <= min(values) and ticks[-1] >= max(values)
    assert all(30 <= y <= 200.1 for _, y in curve_of(svg))


def test_long_runs_are_drawn_as_means_of_bins():
    curve = curve_of(line_chart("loss", range(10_000), [step % 5 for step in range(10_000)]))
    assert len(curve) <= MAX_POINTS
    assert len({y for _, y in curve}) == 1  # 2 everywhere, not the noise of single steps


def test_values_that_are_not_finite_are_counted_and_not_drawn():
    svg = line_chart("loss", [1, 2, 3, 4], [2.0, math.nan, math.inf, 1.0])
    assert "loss (2 not finite)" in svg and len(curve_of(svg)) == 2
    assert "polyline" not in line_chart("loss", [1], [math.nan])


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_model_in_a_folder_of_several_weight_files_is_measured_by_their_sum(tmp_path, num_files):
    for number in range(num_files):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(500_000))
    cost = Cost(1, 4, 20.0, 5.0, None)
    column = figures("teacher", cost, predictions(wrong=0), tmp_path, Config())
    assert column.checkpoint_mb == 0.5 * num_files
