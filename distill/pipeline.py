"""Every stage for one config, from raw audio to scorecard: `distill pipeline CONFIG [key=value …]`.

Each stage that trains or runs the teacher is a process group of its own, under the launch file that `--launch` names.
What exists already is used again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distill.cli import add_config_arguments
from distill.config import Config, load_config
from shards.manifest import missing_file_error, open_atomically
from shards.pack import pack
from shards.packfolder import hash_file
from teachers.prompts import load_prompts

CUT = "cut.json"  # beside the manifests that were cut: what from


class StageError(RuntimeError):
    """A stage ended with another exit code than 0; it said why itself."""


def run_pipeline(path: str, overrides: Sequence[str], launch: str | None) -> None:
    """All stages in order.

    Raises:
        StageError: a stage failed.
        ValueError, OSError: the config or the corpus is wrong.
    """
    config = load_config(path, overrides)
    began = time.monotonic()
    make_shards(config)
    if config.scratch.steps:  # nothing is downloaded, and loading bars of milliseconds are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if config.scratch.steps and not config.teacher.path:
        launch_stage("distill.teach", path, overrides, launch)
    if not config.teacher.online:
        launch_stage("distill.cache", path, overrides, launch)
    launch_stage("distill.run", path, overrides, launch)

    from distill.scorecard import evaluate_run

    evaluate_run(config)
    print(f"all stages: {(time.monotonic() - began) / 60:.1f} min")


def make_shards(config: Config) -> None:
    """Write the embedded corpus if the config asks for it, and pack every manifest there is."""
    if config.corpus.kind == "synth":
        make_corpus(config)
    elif config.cuts_valid:
        cut_manifest(config)
    tasks = load_prompts(None, "{}").by_task.keys()
    for name in ("train", "valid", "test"):
        if config.manifest(name) is not None:
            report = pack(config.manifest(name), config.shards(name), name=name, tasks=tasks, show_progress=True)
            print(report, file=sys.stderr)


def cut_manifest(config: Config) -> None:
    """Cut the training manifest into train and valid, unless they are there and of this very manifest and share.

    Raises:
        FileNotFoundError: there is no training manifest.
        ValueError: they are of another one; what is packed, cached and trained is of it too.
    """
    from shards.split import split

    train, valid = config.manifest("train"), config.manifest("valid")
    source, record = Path(config.corpus.train), train.parent / CUT
    if not source.is_file():
        raise missing_file_error(source, place="corpus.train")
    cut = {"sha256": hash_file(source), "valid_share": config.corpus.valid_share}
    if record.exists():
        found = json.loads(record.read_text())
        if found != cut:
            raise ValueError(
                f"corpus.train is {source} with sha256 {cut['sha256'][:16]} and corpus.valid_share "
                f"{cut['valid_share']}, but {train.parent} was cut from sha256 {found['sha256'][:16]} with "
                f"{found['valid_share']}; choose another data.folder=, or remove {config.data.folder} to begin anew."
            )
        return
    train.parent.mkdir(parents=True, exist_ok=True)
    split(source, train, valid, valid_share=cut["valid_share"], by="recording")
    with open_atomically(record) as file:  # last: without it the cut is made again
        json.dump(cut, file)


def make_corpus(config: Config) -> None:
    """Write the embedded corpus unless it is there."""
    from shards.synth import SIZES, write_corpus

    folder = config.manifest("test").parent
    if config.manifest("test").exists():
        print(f"corpus: {folder} exists, used again", file=sys.stderr)
        return
    write_corpus(
        folder,
        seed=config.seed,
        sizes={**SIZES, "train": config.corpus.num_train},
        unlabelled_share=0,
        show_progress=True,
    )


def launch_stage(module: str, path: str, overrides: Sequence[str], launch: str | None) -> None:
    """Run one stage in its own processes; its output goes where ours goes."""
    command = [sys.executable, "-m"]
    if launch is not None:
        command += ["accelerate.commands.launch", "--config_file", launch, "--module"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    print(f"— {module.rpartition('.')[2]}", file=sys.stderr, flush=True)
    process = subprocess.Popen([*command, module, path, *overrides], env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if code:
        raise StageError(
            f"stage {module.rpartition('.')[2]} ended with exit code {code}, but the next one needs it; "
            f"its message stands above, and the same command goes on from what is finished."
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill pipeline` takes."""
    add_config_arguments(parser)
    parser.add_argument(
        "--launch", help="launch file of the training stages, see configs/accelerate/; default: one process"
    )


def main(args: argparse.Namespace) -> int:
    """Run `distill pipeline`."""
    if args.launch and not Path(args.launch).is_file():
        near = ", ".join(sorted(str(p) for p in Path(args.launch).parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"--launch is {args.launch}, but there is no such file; YAML files beside it: {near}.")
    run_pipeline(args.config, args.overrides, args.launch)
    return 0
