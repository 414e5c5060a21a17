"""What is asked about a clip: the prompts of each task, read from JSON files. Knows no tokenizer.

A prompt holds `<SpeechHere>` once, where the audio tokens go, and `{}` where a task brings its own question (`Q`). The
files of SALMONN's family are taken as they are: `train_prompt.json` has several a task, `test_prompt.json` one.
"""

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shards.status import print_status

AUDIO_PLACE = "<SpeechHere>"
AUDIO_IN_FRONT = f"<Speech>{AUDIO_PLACE}</Speech> "  # what SALMONN's command line puts before a bare prompt
LIKE_A_PLACE = re.compile(r"</?\s*(speech|audio)", re.IGNORECASE)
FORM = '{"task": ["prompt", …], …}'
DEFAULT_PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Prompts:
    """The prompts of every task.

    Args:
        by_task: task name to its prompts, which training chooses from.
        template: what stands around a prompt, with one `{}`; SALMONN's is `"USER: {}\\nASSISTANT:"`.
        evaluation: task name to the prompt that evaluation asks with; of other tasks it is the first of `by_task`. No
            part of what a model was trained with, so two that differ in it alone are equal.
    """

    by_task: Mapping[str, Sequence[str]]
    template: str
    evaluation: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        for prompts_of in (self.by_task, {task: (prompt,) for task, prompt in self.evaluation.items()}):
            for task, prompts in prompts_of.items():
                _check_prompts(task, prompts)
        if self.template.count("{}") != 1:
            raise ValueError(f"template is {self.template!r}, but must hold {{}} exactly once; correct the config.")

    @property
    def asked(self) -> dict[str, Sequence[str]]:
        """What evaluation may ask, by task: all tasks that there are prompts for."""
        return {**self.by_task, **{task: (prompt,) for task, prompt in self.evaluation.items()}}

    @property
    def asking(self) -> set[str]:
        """The tasks whose samples bring their own question when they are asked as in `asked`."""
        return {task for task, prompts in self.asked.items() if any("{}" in prompt for prompt in prompts)}

    def choose(self, task: str, key: str, question: str | None, *, first: bool = False) -> tuple[str, str]:
        """The text before and after the audio, for one sample.

        Of several prompts the sample's key chooses one, so that every epoch, rank and cache asks the same.

        Args:
            task: the sample's task.
            key: the sample's key.
            question: the sample's own question, for prompts with `{}`.
            first: ask as evaluation does, whatever the key: with the task's prompt in `evaluation`, else its first.

        Raises:
            ValueError: unknown task, or a prompt that needs a question the sample does not have.
        """
        known = self.asked if first else self.by_task
        if task not in known:
            names, near = ", ".join(sorted(known)), difflib.get_close_matches(task, known, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else "; add it to the prompts file."
            raise ValueError(f"task of sample {key} is {task!r}, but the prompts know {names}{guess}")
        digest = hashlib.sha256(key.encode()).digest()
        prompt = known[task][0 if first else int.from_bytes(digest[:4], "big") % len(known[task])]
        parts = self.template.replace("{}", prompt, 1).split(AUDIO_PLACE, 1)
        if "{}" in prompt:
            if not question:
                raise ValueError(
                    f"Q of sample {key} is {question!r}, but the prompt of task {task!r} asks for a question; "
                    f"give the manifest's row a Q."
                )
            place = 0 if "{}" in parts[0] else 1  # split before: a question may spell the audio's place
            parts[place] = parts[place].replace("{}", question, 1)
        return parts[0], parts[1]


def _check_prompts(task: str, prompts: Sequence[str]) -> None:
    if not prompts:
        raise ValueError(f"task {task!r} has no prompt, but needs at least one; add it to the prompts file.")
    for prompt in prompts:
        if prompt.count(AUDIO_PLACE) != 1 or prompt.count("{}") > 1:
            raise ValueError(
                f"prompt of task {task!r} is {prompt!r}, but {AUDIO_PLACE} must stand in it exactly once, and {{}} at "
                f"most once; correct the prompts file."
            )


def load_prompts(path: str | Path | None, template: str, evaluation: str | Path | None = None) -> Prompts:
    """Read prompts files, each of several prompts a task or of one (`{task: prompt}`).

    Args:
        path: the path of the prompts of training, such as `train_prompt.json`; None: the library's own.
        template: see `Prompts`.
        evaluation: what evaluation asks with, such as `test_prompt.json`; of several a task the first counts.
            None: the first of training's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold prompts by task.
    """
    asked = read_prompts(Path(evaluation)) if evaluation else {}
    for task, prompts in asked.items():
        _check_prompts(task, prompts)
    by_task = read_prompts(Path(path) if path else DEFAULT_PROMPTS)
    return Prompts(by_task, template, {task: prompts[0] for task, prompts in asked.items()})


def read_prompts(path: Path) -> dict[str, tuple[str, ...]]:
    """The prompts of a file by task, each with the audio's place; what is left out is told once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold prompts by task.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts is {path}, but there is no such file; give a JSON file of prompts by task.")
    try:
        by_task = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prompts file {path} is not JSON in UTF-8 ({error}); correct it.") from error
    if not isinstance(by_task, dict):
        raise ValueError(f"prompts file {path} holds a {type(by_task).__name__}, but must be {FORM}; correct it.")
    by_task = {task: [prompts] if isinstance(prompts, str) else prompts for task, prompts in by_task.items()}
    for task, prompts in by_task.items():
        if not isinstance(prompts, list) or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError(f"prompts file {path} has {prompts!r:.60} for {task!r}, but must be {FORM}; correct it.")
    placed = {task: place_audio(path, task, prompts) for task, prompts in by_task.items()}
    dropped = {task: len(by_task[task]) - len(placed[task]) for task in by_task}
    if any(dropped.values()):
        counts = ", ".join(f"{n} of {len(by_task[task])} of {task}" for task, n in dropped.items() if n)
        _tell_once(f"prompts file {path}: left out, as SALMONN's trainers do, without {AUDIO_PLACE}: {counts}")
    return placed


def place_audio(path: Path, task: str, prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts of a task that hold the audio's place; where none does, all of them with the audio in front.

    Raises:
        ValueError: none does, but one seems to try.
    """
    placed = tuple(prompt for prompt in prompts if AUDIO_PLACE in prompt)
    if placed:
        return placed
    for prompt in prompts:
        if LIKE_A_PLACE.search(prompt):
            raise ValueError(
                f"prompts file {path} has {prompt!r:.60} for {task!r}, but the audio's place is spelt {AUDIO_PLACE}; "
                f"correct it, or leave the mark out to have the audio in front."
            )
    return tuple(AUDIO_IN_FRONT + prompt.strip() for prompt in prompts)


@functools.cache
def _tell_once(text: str) -> None:
    print_status(text)
