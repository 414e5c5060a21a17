"""A run's curves, scorecard and settings as one HTML file that needs no other.

Knows the files of a run's folder and how to show them; it measures nothing itself.
"""

import argparse
import html
from collections.abc import Iterable
from pathlib import Path

from distill.evaluation.curves import line_chart, scatter_chart
from distill.evaluation.efficiency import Efficiency, make_rows, read_efficiency
from distill.evaluation.scorecard import (
    DEVICE_HEADERS,
    SCORECARD,
    Scorecard,
    agreement_rows,
    cost_rows,
    count_clips,
    device_rows,
    explain_scores,
    print_scorecard,
    read_scorecard,
    score_rows,
    show_training,
)
from distill.objective.terms import TERMS
from distill.objective.terms.term import RECORD
from distill.training.monitoring.runlog import METRICS, read_metrics
from shards.files.write import write_atomically

REPORT = "report.html"
# Of metrics.jsonl: what is drawn beside the terms of the loss, with its title
TITLES = {"loss": "Loss", "learning_rate": "Learning rate", "grad_norm": "Gradient norm",
          "grad_limit": "Limit of the gradient norm", "skipped": "Steps left out so far",
          "agreement": "Same most probable token as the teacher (share)", "seconds": "Seconds a step",
          "audio_hours_per_hour": "Audio-hours an hour", "waiting": "Waiting for data (share)",
          "mfu": "Model FLOPs utilization, the LLM's (share)"}  # fmt: skip


def write_report(run_folder: Path) -> Path:
    """Write `report.html`: scorecard, curves and settings of a run in one file that needs no other.

    Args:
        run_folder: holds `metrics.jsonl`, and `scorecard.json` and `config.yaml` where the run has them.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: the folder holds no `metrics.jsonl`.
    """
    run_folder = Path(run_folder)
    records, num_unreadable = read_metrics(run_folder / METRICS)
    parts = [f"<h1>{html.escape(run_folder.resolve().name)}</h1>"]
    if (run_folder / SCORECARD).exists():
        parts += _scorecard_html(read_scorecard(run_folder))
    parts += _efficiency_html(read_efficiency(run_folder))
    parts += ["<h2>Training</h2>", f"<p>{len(records):,} steps.{_warn(num_unreadable)}</p>", '<div class="curves">']
    for key, title in curves_of(records).items():
        drawn = [(record["step"], record[key]) for record in records if key in record]
        # A term of weight 0 is a flat line at 0: nothing to see.
        if any(value for _, value in drawn):
            parts.append(line_chart(title, *zip(*drawn)))
    parts.append("</div>")
    config = run_folder / "config.yaml"
    if config.exists():
        parts.append(f"<details><summary>Settings</summary><pre>{html.escape(config.read_text())}</pre></details>")
    page = _PAGE.format(title=html.escape(run_folder.resolve().name), body="\n".join(parts))
    write_atomically(run_folder / REPORT, page)
    return run_folder / REPORT


def curves_of(records: Iterable[dict]) -> dict[str, str]:
    """What is drawn of a run's steps, with its title: the loss, each of its terms as the steps name it, the rest."""
    titles = {name: term.title or name for name, term in TERMS.items()}
    names = dict.fromkeys(name for record in records for name in record if name not in RECORD)
    return {"loss": TITLES["loss"]} | {name: titles.get(name, name) for name in names} | TITLES


def _warn(num_unreadable: int) -> str:
    return f" {num_unreadable} unreadable lines of metrics.jsonl are left out." if num_unreadable else ""


def _scorecard_html(card: Scorecard) -> list[str]:
    """The same rows as in the terminal."""
    parts = ["<h2>Scorecard</h2>"]
    headers = ("", card.teacher.name, card.student.name, "student ÷ teacher")
    for rows in filter(None, (score_rows(card), agreement_rows(card), cost_rows(card))):
        lines = [_row_html("th", headers), *(_row_html("td", row) for row in rows)]
        parts += ["<table>", *lines, "</table>"]
    if card.device is not None:
        lines = [_row_html("th", DEVICE_HEADERS), *(_row_html("td", row) for row in device_rows(card))]
        parts += [f"<h3>{html.escape(card.device.name)}</h3>", "<table>", *lines, "</table>"]
    notes = html.escape(" ".join((count_clips(card), *explain_scores(card))))
    parts.append(f"<p>{notes} 1 MB is 10<sup>6</sup> bytes.</p>")
    further = [
        (f"{task}: {name}", *(_show_extra(model.scores[task].extra.get(name)) if task in model.scores else "–"
                              for model in (card.teacher, card.student)))
        for task, score in sorted(card.student.scores.items())
        for name in score.extra
    ]  # fmt: skip
    lines = [_row_html("th", headers[:3]), *(_row_html("td", row) for row in further)]
    parts += ["<details><summary>Further scores</summary><table>", *lines, "</table></details>"]
    if card.training:
        parts.append(f"<p>{html.escape(show_training(card.training))}</p>")
    return parts


def _efficiency_html(found: list[Efficiency]) -> list[str]:
    """A table of what answering costs, and WER against memory and time: what lies lower left of another is better."""
    if not found:
        return []
    heading, *rows = make_rows(found)
    lines = [_row_html("th", heading), *(_row_html("td", row) for row in rows)]
    parts = ["<h2>What answering costs</h2>", "<table>", *lines, "</table>", '<div class="curves">']
    for label, figure in (("GB at the peak", lambda e: e.gb), ("ms to the second token", lambda e: e.second_ms)):
        points = [(one.name, figure(one), 100 * one.wer) for one in found if one.wer is not None]
        if points:
            parts.append(scatter_chart(f"WER (%) against {label}", points, x_label=label))
    return [*parts, "</div>"]


def _show_extra(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _row_html(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2230; --faint: #8a93a3; --rule: #e3e6eb; --line: #2563a8; --page: #fff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ef; --faint: #8f99aa; --rule: #2d3442; --line: #6aa8ea; --page: #14181f; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1340px; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .9rem; border-bottom: 1px solid var(--rule); text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 1.2rem; }}
svg {{ width: 100%; font: 12px system-ui, sans-serif; }}
svg .title {{ fill: var(--ink); font-weight: 600; }}
svg .tick {{ fill: var(--faint); }}
svg .grid {{ stroke: var(--rule); }}
svg .curve {{ fill: none; stroke: var(--line); stroke-width: 1.6; stroke-linejoin: round; }}
svg .end {{ fill: var(--line); }}
summary {{ cursor: pointer; }}
pre {{ overflow-x: auto; }}
</style></head><body>
{body}
</body></html>
"""


def main(args: argparse.Namespace) -> int:
    """Print the scorecard, where there is one, and write the report."""
    path = write_report(args.run)
    if (args.run / SCORECARD).exists():
        print_scorecard(read_scorecard(args.run))
    print(f"{path} holds the curves and the scorecard.")
    return 0
