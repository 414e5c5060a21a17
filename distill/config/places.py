"""Whether what a config names is there, before a stage is imported for it: files, shards, a student. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path

from distill.config.fields import Config
from distill.config.rules import value_at
from shards.tars.source import expand_shards, is_remote

# that are never a hub id
FILES = ("teacher.path", "teacher.prompts", "eval.prompts", "teacher.second", "student.start", "teach.start")


def check_files(config: Config, more: Sequence[str] = ()) -> None:
    """Refuse a config that names a file or a folder which is not there.

    Args:
        config: the configuration of a run.
        more: further fields that name one.

    Raises:
        FileNotFoundError: naming the field.
    """
    files = [key for key in FILES if key != "teacher.second" or Path(config.teacher.second).suffix]
    for key in (*files, *more):
        name = value_at(config, key)
        if name and not Path(name).exists():
            raise FileNotFoundError(f"{key} is {name}, but there is nothing; give the path of what is meant.")


def check_shards(config: Config, split: str) -> None:
    """Refuse a split without shards on this machine; a remote one is looked at by who reads it.

    Raises:
        ShardError: with what is there.
    """
    if not is_remote(str(config.shards(split))):
        expand_shards(config.shards(split))


def check_student(config: Config) -> Path:
    """The folder of a run's student.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = config.run_folder / "student"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"student is {folder}, but there is no saved student; finish `distill run` of name={config.name}, or give "
            f"the name= of a run that is finished."
        )
    return folder
