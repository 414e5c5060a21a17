"""The command line: `distill COMMAND …`, a map of the pipeline. Imports a stage only when it is called."""

import argparse
import errno
import importlib
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.launch import bind_to_launcher
from distill.stopping import PREEMPTED, STOP_SIGNALS, is_ignored
from shards.parent import is_in_main_thread

STAGES = {
    # command: (module, what the help says)
    "pipeline": ("distill.pipeline", "every stage below for one config, from raw audio to scorecard"),
    "manifest": ("shards.datasets", "LibriSpeech, GigaSpeech, Clotho, AudioCaps, WavCaps, MusicNet to a manifest"),
    "audit": ("shards.audit", "find bad audio and text before training; nothing is replaced"),
    "pack": ("shards.pack", "manifest and audio files to WebDataset shards"),
    "split": ("shards.split", "cut a manifest into train and valid without leakage"),
    "subset": ("shards.subset", "a mini set: a share of each task, chosen tasks, so many hours"),
    "stats": ("shards.stats", "counts, hours and lengths of a data set; `stats model CONFIG`: what each part costs"),
    "teach": ("distill.teach", "the demo's small teacher, from nothing"),
    "plan": ("distill.plan", "what a target cache would take and keep, by codec, before it is made"),
    "cache": ("distill.cache", "the teacher's targets beside the shards (also: accelerate launch distill/cache.py)"),
    "cache-verify": ("distill.cache_verify", "re-read a target cache, and let the teacher say a share of it again"),
    "doctor": ("distill.doctor", "prove objective, data and cache right before GPU hours are spent"),
    "filter": ("distill.filter", "leave out or down-weight clips whose labels the teacher does not believe"),
    "run": ("distill.run", "train a student (also: accelerate launch distill/run.py)"),
    "answers": ("distill.answers", "on-policy: the student answers, the teacher scores (docs/rounds.md)"),
    "evaluate": ("distill.scorecard", "teacher and student on the test split: the scorecard"),
    "export": ("distill.export", "a finished student as a folder to hand on, LoRA kept or merged"),
    "report": ("distill.report", "a run's curves and scorecard as one HTML file"),
    "transcribe": ("distill.transcribe", "let a saved student answer about an audio file"),
}

ENDED = "exit code {}: see the message above; the same command goes on from what is finished"
LAST_WORDS = (  # of a process that gets no chance to say any
    "ended without a word: exit code -9 is kill -9 or no memory left, 1 below threads' stacks is train.hang_minutes; "
    "the same command goes on from what is finished"
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the top level alone; a command's own is built when it is chosen."""
    lines = "\n".join(f"  {name:<12} {text}" for name, (_, text) in STAGES.items())
    return argparse.ArgumentParser(
        prog="distill",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distil a SALMONN audio language model into a small 4-bit student.",
        epilog=f"commands, in the order of the pipeline:\n{lines}\n\n"
        "`distill COMMAND --help` tells more. Errors are one line; --debug shows where they come from.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    parser.add_argument("command", nargs="?", choices=STAGES, metavar="COMMAND")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if words[:1] == ["--debug"] and len(words) > 1:  # before the command as good as behind it
        words = [*words[1:], "--debug"]
    if not words or words[0] not in STAGES:
        parser.parse_args(words)
        parser.print_help()
        return 0 if not words else 2
    command, *rest = words
    module = importlib.import_module(STAGES[command][0])
    if words[:2] == ["stats", "model"]:
        command, *rest = "stats model", *words[2:]
        module = importlib.import_module("distill.costtable")
    own = argparse.ArgumentParser(prog=f"distill {command}", description=(module.__doc__ or "").split("\n\n")[0])
    own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_arguments(own)
    args = own.parse_intermixed_args(rest)  # options and key=value words in any order
    return guard(lambda: module.main(args, **known_tasks(module.main, args)), debug=args.debug)


def known_tasks(stage, args: argparse.Namespace) -> dict:
    """For stages that check a manifest's tasks, `tasks`, those of `args.prompts`, and `questions`, see there."""
    if "tasks" not in inspect.signature(stage).parameters:
        return {}
    from teachers.prompts import load_prompts

    prompts = load_prompts(args.prompts, "{}")
    return {"tasks": prompts.by_task.keys(), "questions": prompts.asking}


class StoppedError(KeyboardInterrupt):
    """A queue, a launcher or the end of a terminal asked to stop."""


@contextmanager
def stop_in_order() -> Iterator[None]:
    """A block that every signal ends as Ctrl-C does, so that what it holds is put away; the second ends it at once."""

    def stop(number: int, frame) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise StoppedError

    numbers = [n for n in STOP_SIGNALS if n != signal.SIGINT and not is_ignored(n)] if is_in_main_thread() else []
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def guard(work, *, debug: bool) -> int:
    """Run `work` and turn a user's error into one line and an exit code.

    `KeyError` and the like are bugs of ours and keep their traceback.
    """
    bind_to_launcher()
    tell_launcher(LAST_WORDS)
    try:
        with stop_in_order():
            code = int(work() or 0)
        if code:  # the stage has said why
            tell_launcher(ENDED.format(code))
        return code
    except KeyboardInterrupt as stopped:
        print("stopped; files that were finished are kept, and the same command goes on from them", file=sys.stderr)
        if not isinstance(stopped, StoppedError):
            return 130
        tell_launcher(ENDED.format(PREEMPTED))
        return PREEMPTED
    except (ValueError, OSError, RuntimeError) as error:
        if debug:
            raise
        text = f"error: {describe(error)}"
        print(text, file=sys.stderr)
        tell_launcher(text)
        return 1


def describe(error: Exception) -> str:
    """What a user reads of an error: its text, where it is ours, or what it means, where the system or torch speaks."""
    if isinstance(error, OSError) and error.strerror:
        if error.strerror != os.strerror(error.errno):  # ours, with the system's number
            return error.strerror
        if error.errno == errno.EEXIST:
            return f"{error.filename} is a file, but a folder is to be made there; name another one."
        return (
            f"{error.filename or 'a file'} cannot be used ({error.strerror}), but this command needs it; check its "
            f"path, its rights and the free space."
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported here
        return (
            f"memory of the GPU is full ({'. '.join(str(error).split('. ')[:3])}), but a step must fit; lower "
            f"train.micro_batch_size, data.batch_seconds, cache.batch_size or eval.batch_size, or set "
            f"student.quantization=nf4."
        )
    return str(error) or type(error).__name__


def tell_launcher(text: str) -> None:
    """Leave an error where torchrun and `accelerate launch` look for it: it is then the last line of their report."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):  # it was said already
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report))


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A config file and `key=value` words, as every stage of the pipeline takes them."""
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change, such as train.steps=200")


def run_stage(stage, argv: Sequence[str] | None = None) -> int:
    """What `accelerate launch distill/STAGE.py CONFIG [key=value …]` does: `stage(config)` behind the guard."""
    parser = argparse.ArgumentParser(description=(sys.modules[stage.__module__].__doc__ or "").split("\n\n")[0])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_config_arguments(parser)
    args = parser.parse_args(argv)

    def work() -> int:
        from distill.config import load_config

        result = stage(load_config(args.config, args.overrides))
        return result if isinstance(result, int) else 0

    return guard(work, debug=args.debug)
