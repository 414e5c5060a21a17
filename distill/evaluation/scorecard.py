"""The scorecard of a distillation: quality, size, memory and speed of teacher and student, in the terminal and as JSON.

Knows figures and how to show them; it measures nothing itself.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distill.evaluation.metrics.scores import METRICS, Retained, TaskScore, is_above_chance
from shards.files.write import write_atomically
from shards.jsonfile import ShapeError, parse_object

SCORECARD = "scorecard.json"
DEVICE_HEADERS = ("", "on a device", "÷ student", "÷ teacher")


@dataclass(frozen=True)
class ModelFigures:
    """What a model answers and what it costs. A figure that was not measured is None."""

    name: str
    num_parameters: int
    scores: dict[str, TaskScore] = field(default_factory=dict)  # by task
    weights_mb: float | None = None  # in memory; 1 MB is 10^6 bytes
    peak_mb: float | None = None  # GPU memory at its peak while answering
    checkpoint_mb: float | None = None  # on disk
    first_token_ms: float | None = None  # audio to first token, one clip
    next_token_ms: float | None = None  # each token after it


@dataclass(frozen=True)
class Agreement:
    """Of a student with its teacher: what both predict at all positions of the right answers, see `agreement.py`."""

    num_positions: int  # of the student
    teacher_ece: float  # expected calibration error, a fraction
    student_ece: float
    top1: float | None = None  # share of positions whose most probable token is the same; None: other tokens
    kl: float | None = None  # KL(teacher ‖ student), nats a token, temperature 1; None: other tokens


@dataclass(frozen=True)
class Scorecard:
    """Teacher and student side by side."""

    name: str
    teacher: ModelFigures
    student: ModelFigures
    retained: dict[str, Retained] = field(default_factory=dict)  # by task
    training: dict[str, float | str] = field(default_factory=dict)  # name with unit to figure: steps, seconds, …
    device: ModelFigures | None = None  # the student's folder for devices
    agreement: Agreement | None = None  # of the student's predictions with the teacher's

    def to_json(self) -> str:
        """As text; `from_json` gives an equal scorecard back."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Scorecard":
        """The scorecard of a text that `to_json` made.

        Raises:
            ValueError: it is of another shape.
        """
        try:
            return cls._from_fields(parse_object(text, dict.fromkeys(("teacher", "student", "retained"), dict)))
        except (TypeError, KeyError, AttributeError) as error:
            raise ShapeError(f"is no scorecard ({error})") from error

    @classmethod
    def _from_fields(cls, fields: dict) -> "Scorecard":
        models = {}
        roles = ("teacher", "student", *(["device"] if fields.get("device") else []))
        for role in roles:
            scores = {task: TaskScore(**score) for task, score in fields[role]["scores"].items()}
            models[role] = ModelFigures(**{**fields[role], "scores": scores})
        retained = {task: Retained(**kept) for task, kept in fields["retained"].items()}
        agreement = Agreement(**fields["agreement"]) if fields.get("agreement") else None  # older ones have none
        return cls(**{**fields, **models, "retained": retained, "agreement": agreement})


def write_scorecard(card: Scorecard, run_folder: Path) -> Path:
    """Write `scorecard.json` into the run's folder, under its final name at once, and return its path."""
    path = Path(run_folder) / SCORECARD
    write_atomically(path, card.to_json())
    return path


def read_scorecard(run_folder: Path) -> Scorecard:
    """The scorecard of a run.

    Raises:
        FileNotFoundError: the run was not evaluated.
        ValueError: the file is damaged.
    """
    path = Path(run_folder) / SCORECARD
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, but a scorecard is made by evaluating; run `distill evaluate` first."
        )
    try:
        card = Scorecard.from_json(path.read_bytes())
        score_rows(card), agreement_rows(card), cost_rows(card)  # what cannot be shown is damaged too
        return card
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        problem = error if isinstance(error, ShapeError) else f"is no scorecard ({error})"
        raise ValueError(f"{path} cannot be read (it {problem}), but must be whole; run `distill evaluate`.") from error


# Rows: what a figure is, the teacher's, the student's, and how they compare.
Row = tuple[str, str, str, str]


def score_rows(card: Scorecard) -> list[Row]:
    """One row a task: both scores with their intervals, and the quality retained where the teacher has some."""
    rows = []
    for task in sorted(card.teacher.scores.keys() | card.student.scores.keys()):
        found = [model.scores.get(task) for model in (card.teacher, card.student)]
        metric = next(score.metric for score in found if score)
        rows.append(
            (
                f"{task}: {METRICS[metric].heading}",
                *(_show_score(score) if score else "not measured" for score in found),
                _show_retained(card.retained.get(task), found[0]),
            )
        )
    return rows


def agreement_rows(card: Scorecard) -> list[Row]:
    """How the student predicts the right answers' tokens beside the teacher, and how well calibrated each is."""
    found = card.agreement
    if found is None:
        return []
    rows = [("ECE ↓", f"{found.teacher_ece:.1%}", f"{found.student_ece:.1%}", "–")]
    if found.top1 is not None and found.kl is not None:
        rows.insert(0, ("same next token ↑", "–", f"{found.top1:.1%}", "–"))
        rows.insert(1, ("KL to teacher ↓", "–", f"{found.kl:.3f}", "–"))
    return rows


def cost_rows(card: Scorecard) -> list[Row]:
    """One row a cost: size, memory, time. The last column is student over teacher."""
    costs = {
        "parameters (M)": lambda model: model.num_parameters / 1e6,
        "weights (MB)": lambda model: model.weights_mb,
        "peak on GPU (MB)": lambda model: model.peak_mb,
        "checkpoint (MB)": lambda model: model.checkpoint_mb,
        "first token (ms)": lambda model: model.first_token_ms,
        "next token (ms)": lambda model: model.next_token_ms,
    }
    rows = []
    for name, figure in costs.items():
        teacher, student = figure(card.teacher), figure(card.student)
        if teacher is not None or student is not None:
            ratio = f"{student / teacher:.2f}×" if teacher and student is not None else "–"
            rows.append((name, *("not measured" if v is None else f"{v:,.4g}" for v in (teacher, student)), ratio))
    return rows


def device_rows(card: Scorecard) -> list[Row]:
    """What the exported folder scores and costs: its figure, by the student's and by the teacher's."""
    if card.device is None:
        return []
    others = (replace(card, teacher=card.student, student=card.device), replace(card, student=card.device))
    rows = [(task, _show_score(score), "", "") for task, score in sorted(card.device.scores.items())]
    for by_student, by_teacher in zip(*(cost_rows(other) for other in others)):
        if by_student[2] != "not measured":
            rows.append((by_student[0], by_student[2], by_student[3], by_teacher[3]))
    return rows


def explain_scores(card: Scorecard) -> list[str]:
    """What the rows' last column and brackets are, and what chance is, in a few sentences."""
    scores = card.teacher.scores | card.student.scores
    lines = [
        "In brackets: the 95 % bootstrap interval over clips. Student ÷ teacher is of quality: (1 − rate) ÷ (1 − rate) "
        "for error rates, the score itself for the others."
    ]
    if card.agreement is not None:
        known = "" if card.agreement.top1 is not None else "; their tokens differ, so nothing else is compared"
        lines.append(
            f"Next tokens of the right answers ({card.agreement.num_positions:,}): KL in nats a token, expected "
            f"calibration error (ECE) over 15 bins of confidence{known}."
        )
    chances = [
        f"{task} {METRICS[score.metric].form.format(score.extra['chance'])}"
        for task, score in sorted(scores.items())
        if "chance" in score.extra
    ]
    if chances:
        lines.append(
            f"Chance (the commonest right answer to every clip): {', '.join(chances)}. A teacher whose "
            f"interval reaches it has nothing to retain."
        )
    return lines


def count_clips(card: Scorecard) -> str:
    """Clips of each task, and how many right answers each has where there are several."""
    counts = []
    for task, score in sorted(card.student.scores.items()):
        references = score.extra.get("references", 1.0)
        counts.append(
            f"{task} {score.num_samples}" + (f" ({references:.3g} references each)" if references > 1 else "")
        )
    return f"Clips: {', '.join(counts)}."


def _show_retained(kept: Retained | None, teacher: TaskScore | None) -> str:
    if kept is not None:
        return _show_interval(kept, "{:.1%}", 100)
    return "–" if teacher is None or is_above_chance(teacher) else "teacher at chance"


def _show_score(score: TaskScore) -> str:
    metric = METRICS[score.metric]
    return _show_interval(score, metric.form, metric.scale)


def _show_interval(figure: TaskScore | Retained, form: str, scale: int) -> str:
    """The value and its interval: `91.7% [85.0, 98.3]`."""
    plain = form.replace("%", "f")
    return f"{form.format(figure.value)} [{plain.format(figure.low * scale)}, {plain.format(figure.high * scale)}]"


def print_scorecard(card: Scorecard, console: Console | None = None) -> None:
    """Print the scorecard as a table.

    Args:
        card: what is shown.
        console: where; the terminal when None.
    """
    console = console or Console()
    table = Table(title=f"Scorecard of {card.name}", title_justify="left")
    table.add_column("", min_width=18)  # the longest name of a task
    for header in (card.teacher.name, card.student.name, "student ÷ teacher"):
        table.add_column(header, justify="right", min_width=14, overflow="fold")
    for name, *figures in score_rows(card):  # on two lines, so that 80 columns hold them
        table.add_row(name.replace(": ", "\n"), *(figure.replace(" [", "\n[") for figure in figures))
    for rows in (agreement_rows(card), cost_rows(card)):
        table.add_section()
        for row in rows:
            table.add_row(*row)
    console.print(table)
    if card.device is not None:
        console.print(make_device_table(card))
    for line in (count_clips(card), *explain_scores(card)):
        console.print(line, soft_wrap=True)
    if card.training:
        console.print("Training: " + show_training(card.training), soft_wrap=True)


def make_device_table(card: Scorecard) -> Table:
    """The rows of the exported folder, for the terminal."""
    table = Table(title=card.device.name, title_justify="left")
    table.add_column("", min_width=18)
    for header in DEVICE_HEADERS[1:]:
        table.add_column(header, justify="right", min_width=14)
    for row in device_rows(card):
        table.add_row(*row)
    return table


def show_training(training: dict[str, float | str]) -> str:
    """The training's figures in one line."""
    return ", ".join(f"{key} {value if isinstance(value, str) else f'{value:,.5g}'}" for key, value in training.items())
