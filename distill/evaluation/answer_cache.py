"""A teacher's answers to a split, its predictions of the right ones and its cost, kept beside its cache for the next
student of the same teacher.

Known by a hash of the teacher, the split's shards, what is asked, the options of `eval` and the device; what is damaged
or of another hash is made again. Knows no score.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from distill.caching.identity import describe_teacher
from distill.config import Config, fingerprint
from distill.evaluation.agreement import Predictions
from distill.evaluation.answering import Cost
from distill.evaluation.metrics.metric import Prediction
from distill.teacher import load_teacher, resolve_ears
from shards.files.write import write_atomically
from shards.jsonfile import ShapeError, read_object
from shards.streaming.catalog import hash_shards
from shards.targets.distributions import Sparse
from shards.tars.mirror import Mirror
from shards.tars.source import expand_shards, is_remote

FOLDER = "teacher-answers"  # inside the cache's folder
TENSORS = ".safetensors"  # beside the answers: the predictions
VERSION = 3  # of the files, and of how answers are made
OF_TEACHER = ("teacher_weights", "teacher_config", "tokenizer", "prompts", "front_end", "dtype", "llm_bits")


def find_answer_cache(config: Config) -> Path:
    """Where the answers of the config's teacher to its test split are, if they are kept; loads no LLM."""
    of_teacher = (
        "name",
        "runs",
        "precision",
        "data",
        "teacher",
        "scratch",
        "eval",
    )  # nothing else has a part in its answers
    plain = Config(**{name: getattr(config, name) for name in of_teacher})
    teacher = load_teacher(plain, llm_weights=False)
    identity = describe_teacher(teacher, plain).identity
    options = {name: value for name, value in asdict(config.eval).items() if name not in ("normalize", "prompts")}
    options["asked"] = {task: prompts[0] for task, prompts in teacher.rows.prompts.asked.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    made_by = {name: identity[name] for name in OF_TEACHER if name in identity}
    made_by["ears"] = resolve_ears(config, is_kept=False)
    parts = [VERSION, made_by, options, device]
    split = hash_shards(expand_shards(config.shards("test")))
    return find_folder(config) / f"{fingerprint([*parts, split])[:16]}.json"


def find_folder(config: Config) -> Path:
    """Where answers are kept: inside the cache's folder, or the local one that stands for a remote cache."""
    place = str(config.cache_folder)
    return (Mirror(place).folder if is_remote(place) else Path(place)) / FOLDER


class Examined(NamedTuple):
    """What a model did with a split."""

    answers: list[Prediction]
    cost: Cost
    predictions: Predictions


def read_answer_cache(path: Path) -> Examined | None:
    """What was kept; None where there is nothing or a file is damaged."""
    try:
        content = read_object(path, {"answers": list, "cost": dict, "vocabulary": str})
        answers = [Prediction(**{**fields, "references": tuple(fields["references"])}) for fields in content["answers"]]
        tensors = load_file(path.with_suffix(TENSORS))
        sparse = Sparse(*(tensors[name] for name in Sparse._fields))
        predictions = Predictions(content["vocabulary"], tensors["labels_S"], sparse)
        return Examined(answers, Cost(**content["cost"]), predictions)
    except (OSError, ShapeError, TypeError, KeyError, SafetensorError):
        return None


def write_answer_cache(path: Path, examined: Examined) -> None:
    """Keep what a teacher did for the next student.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    predictions = examined.predictions
    tensors = {"labels_S": predictions.labels_S, **predictions.sparse._asdict()}
    write_atomically(path.with_suffix(TENSORS), save(tensors))
    content = {"answers": [asdict(a) for a in examined.answers], "cost": asdict(examined.cost),
               "vocabulary": predictions.vocabulary}  # fmt: skip
    write_atomically(path, json.dumps(content, indent=1))
