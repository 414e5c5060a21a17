"""Every stage for one config, from raw audio to scorecard: `distill pipeline CONFIG [key=value …]`.

Each stage that trains or runs the teacher is a process group of its own, under the launch file that `--launch` names.
What exists already is used again.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distill.commandline.launch import name_parent
from distill.config import SPLITS, Config, load_config
from distill.config.places import check_files
from distill.config.rules import value_at
from distill.training.monitoring.trackers import check_trackers
from distill.training.runlock import RunLock
from distill.training.stopping import PREEMPTED, handle_signals
from shards.files.hash import remember_hash
from shards.files.write import open_atomically, write_atomically
from shards.jsonfile import ShapeError, read_object
from shards.manifests.manifest import KnownTasks, missing_file_error
from shards.packing.encode import EncodeOptions
from shards.packing.folder import ShardSize
from shards.packing.pack import pack
from shards.status import print_status
from shards.tars.source import is_remote
from teachers.words.prompts import load_prompts

CUT = "cut.json"  # beside the manifests that were cut: what from
CORPUS = "corpus.json"  # beside those of the embedded corpus: its size
POLL_SECONDS = 0.1  # between looks at whether the processes of a stopped stage are gone


class StageError(RuntimeError):
    """A stage ended with another exit code than 0; it said why itself."""


def run_pipeline(path: str, overrides: Sequence[str], launch: str | None) -> None:
    """All stages in order.

    Raises:
        StageError: a stage failed.
        ValueError, OSError: the config or the corpus is wrong.
    """
    config = load_config(path, overrides)
    check_needed(config)
    with RunLock(config.run_folder, pipeline=True):
        run_stages(config, path, overrides, launch)


def run_stages(config: Config, path: str, overrides: Sequence[str], launch: str | None) -> None:
    """As `run_pipeline`, in a folder that nobody else writes into."""
    began = time.monotonic()
    make_shards(config)
    if config.scratch.steps:  # nothing is downloaded, and loading bars of milliseconds are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if config.scratch.steps and config.teacher.path:
        print_status(f"scratch trains no teacher here: teacher.path is {config.teacher.path}")
    elif config.scratch.steps:
        launch_stage("distill.teach", path, overrides, launch)
    if not config.teacher.online:
        launch_stage("distill.cache", path, overrides, launch)
    launch_stage("distill.run", path, overrides, launch)

    from distill.evaluation.evaluate import DEVICE, evaluate_run

    if config.eval.device:
        export_again(config.run_folder, config.run_folder / DEVICE)
    evaluate_run(config)
    print_status(f"all stages: {(time.monotonic() - began) / 60:.1f} min")


def export_again(run_folder: Path, out: Path) -> None:
    """Export the run's student for devices, over an export of a student that has changed since."""
    from distill.exporting.device import export_device
    from students.start import identify_student

    made_of = out.with_suffix(".json")
    student = identify_student(run_folder / "student")
    if out.exists() and read_record(made_of, dict.fromkeys(student, str)) == student:
        print_status(f"device: {out} exists, used again")
        return
    print_status("— export")
    shutil.rmtree(out, ignore_errors=True)
    export_device(run_folder, out)
    write_atomically(made_of, json.dumps(student))  # last: without it the export is made again


def check_needed(config: Config) -> None:
    """Refuse what later stages would miss, before hours of packing and caching.

    Raises:
        ValueError: the config names no teacher, no student or no training manifest, or a tracker that is not here.
        FileNotFoundError: a file that it names is not there.
    """
    is_packed_here = config.corpus.kind == "manifest" and not is_remote(config.data.folder)
    manifests = ("corpus.train", "corpus.valid", "corpus.test") if is_packed_here else ()
    is_made_here = config.scratch.steps and not config.teacher.path
    needed = () if is_made_here else ("teacher.path", "student.llm")
    for key in (*needed, *manifests[:1]):
        if not value_at(config, key):
            raise ValueError(f"{key} is empty, but the pipeline needs it; give it, as in {key}=…")
    check_files(config, manifests)
    check_trackers(config.train.trackers)


def make_shards(config: Config) -> None:
    """Write the embedded corpus if the config asks for it, and pack every manifest there is.

    Raises:
        ValueError: there is something to pack, but the data folder is a URL, which is only read.
    """
    if is_remote(config.data.folder):
        if config.corpus.train or config.corpus.kind == "synth":
            raise ValueError(
                f"data.folder is {config.data.folder}, but shards are packed on this machine alone; leave corpus out "
                f"where the shards are there already, or pack them here and copy the folder."
            )
        return
    if config.corpus.kind == "synth":
        make_corpus(config)
    elif config.cuts_valid:
        cut_manifest(config)
    options, size = EncodeOptions(channels=config.corpus.channels), ShardSize(config.corpus.shard_samples)
    for name in SPLITS:
        if config.manifest(name) is not None:
            asked = config.eval.prompts if name != "train" else ""
            prompts = load_prompts(config.teacher.prompts or None, "{}", asked or None)
            known = {"tasks": KnownTasks(prompts.asked.keys(), prompts.asking), "options": options, "size": size}
            report = pack(config.manifest(name), config.shards(name), name=name, show_progress=True, **known)
            print_status(str(report))


def cut_manifest(config: Config) -> None:
    """Cut the training manifest into train and valid, unless they are there and of this very manifest and share.

    Raises:
        FileNotFoundError: there is no training manifest.
        ValueError: they are of another one; what is packed, cached and trained is of it too.
    """
    from shards.manifests.split import split

    train, valid = config.manifest("train"), config.manifest("valid")
    source, record = Path(config.corpus.train), train.parent / CUT
    if not source.is_file():
        raise missing_file_error(source, place="corpus.train")
    cut = {"sha256": remember_hash(source), "valid_share": config.corpus.valid_share}
    found = read_record(record, {"sha256": str, "valid_share": float})
    if found is not None:
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


def read_record(path: Path, fields: dict[str, type]) -> dict | None:
    """What was made, as the record beside it says; None where there is none or it is damaged: then it is made again."""
    try:
        return read_object(path, fields)
    except (FileNotFoundError, ShapeError):
        return None


def make_corpus(config: Config) -> None:
    """Write the embedded corpus unless it is there, of whatever seed: another seed trains again on the same clips.

    Raises:
        ValueError: it is of another size; what is packed, cached and trained is of it too.
    """
    from shards.demo.synth import SIZES, write_corpus

    folder = config.manifest("test").parent
    record, num_train = folder / CORPUS, config.corpus.num_train
    found = read_record(record, {"num_train": int})
    if found is not None:
        there = found["num_train"]
        if there != num_train:
            raise ValueError(
                f"corpus.num_train is {num_train}, but the corpus in {folder} was made with {there}; choose another "
                f"data.folder=, or remove {config.data.folder} to begin anew."
            )
        print_status(f"corpus: {folder} exists, used again")
        return
    write_corpus(
        folder,
        seed=config.seed,
        sizes={**SIZES, "train": num_train},
        unlabelled_share=0,
        show_progress=True,
    )
    with open_atomically(record) as file:  # last: without it the corpus is written again
        json.dump({"num_train": num_train}, file)


def launch_stage(module: str, path: str, overrides: Sequence[str], launch: str | None) -> None:
    """Run one stage in its own processes; its output goes where ours goes.

    Raises:
        StageError: it failed.
        SystemExit: it was asked to stop, or we were and asked it; with 143.
        KeyboardInterrupt: the same, by Ctrl-C.
    """
    command = [sys.executable, "-m"]
    if launch is not None:
        command += ["distill.commandline.launch", "--config_file", launch, "--module"]
    environment = {
        **os.environ,
        **name_parent(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    print_status(f"— {module.rpartition('.')[2]}")
    code, caught = wait_for([*command, module, path, *overrides], environment)
    if caught == signal.SIGINT:
        raise KeyboardInterrupt
    if caught or code == PREEMPTED:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        raise SystemExit(PREEMPTED)
    if code:
        raise StageError(
            f"stage {module.rpartition('.')[2]} ended with exit code {code}, but the next one needs it; "
            f"its message stands above, and the same command goes on from what is finished."
        )


def wait_for(command: Sequence[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """Run a command, pass on the signals that would end us, and come back when it and all that it started are gone.

    Returns:
        its exit code, and the first signal that was passed on.
    """
    caught: list[int] = []
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, frame) -> None:
        caught.append(number)
        for process in processes:
            process.send_signal(number)

    with handle_signals(pass_on):
        # a group of its own: what a launcher leaves behind is found, and Ctrl-C comes once, through us
        processes.append(subprocess.Popen(command, env=environment, process_group=0))
        for number in caught:
            processes[0].send_signal(number)
        code = processes[0].wait()
        if caught:
            end_group(processes[0].pid, caught[0])
    return code, caught[0] if caught else None


def end_group(group: int, number: int) -> None:
    """Send a signal to what is left of a process group, and wait until nothing is: some launchers just die of it."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
        while True:
            time.sleep(POLL_SECONDS)
            os.killpg(group, 0)


def main(args: argparse.Namespace) -> int:
    """Run `distill pipeline`."""
    run_pipeline(args.path, args.overrides, args.launch)
    return 0
