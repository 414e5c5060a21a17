"""Let a saved student answer about recordings: `distill transcribe STUDENT FILE… [--format …] [--question …]`.

A recording that is longer than the student's ears is cut at quiet places, and each piece has its times. One that cannot
be read is named while the others go on, and the exit code is 1.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shards.audio.decode import AudioError, AudioLimits, hash_waveform, load_audio
from shards.audio.quiet import cut_at_quiet
from shards.manifests.manifest import open_atomically
from shards.sample import SAMPLE_RATE, Sample
from students.pretrained import Segment
from students.student import load_student
from teachers.salmonn import Salmonn

LIMITS = AudioLimits(max_seconds=3600.0)


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
    student: Salmonn,
    files: Sequence[Path],
    *,
    task: str = "asr",
    question: str | None = None,
    max_new_tokens: int = 100,
    batch_size: int = 8,
) -> Iterator[Transcript]:
    """The student's greedy answers, a transcript a file, in their order; pieces of several files share a batch.

    Args:
        student: in evaluation mode.
        files: wav, flac, ogg or mp3.
        task: whose prompt is asked.
        question: that a task of questions asks.
        max_new_tokens: of the answer about a piece.
        batch_size: pieces that are answered at once.
    """
    waiting: list[tuple[Transcript | Path, list[tuple[Sample, float]]]] = []
    for path in files:
        try:
            waiting.append((path, list(cut(path, student, task, question))))
        except (AudioError, OSError) as error:
            waiting.append((Transcript(str(path), (), str(error)), []))
        if sum(len(pieces) for _, pieces in waiting) >= batch_size:
            yield from answer(student, waiting, max_new_tokens, batch_size)
            waiting = []
    yield from answer(student, waiting, max_new_tokens, batch_size)


def cut(path: Path, student: Salmonn, task: str, question: str | None) -> Iterator[tuple[Sample, float]]:
    """The pieces of a recording that the student can hear, each with its start in seconds."""
    waveform_N = load_audio([path], limits=LIMITS)
    for start, end in cut_at_quiet(waveform_N, student.max_samples, student.min_samples):
        piece_N = waveform_N[start:end]
        sample = Sample(path.stem, piece_N, None, task, question, "", hash_waveform(piece_N))
        yield sample, start / SAMPLE_RATE


def answer(student: Salmonn, waiting: list, max_new_tokens: int, batch_size: int) -> Iterator[Transcript]:
    """Transcripts of the recordings whose pieces wait."""
    samples = [sample for _, pieces in waiting for sample, _ in pieces]
    texts: list[str] = []
    for first in range(0, len(samples), batch_size):
        texts += student.generate(samples[first : first + batch_size], max_new_tokens=max_new_tokens)
    said = iter(texts)
    for file, pieces in waiting:
        if isinstance(file, Transcript):
            yield file
            continue
        segments = tuple(
            Segment(round(start, 3), round(start + sample.duration, 3), next(said)) for sample, start in pieces
        )
        yield Transcript(str(file), segments)


def format_txt(transcript: Transcript) -> str:
    return transcript.text


def format_srt(transcript: Transcript) -> str:
    return "\n".join(
        f"{number}\n{clock(s.start, ',')} --> {clock(s.end, ',')}\n{s.text}\n"
        for number, s in enumerate(transcript.segments, 1)
    )


def format_vtt(transcript: Transcript) -> str:
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


def main(args: argparse.Namespace) -> int:
    """Run `distill transcribe`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = load_student(args.student, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
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
