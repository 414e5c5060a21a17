"""Let a saved student answer about an audio file: `distill transcribe STUDENT AUDIO [--task asr | --question …]`."""

import argparse
from pathlib import Path

import torch

from shards.audio import hash_waveform, load_audio
from shards.sample import Sample
from students.student import load_student


def transcribe(folder: Path, audio: Path, *, task: str, question: str | None, max_new_tokens: int) -> str:
    """The student's greedy answer to one file.

    Raises:
        FileNotFoundError: no student or no audio there.
        AudioError: the file cannot be decoded, or holds nothing to hear.
    """
    if not audio.is_file():
        raise FileNotFoundError(f"audio is {audio}, but there is no such file; give a wav, flac, ogg or mp3 file.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = load_student(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    waveform_N = load_audio([audio])
    sample = Sample(audio.stem, waveform_N, None, task, question, "", hash_waveform(waveform_N))
    return student.generate([sample], max_new_tokens=max_new_tokens)[0]


def main(args: argparse.Namespace) -> int:
    """Run `distill transcribe`."""
    task = "QA" if args.question else args.task
    print(transcribe(args.student, args.audio, task=task, question=args.question, max_new_tokens=args.max_new_tokens))
    return 0
