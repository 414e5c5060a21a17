"""`distill audit`: decodes every recording of one or several manifests and says what is wrong with which row.

Writes `audit.jsonl`, a line a finding, and each manifest again without the rows that a policy drops. A row that is
fixed stays: `distill pack` mixes down, resamples, cuts and pads. Nothing is ever replaced. Knows no model.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from shards.audio.decode import CHANNELS, LEFT
from shards.audio.limits import DEFAULT_LIMITS, AudioLimits, add_limit_arguments, read_limits
from shards.field_types import to_path
from shards.files.write import open_atomically
from shards.manifests.manifest import (
    ANY_TASK,
    Entry,
    KnownTasks,
    describe_unknown_task,
    scan_manifest,
    write_rows,
)
from shards.manifests.records import RowError
from shards.packing.findings import REASONS, Finding, RowAudit, audit_rows, choose_verdict, make_policy
from shards.pool import batched, count_cpus, map_in_order, progress_bar
from shards.status import print_json, print_status

ROWS_A_PIECE = 32


@dataclass
class AuditReport:
    """What an audit found; `str` of it is a table."""

    num_rows: int = 0
    num_kept: int = 0  # of them unchanged or fixed
    seconds: float = 0.0  # of the rows that are kept, at most 30 s each
    counts: Counter = field(default_factory=Counter)  # (reason, verdict) -> findings
    cleaned: list[Path] = field(default_factory=list)  # the cleaned manifests, in the order of those audited

    @property
    def num_dropped(self) -> int:
        """Rows that are not kept."""
        return self.num_rows - self.num_kept

    def as_json(self, findings: Path) -> dict:
        """The same for a script."""
        counts = [
            {"reason": reason, "verdict": verdict, "rows": count, "meaning": REASONS[reason].meaning}
            for (reason, verdict), count in self.counts.most_common()
        ]
        totals = {"rows": self.num_rows, "kept": self.num_kept, "dropped": self.num_dropped, "seconds": self.seconds}
        return {**totals, "counts": counts, "findings": str(findings), "cleaned": list(map(str, self.cleaned))}

    def __str__(self) -> str:
        lines = [f"{'reason':<16} {'verdict':<8} {'rows':>9} {'share':>8}  what"] if self.counts else ["nothing found"]
        for (reason, verdict), count in self.counts.most_common():
            share = count / self.num_rows
            lines.append(f"{reason:<16} {verdict:<8} {count:>9} {share:>8.2%}  {REASONS[reason].meaning}")
        lines.append(
            f"{self.num_rows} rows, {self.num_kept} kept ({self.seconds / 3600:.2f} h), {self.num_dropped} dropped"
        )
        return "\n".join(lines)


def audit(
    manifests: Sequence[Path],
    out: Path,
    *,
    root: Path | None = None,
    tasks: KnownTasks = ANY_TASK,
    policy: dict[str, str] | None = None,
    limits: AudioLimits = DEFAULT_LIMITS,
    channels: str = LEFT,
    stop_above: float = 1.0,
    workers: int | None = None,
    show_progress: bool = False,
) -> AuditReport:
    """Audit manifests; a recording in two of them is dropped from all but the last that has it.

    So name the training manifest first and the test manifest last. Memory grows by about 200 bytes a row, for the
    hashes that duplicates are found by.

    Args:
        manifests: see `shards.manifests.manifest.read_manifest`.
        out: folder for audit.jsonl and the cleaned manifests.
        root: the folder that paths are relative to, if not the manifest's own.
        tasks: those that exist; a row of another is dropped.
        policy: reason -> keep, fix or drop, over the defaults of `shards.packing.findings.REASONS`.
        limits: the shortest and longest clip; a pack must be made with the same.
        channels: what is heard of several; a pack must be made with the same.
        stop_above: a greater share of dropped rows in a manifest is an error, and its cleaned manifest is not written.
        workers: processes; by default one a CPU.
        show_progress: draw a bar on stderr.

    Raises:
        FileNotFoundError: there is no such manifest.
        ValueError: unknown reason, or too large a share was dropped.
    """
    policy = make_policy(policy or {})
    manifests, out = _check_manifests(manifests), Path(out).expanduser()
    workers = count_cpus() if workers is None else workers
    num_rows = [sum(1 for _ in scan_manifest(path)) for path in manifests]
    if show_progress:
        print_status(f"auditing {sum(num_rows)} rows of {', '.join(map(str, manifests))}")
    out.mkdir(parents=True, exist_ok=True)
    report, later, failures = AuditReport(), set(), []
    with (
        open_atomically(out / "audit.jsonl") as log,
        progress_bar("auditing", sum(num_rows), show=show_progress) as advance,
    ):
        for path in reversed(manifests):
            auditing = _Auditing(path, policy, tasks.names, later, report, log)
            pieces = batched(scan_manifest(path, root=root, questions=tasks.questions), ROWS_A_PIECE)
            found = map_in_order(partial(_audit_piece, limits=limits, channels=channels), pieces, workers=workers)
            try:
                auditing.clean(out / _cleaned_name(path, manifests), found, stop_above, advance)
            except TooManyDropped as error:
                failures.append(error)  # raised when the findings are on the disk
            finally:
                found.close()
            later |= auditing.file_hashes
    if failures:
        raise failures[0]
    return report


def _check_manifests(manifests: Sequence[Path]) -> list[Path]:
    """Refuse what is no file of rows, such as the folder of the results."""
    manifests = [Path(path).expanduser() for path in manifests]
    for path in manifests:
        if path.is_dir() or not path.suffix:
            raise ValueError(
                f"manifests is {path} in part, but that is no file of rows; for the results say --out {path}."
            )
    return manifests


class TooManyDropped(ValueError):
    """A manifest loses a larger share of its rows than is accepted."""


class _Auditing:
    """One manifest on its way through: what was seen of it so far."""

    def __init__(
        self,
        path: Path,
        policy: dict[str, str],
        tasks: Collection[str] | None,
        later: set[int],
        report: AuditReport,
        log: TextIO,
    ):
        self.path, self.policy, self.tasks, self.later, self.report, self.log = path, policy, tasks, later, report, log
        self.file_hashes: set[int] = set()
        self.first_rows: dict[int, int] = {}  # of each clip, task and question
        self.num_rows = self.num_dropped = 0
        self.dropped: Counter = Counter()  # reason -> findings that dropped a row

    def clean(self, cleaned: Path, found: Iterator, stop_above: float, advance: Callable) -> None:
        """Write the manifest again with the rows that stay.

        Raises:
            TooManyDropped: then nothing is written.
        """
        with open_atomically(cleaned) as file:
            write_rows(file, cleaned, self._kept(found, advance))
            share = self.num_dropped / max(self.num_rows, 1)
            if share > stop_above:
                reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common() if count)
                raise TooManyDropped(
                    f"{self.path} loses {share:.2%} of its rows ({reasons}), but {stop_above:.2%} are accepted; "
                    "see audit.jsonl, mend the data or change the policy."
                )
        self.report.cleaned.insert(0, cleaned)

    def _kept(self, found: Iterator[list[tuple[Entry | RowError, RowAudit]]], advance: Callable) -> Iterator[Entry]:
        """The entries that stay; every finding is logged and counted on the way."""
        for row, audited in (pair for piece in found for pair in piece):
            findings = [*self._find_task(row), *audited.findings, *self._find_copies(row, audited)]
            verdicts = [choose_verdict(row, finding, self.policy) for finding in findings]
            for finding, verdict in zip(findings, verdicts):
                self._log(row, finding, verdict)
            self.num_rows += 1
            self.report.num_rows += 1
            advance(1)
            if "drop" in verdicts:
                self.num_dropped += 1
            else:
                self.report.num_kept += 1
                self.report.seconds += audited.seconds
                self.file_hashes.update(audited.file_hashes)
                yield row

    def _find_task(self, row: Entry | RowError) -> Iterator[Finding]:
        if self.tasks is not None and isinstance(row, Entry) and row.task not in self.tasks:
            yield Finding("unknown_task", describe_unknown_task(row, self.tasks), {"task": row.task})

    def _find_copies(self, row: Entry | RowError, audited: RowAudit) -> Iterator[Finding]:
        if not audited.file_hashes:
            return
        if any(file_hash in self.later for file_hash in audited.file_hashes):
            yield Finding("two_splits", "holds a recording that a later manifest holds too", {})
        first = self.first_rows.setdefault(audited.clip_hash, row.number)
        if first != row.number:
            yield Finding("duplicate", f"has the audio, task and question of row {first}", {"first_row": first})

    def _log(self, row: Entry | RowError, finding: Finding, verdict: str) -> None:
        self.report.counts[finding.reason, verdict] += 1
        self.dropped[finding.reason] += verdict == "drop"
        line = {
            "manifest": str(self.path),
            "number": row.number,
            "path": str(row.path),
            "reason": finding.reason,
            "verdict": verdict,
            "message": finding.message,
            "numbers": finding.numbers,
        }
        self.log.write(json.dumps(line, ensure_ascii=False) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill audit` takes."""
    parser.add_argument("manifests", type=to_path, nargs="+", metavar="MANIFEST", help="train first, test last")
    parser.add_argument(
        "--out", type=to_path, default=Path("audit"), help="folder of audit.jsonl and what is kept (%(default)s)"
    )
    parser.add_argument("--root", type=to_path, help="folder that the manifests' paths are relative to (their own)")
    for verdict in ("keep", "fix", "drop"):
        parser.add_argument(
            f"--{verdict}", nargs="+", default=[], metavar="REASON", help=f"reasons to {verdict} rows for"
        )
    add_limit_arguments(parser)
    parser.add_argument("--channels", choices=CHANNELS, default=LEFT, help="heard of several, as by pack (%(default)s)")
    parser.add_argument("--prompts", type=to_path, help="JSON file of the prompts whose tasks exist (the library's)")
    parser.add_argument("--stop-above", type=float, default=1.0, help="fail if a larger share is dropped (%(default)g)")
    parser.add_argument("--workers", type=int, default=count_cpus(), help="processes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else on stdout")


def main(args: argparse.Namespace, *, tasks: KnownTasks = ANY_TASK) -> int:
    """Run `distill audit`."""
    report = audit(
        args.manifests,
        args.out,
        root=args.root,
        tasks=tasks,
        policy={reason: verdict for verdict in ("keep", "fix", "drop") for reason in getattr(args, verdict)},
        limits=read_limits(args),
        channels=args.channels,
        stop_above=args.stop_above,
        workers=args.workers,
        show_progress=True,
    )
    if args.json:
        print_json(report.as_json(args.out / "audit.jsonl"))
        return 0
    print(report)
    print(f"findings: {args.out / 'audit.jsonl'}; cleaned: {', '.join(map(str, report.cleaned))}")
    return 0


def _audit_piece(
    rows: list[Entry | RowError], limits: AudioLimits, channels: str
) -> list[tuple[Entry | RowError, RowAudit]]:
    return list(zip(rows, audit_rows(rows, limits, channels)))


def _cleaned_name(path: Path, manifests: Sequence[Path]) -> str:
    """The manifest's own name, with its folder's before it where two manifests have the same."""
    is_unique = sum(other.name == path.name for other in manifests) == 1
    return path.name if is_unique else f"{path.resolve().parent.name}-{path.name}"
