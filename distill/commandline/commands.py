"""Every command: its stage, what its help says, what it takes, and what of that is read before the stage is imported.

Imports no stage, so that help, completion and a wrong word, key or path cost no torch. What a stage of `shards` takes
it says itself, as it imports nothing heavy; of the others it is said here.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.command import add_config_arguments, read_config_arguments
from distill.commandline.paths import find_run, find_student, list_recordings
from distill.config.recipes import find_config, find_launch, list_recipes
from distill.config.suggestions import did_you_mean, nearest, nearest_fields
from distill.sizes.cards import SHARE
from shards.field_types import expand_home, to_path


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Args:
        module: the stage's module; its `main(args)` returns the exit code, its docstring is the description.
        help: a line for the list of commands.
        takes: adds the arguments; None: the module's own `add_arguments` does, and importing it is cheap.
        reads: checks and loads what the arguments name, in place, before the stage is imported.
        has_json: whether it takes `--json` too, and prints the result for a script.
    """

    module: str
    help: str
    takes: Callable[[argparse.ArgumentParser], None] | None = None
    reads: Callable[[argparse.Namespace], None] = lambda args: None
    has_json: bool = False


def read_stage_arguments(args: argparse.Namespace) -> None:
    """As `read_config_arguments`, once the files and training shards that the config names are there.

    Raises:
        FileNotFoundError, ShardError: one is not.
    """
    read_config_arguments(args)
    from distill.config.places import check_files, check_shards

    check_files(args.config)
    check_shards(args.config, "train")


def read_plan_arguments(args: argparse.Namespace) -> None:
    """As `read_stage_arguments`; what cards hold is planned without a file."""
    (read_stage_arguments if args.gpus is None else read_config_arguments)(args)


def read_evaluate_arguments(args: argparse.Namespace) -> None:
    """Read the config of `distill evaluate`, once its student, its teacher and clips to answer are there.

    Raises:
        FileNotFoundError, ShardError: one is not.
    """
    read_config_arguments(args)
    from distill.config.places import check_files, check_shards, check_student

    check_student(args.config)
    check_files(args.config)
    check_shards(args.config, "test")


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill pipeline` takes."""
    add_config_arguments(parser)
    parser.add_argument(
        "--launch",
        help="launch file of the training stages, or its name in configs/accelerate; default: one process",
    )


def read_pipeline_arguments(args: argparse.Namespace) -> None:
    """Find the config and the launch file of `distill pipeline` by their names."""
    read_config_arguments(args)
    args.launch = args.launch and str(find_launch(args.launch))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill stats model` takes."""
    parser.add_argument("words", nargs="+", metavar="CONFIG|key=value", help="YAML files or recipes, and fields")
    add_usage_arguments(parser)


def add_usage_arguments(parser: argparse.ArgumentParser) -> None:
    """The clip that costs are counted of; its numbers have their defaults in `distill.sizes.costs.Usage`."""
    suppressed = argparse.SUPPRESS
    parser.add_argument("--seconds", type=float, default=suppressed, help="of audio, in the clip that is counted")
    parser.add_argument("--prompt-tokens", type=int, default=suppressed, help="of it")
    parser.add_argument("--answer-tokens", type=int, default=suppressed, help="of it")


def read_model_arguments(args: argparse.Namespace) -> None:
    """`args.configs` is each config by its path.

    Raises:
        ValueError: no word is a config.
    """
    from distill.config import load_config

    overrides = [word for word in args.words if "=" in word]
    paths = [str(find_config(word)) for word in args.words if "=" not in word]
    if not paths:
        raise ValueError("configs are none, but a table is of some; name YAML files or recipes.")
    args.configs = {path: load_config(path, overrides) for path in paths}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill plan` takes."""
    add_config_arguments(parser)
    parser.add_argument("--max-gb", type=float, help="the most that the cache may take, 10^9 bytes; default: any")
    parser.add_argument("--clips", type=int, default=300, help="that the teacher hears (%(default)s)")
    parser.add_argument("--gpus", type=int, help="plan the memory of so many GPUs instead, and load no weights")
    parser.add_argument("--gpu-gb", type=float, help="of each, 10^9 bytes (the card's, or 24)")
    parser.add_argument("--card", help="with --gpus: what they are, such as RTX4090; prints hours and disk too")
    parser.add_argument("--audio-hours", type=float, help="with --card: to train on (what is packed)")
    parser.add_argument("--reached", type=float, default=SHARE, help="share of the card's published rate (%(default)s)")
    parser.add_argument("--zero", type=int, default=2, choices=range(4), help="DeepSpeed's stage; 0: DDP (%(default)s)")
    parser.add_argument("--fsdp2", action="store_true", help="instead: FSDP2, which splits the LLM's frozen weights")
    add_usage_arguments(parser)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill verify` takes."""
    add_config_arguments(parser)
    parser.add_argument(
        "--share", type=float, default=0.01, help="of the batches that are computed again (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of their choice (%(default)s)")


def add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill filter` takes."""
    add_config_arguments(parser)
    parser.add_argument("--max-wer", type=float, help="of the teacher's own transcript against the label, a fraction")
    parser.add_argument("--max-ce", type=float, help="the teacher's mean cross-entropy on the label, nats a token")
    parser.add_argument(
        "--weight", type=float, default=0.0, help="of a clip over a limit; 0 leaves it out (%(default)s)"
    )
    parser.add_argument("--out", type=to_path, help="the file to write; default: one in the cache's folder")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill evaluate` takes."""
    add_config_arguments(parser)
    parser.add_argument("--efficiency", action="store_true", help="measure time, memory, energy of an answer instead")
    parser.add_argument(
        "--export",
        type=to_path,
        action="append",
        default=[],
        help="with it, a folder of `distill export`; several may be",
    )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill export` takes."""
    parser.add_argument("run", type=to_path, metavar="RUN", help="a finished run's folder, runs/NAME, or its config")
    parser.add_argument("out", type=to_path, metavar="OUT", help="folder to write")
    parser.add_argument("--merge", action="store_true", help="write the LLM with LoRA inside instead of LoRA alone")
    parser.add_argument("--whole", action="store_true", help="copy ears and LLM inside, for use on any machine")
    parser.add_argument("--salmonn", action="store_true", help="write SALMONN's own checkpoint format beside")
    parser.add_argument(
        "--format",
        choices=("vllm", "bnb", "gguf-q8_0", "gguf-iq4_nl", "onnx-ears"),
        help="write its LLM, or its ears, for others instead",
    )
    parser.add_argument("--device", choices=("openvino",), help="write a folder for processors without torch instead")
    parser.add_argument("--head", choices=("f32", "f16", "int8"), default="f16", help="of its LLM (%(default)s)")
    parser.add_argument("--ears", choices=("f32", "f16", "int8"), default="f16", help="their weights (%(default)s)")
    parser.add_argument(
        "--products",
        choices=("exact", "fast"),
        default="exact",
        help="float32, or what is quick (%(default)s)",
    )
    parser.add_argument("--ears-bits", choices=("none", "bf16", "int8"), default="none",
                        help="bits of the ears' linear layers, whose error is printed; none: as trained")  # fmt: skip


def read_export_arguments(args: argparse.Namespace) -> None:
    """Find the run of `distill export` by its name."""
    args.run = find_run(args.run)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill report` takes."""
    parser.add_argument("run", type=to_path, metavar="RUN", help="a run's folder, runs/NAME, or its config")


def add_transcribe_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill transcribe` takes."""
    parser.add_argument("student", metavar="STUDENT", help="saved student, such as runs/NAME/student, run or export")
    parser.add_argument("files", nargs="+", type=to_path, metavar="FILE", help="recordings, or folders of them")
    parser.add_argument("--format", choices=("txt", "srt", "vtt", "tsv", "json"), default="txt", help="(%(default)s)")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="an object a line")
    parser.add_argument("--out", type=to_path, help="folder for a file a recording; else they are printed")
    parser.add_argument("--task", default="asr", help="whose prompt is asked (%(default)s)")
    parser.add_argument("--question", help="ask this instead, as task QA")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="of the answer about a piece (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="pieces that are answered at once (%(default)s)")


def read_transcribe_arguments(args: argparse.Namespace) -> None:
    """`args.files` is every recording, those of folders among them.

    Raises:
        FileNotFoundError: there is no student, or not one recording.
        ValueError: subtitles of several recordings would be printed as one, or one would be written over another.
    """
    args.student, args.files = find_student(args.student), list_recordings(args.files)
    if not any(path.is_file() for path in args.files):
        names = ", ".join(map(str, args.files)) or "none"
        raise FileNotFoundError(f"recordings are {names}, but there is no such file; give wav, flac, ogg or mp3 files.")
    if len(args.files) > 1 and args.format in ("srt", "vtt") and args.out is None:
        raise ValueError(f"--format is {args.format}, but {len(args.files)} recordings need a file each; give --out.")
    stems = [path.stem for path in args.files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if args.out is not None and twice:
        raise ValueError(f"{twice[0]} is the name of several recordings, but --out has one file a name; split them.")


def add_new_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill new` takes."""
    recipes = ", ".join(list_recipes())
    parser.add_argument("words", nargs="+", metavar="[RECIPE] FILE", help=f"the file to write, after one of {recipes}")


def read_new(args: argparse.Namespace) -> None:
    """`args.file` and `args.recipe`, None without one.

    Raises:
        ValueError: there are more than two words.
    """
    if len(args.words) > 2:
        raise ValueError(f"words are {' '.join(args.words)}, but `distill new` takes [RECIPE] FILE; leave some out.")
    *recipe, file = args.words
    args.recipe, args.file = (recipe or [None])[0], to_path(file)


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill prune` takes."""
    parser.add_argument("llm", type=expand_home, metavar="LLM", help="folder or hub id of a causal LM")
    parser.add_argument("out", type=to_path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--shards", type=expand_home, required=True, help="calibration: packed clips, whose texts the LLM reads"
    )
    parser.add_argument("--layers", type=int, default=0, help="that stay, those of the largest influence")
    parser.add_argument("--evenly", action="store_true", help="choose them evenly spaced instead")
    parser.add_argument("--heads", type=int, default=0, help="attention heads of a layer that stay")
    parser.add_argument("--ffn", type=int, default=0, help="channels of a layer's feed-forward that stay")
    parser.add_argument("--texts", type=int, default=128, help="of the shards that are read (%(default)s)")


def read_prune_arguments(args: argparse.Namespace) -> None:
    """Refuse `distill prune` without shards on this machine to read.

    Raises:
        ShardError: with what is there.
    """
    from shards.tars.source import expand_shards, is_remote

    if not is_remote(args.shards):
        expand_shards(args.shards)


def add_upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill upcycle` takes."""
    parser.add_argument(
        "llm", type=expand_home, metavar="LLM", help="folder or hub id of a dense causal LM: Llama, Mistral or Qwen3"
    )
    parser.add_argument("out", type=to_path, metavar="OUT", help="folder to write")
    parser.add_argument("--experts", type=int, default=8, help="of each layer, copies of its FFN (%(default)s)")
    parser.add_argument("--top-k", type=int, default=2, help="of them, that a token goes to (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the new routers (%(default)s)")


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """What `distill completion` takes."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose script is printed")
    parser.add_argument("words", nargs="*", metavar="WORD", help="after --: print what the last one may become instead")


def of_a_config(module: str, help: str, reads=read_config_arguments, has_json: bool = False) -> Command:
    """A stage that takes a config and nothing else."""
    return Command(module, help, add_config_arguments, reads, has_json)


COMMANDS = {
    "new": Command(
        "distill.commandline.new_config",
        "write a config to start from, every field explained",
        add_new_arguments,
        read_new,
    ),
    "pipeline": Command(
        "distill.pipeline",
        "every stage below for one config, from raw audio to scorecard",
        add_pipeline_arguments,
        read_pipeline_arguments,
    ),
    "manifest": Command(
        "shards.manifests.datasets.table", "LibriSpeech, GigaSpeech, Clotho, AudioCaps, WavCaps, MusicNet to a manifest"
    ),
    "audit": Command("shards.packing.audit", "find bad audio and text before training; nothing is replaced"),
    "pack": Command("shards.packing.pack", "manifest and audio files to WebDataset shards"),
    "split": Command("shards.manifests.split", "cut a manifest into train and valid without leakage"),
    "subset": Command(
        "shards.manifests.subset", "a mini set: a share of each task, chosen tasks, so many rows or hours"
    ),
    "stats": Command(
        "shards.packing.stats", "counts, hours and lengths of a data set; `stats model CONFIG`: what each part costs"
    ),
    "stats model": Command(
        "distill.sizes.table",
        "what each part of a config's models costs",
        add_model_arguments,
        read_model_arguments,
        has_json=True,
    ),
    "teach": of_a_config(
        "distill.teach", "a SALMONN on given parts, or the demo's small one from nothing", read_stage_arguments
    ),
    "plan": Command(
        "distill.caching.plan",
        "what a target cache would take and keep, by codec; with --gpus: memory, hours and disk of each stage",
        add_plan_arguments,
        read_plan_arguments,
        has_json=True,
    ),
    "cache": of_a_config(
        "distill.cache",
        "the teacher's targets beside the shards (also: accelerate launch -m distill.cache)",
        read_stage_arguments,
    ),
    "cache-verify": Command(
        "distill.caching.verify",
        "re-read a target cache, and let the teacher say a share of it again",
        add_verify_arguments,
        read_stage_arguments,
    ),
    "doctor": of_a_config(
        "distill.doctor.doctor",
        "prove objective, data and cache right before GPU hours are spent",
        read_stage_arguments,
        has_json=True,
    ),
    "filter": Command(
        "distill.caching.filter",
        "leave out or down-weight clips whose labels the teacher does not believe",
        add_filter_arguments,
        read_config_arguments,
    ),
    "run": of_a_config("distill.run", "train a student (also: accelerate launch -m distill.run)", read_stage_arguments),
    "answers": of_a_config(
        "distill.answers",
        "on-policy: the student answers, the teacher scores (docs/rounds.md)",
        read_stage_arguments,
    ),
    "evaluate": Command(
        "distill.evaluation.evaluate",
        "teacher and student on the test split: the scorecard; --efficiency: what answering costs",
        add_evaluate_arguments,
        read_evaluate_arguments,
        has_json=True,
    ),
    "prune": Command(
        "students.prune",
        "a smaller LLM of a larger one's own layers, heads and channels",
        add_prune_arguments,
        read_prune_arguments,
    ),
    "upcycle": Command(
        "students.upcycle", "a sparse mixture whose experts are copies of a dense LLM's FFN", add_upcycle_arguments
    ),
    "export": Command(
        "distill.export",
        "a finished student as a folder to hand on, LoRA kept or merged",
        add_export_arguments,
        read_export_arguments,
    ),
    "report": Command(
        "distill.evaluation.report",
        "a run's curves and scorecard as one HTML file",
        add_report_arguments,
        read_export_arguments,
    ),
    "transcribe": Command(
        "distill.evaluation.transcribe",
        "let a saved student answer about audio files",
        add_transcribe_arguments,
        read_transcribe_arguments,
    ),
    "completion": Command(
        "distill.commandline.completion", 'for a shell: eval "$(distill completion bash)"', add_completion_arguments
    ),
    "env": Command(
        "distill.commandline.environment", "versions, processor and GPU, for a bug report", lambda parser: None
    ),
}


def find_unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str | None:
    """What is wrong with the first option that a command does not take, and which it may mean; None: it takes all."""
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    takes_fields = any(action.dest in ("overrides", "words") for action in parser._actions)
    for word in words[: words.index("--") if "--" in words else None]:
        key, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or any(option.startswith(f"--{key}") for option in options):
            continue
        fields = _meant_fields(key) if takes_fields else []
        is_name = any(key in (field, field.rpartition(".")[2]) for field in fields)
        if fields and (is_name or "." in key or not nearest(f"--{key}", options)):
            return f"option is {word}, but a field is set without dashes; " + did_you_mean(
                [f"{field}={value or '…'}" for field in fields], ""
            )
        hint = did_you_mean(nearest(f"--{key}", set(options) - {"--help"}), f"see `{parser.prog} --help`.")
        return f"option is {word}, but `{parser.prog}` has none of that name; {hint}"
    return None


def _meant_fields(key: str) -> list[str]:
    from distill.config import list_fields

    return nearest_fields(key, list_fields())
