"""Let a saved student answer about recordings: `distill transcribe STUDENT FILE… [--format …] [--question …]`.

A recording that is longer than the student's ears is cut at quiet places, and each piece has its times. One that cannot
be read is named while the others go on, and the exit code is 1.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from shards.audio.limits import AudioError
from shards.files.write import open_atomically
from shards.sample import SAMPLE_RATE
from students.asking import Answer, Listener, Segment, load_waveform


@dataclass(frozen=True)
class Transcript:
    """Of one recording; one that cannot be read has an error and no segments."""

    file: str
    segments: tuple[Segment, ...]
    error: str | None = None

    @property
    def text(self) -> str:
        """All of it on one line."""
        return " ".join(segment.text for segment in self.segments)


def transcribe(
    student: Listener,
    files: Sequence[Path],
    *,
    task: str = "asr",
    question: str | None = None,
    max_new_tokens: int = 100,
    batch_size: int = 8,
) -> Iterator[Transcript]:
    """The student's greedy answers, a transcript a file, in their order; pieces of several files share a batch.

    Args:
        student: who hears.
        files: wav, flac, ogg or mp3.
        task: whose prompt is asked.
        question: that a task of questions asks.
        max_new_tokens: the most tokens of the answer about a piece.
        batch_size: pieces that are answered at once.
    """
    ask = partial(student.ask, task=task, question=question, max_new_tokens=max_new_tokens, batch_size=batch_size)
    waiting: list[tuple[Path, np.ndarray | Exception]] = []
    for path in files:
        try:
            waiting.append((path, load_waveform(path, SAMPLE_RATE, student.min_samples)))
        except (AudioError, OSError) as error:
            waiting.append((path, error))
        if sum(len(x) for _, x in waiting if isinstance(x, np.ndarray)) >= batch_size * student.max_samples:
            yield from answer(ask, waiting)
            waiting = []
    yield from answer(ask, waiting)


def answer(ask: Callable[[list], list[Answer]], waiting: Sequence[tuple[Path, np.ndarray | Exception]]
           ) -> Iterator[Transcript]:  # fmt: skip
    """Transcripts of the recordings that wait, and of those that could not be read."""
    answers = iter(ask([x for _, x in waiting if isinstance(x, np.ndarray)]))
    for path, heard in waiting:
        if isinstance(heard, Exception):
            yield Transcript(str(path), (), str(heard))
        else:
            yield Transcript(str(path), next(answers).segments)


def format_txt(transcript: Transcript) -> str:
    """The text alone."""
    return transcript.text


def format_srt(transcript: Transcript) -> str:
    """SubRip subtitles: a numbered block a segment."""
    return "\n".join(
        f"{number}\n{clock(s.start, ',')} --> {clock(s.end, ',')}\n{s.text}\n"
        for number, s in enumerate(transcript.segments, 1)
    )


def format_vtt(transcript: Transcript) -> str:
    """WebVTT subtitles: a cue a segment."""
    cues = (f"\n{clock(s.start, '.')} --> {clock(s.end, '.')}\n{s.text}" for s in transcript.segments)
    return "\n".join(["WEBVTT", *cues])


def format_tsv(transcript: Transcript) -> str:
    """A line a segment: file, start and end in seconds, text."""
    rows = ((transcript.file, f"{s.start:.3f}", f"{s.end:.3f}", s.text) for s in transcript.segments)
    return "\n".join("\t".join(" ".join(cell.split()) for cell in row) for row in rows)


def format_json(transcript: Transcript) -> str:
    """One object on one line: file, text, segments, error."""
    return json.dumps({**asdict(transcript), "text": transcript.text}, ensure_ascii=False)


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": format_txt,
    "srt": format_srt,
    "vtt": format_vtt,
    "tsv": format_tsv,
    "json": format_json,
}


def clock(seconds: float, mark: str) -> str:
    """`01:02:03,004`, with the mark of the format before the milliseconds."""
    milliseconds = round(seconds * 1000)
    hours, minutes = milliseconds // 3_600_000, milliseconds // 60_000 % 60
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000 % 60:02}{mark}{milliseconds % 1000:03}"


def write(transcripts: Iterable[Transcript], kind: str, out: Path | None, *, several: bool) -> int:
    """Print the transcripts, or write each into a folder; returns the number of files that could not be read."""
    num_failed = 0
    if kind == "tsv" and out is None:
        print("file\tstart\tend\ttext")
    for transcript in transcripts:
        if transcript.error is not None:
            num_failed += 1
            print(f"error: {transcript.error}", file=sys.stderr)
            if kind != "json" or out is not None:
                continue
        text = FORMATS[kind](transcript)
        if out is not None:
            with open_atomically(out / f"{Path(transcript.file).stem}.{kind}") as file:
                file.write(("file\tstart\tend\ttext\n" if kind == "tsv" else "") + text + "\n")
        elif text or kind == "txt":
            print(f"{transcript.file}\t{text}" if several and kind == "txt" else text, flush=True)
    return num_failed


def load_listener(name: str | Path) -> Listener:
    """A saved student, or one that was exported for devices, which needs no torch."""
    if (Path(name) / "device.json").is_file():
        from students.device.student import DeviceStudent

        return DeviceStudent(name)
    from students.pretrained import Student

    return Student.from_pretrained(name)


def main(args: argparse.Namespace) -> int:
    """Run `distill transcribe`."""
    student = load_listener(args.student)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    transcripts = transcribe(
        student,
        args.files,
        task="QA" if args.question else args.task,
        question=args.question,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    num_failed = write(transcripts, args.format, args.out, several=len(args.files) > 1)
    if num_failed:
        print(f"{num_failed} of {len(args.files)} files could not be read, see above", file=sys.stderr)
    return 1 if num_failed else 0
