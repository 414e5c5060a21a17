"""What must stay as it was for a run to go on, as plain data: objective, student, teacher. Reads checkpoints.

A model is known by its contents, wherever it lies; large files are read once (`shards.files.hash`).
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from distill.config import LossConfig, StudentConfig
from distill.objective.weighing import Terms
from distill.training.checkpoint import STATE
from students.start import identify_student
from teachers.files.loading import hash_frozen_parts, hash_tensors, identify_checkpoint, own_tensors
from teachers.salmonn import Salmonn
from teachers.teacher import Teacher

UPDATE = "update"  # in a checkpoint's state: what the next step must know of those before
AVERAGED = "averaged"  # the hash that its own tensors have as `train.ema` averages them
WEIGHTS = "weights"  # in a checkpoint's state: the hash of the student's own tensors, as `student.own` at its start


def identify_fit(student: Salmonn, teacher: Teacher, loss: LossConfig, terms: Terms, given: dict,
                 dtype: torch.dtype = torch.float32) -> dict:  # fmt: skip
    """The identity of a run.

    Args:
        student: as it starts.
        teacher: whose targets it learns.
        loss: the objective.
        terms: the terms of one's own, by name.
        given: what the caller says itself; it stands over what is found here. A student that it names has its frozen
            parts among its settings, as `identify_settings` gives them; targets that it names have their precision.
        dtype: the data type of the run's products.
    """
    settings = given.get("student") or {"frozen": hash_frozen_parts(student, how=identify_checkpoint)}
    found = {"loss": asdict(loss)}
    if terms:
        found["terms"] = {name: term.identity for name, term in terms.items()}
    if "targets" not in given:
        found["precision"] = str(dtype).removeprefix("torch.")
        found |= {"targets": teacher.identity} if teacher.has_targets else {}
    return found | given | {"student": {"own": hash_tensors(own_tensors(student)), **settings}}


def identify_settings(settings: StudentConfig, llm: str) -> dict:
    """A config's student, with the hash of what each path leads to in the path's place.

    Args:
        settings: the settings of the student.
        llm: where its LLM lies, which the settings need not say.
    """
    student = asdict(settings) | {"llm": identify_checkpoint(llm)}
    for name in ("whisper", "second"):
        if student[name]:
            student[name] = identify_checkpoint(student[name])
    if student["start"]:
        student["start"] = identify_student(student["start"])
    return student


def find_start(run_folder: Path, own: str) -> str:
    """The hash a student began with, when `own` is what a checkpoint of the run made of it; else `own`.

    A student that the run has trained in this process is the run's student, though its weights have changed.
    """
    for path in (run_folder / "checkpoints").glob(f"step-*/{STATE}"):
        try:
            state = json.loads(path.read_text())
            if own in (state[WEIGHTS], state.get(AVERAGED)):
                return state["identity"]["student"]["own"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged: it is passed over when the run looks for its last
            continue
    return own
