"""What is asked about a clip: the prompts of each task, read from one JSON file. Knows no tokenizer.

A prompt holds `<SpeechHere>` once, where the audio tokens go, and `{}` where a task brings its own question (`Q`).
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

AUDIO_PLACE = "<SpeechHere>"
FORM = '{"task": ["prompt", …], …}'
DEFAULT_PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Prompts:
    """The prompts of every task.

    Args:
        by_task: task name to its prompts; the first one is used in evaluation.
        template: what stands around a prompt, with one `{}`; SALMONN's is `"USER: {}\\nASSISTANT:"`.
    """

    by_task: dict[str, Sequence[str]]
    template: str

    def __post_init__(self):
        for task, prompts in self.by_task.items():
            if not prompts:
                raise ValueError(f"task {task!r} has no prompt, but needs at least one; add it to the prompts file.")
            for prompt in prompts:
                if prompt.count(AUDIO_PLACE) != 1:
                    raise ValueError(
                        f"prompt of task {task!r} is {prompt!r}, but {AUDIO_PLACE} must stand in it exactly once; "
                        f"correct the prompts file."
                    )
        if self.template.count("{}") != 1:
            raise ValueError(f"template is {self.template!r}, but must hold {{}} exactly once; correct the config.")

    @property
    def asking(self) -> set[str]:
        """The tasks whose samples bring their own question."""
        return {task for task, prompts in self.by_task.items() if any("{}" in prompt for prompt in prompts)}

    def choose(self, task: str, key: str, question: str | None, *, first: bool = False) -> tuple[str, str]:
        """The text before and after the audio, for one sample.

        Of several prompts the sample's key chooses one, so that every epoch, rank and cache asks the same.

        Args:
            task: the sample's task.
            key: the sample's key.
            question: the sample's own question, for prompts with `{}`.
            first: take the task's first prompt whatever the key; evaluation does.

        Raises:
            ValueError: unknown task, or a prompt that needs a question the sample does not have.
        """
        prompts = self.by_task.get(task)
        if prompts is None:
            known = ", ".join(sorted(self.by_task))
            near = difflib.get_close_matches(task, self.by_task, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else "; add it to the prompts file."
            raise ValueError(f"task of sample {key} is {task!r}, but the prompts know {known}{guess}")
        digest = hashlib.sha256(key.encode()).digest()
        prompt = prompts[0 if first else int.from_bytes(digest[:4], "big") % len(prompts)]
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


def load_prompts(path: str | Path | None, template: str) -> Prompts:
    """Read a prompts file (`{task: [prompt, …]}` or SALMONN's `{task: prompt}`); None reads the library's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold prompts by task.
    """
    path = Path(path) if path else DEFAULT_PROMPTS
    if not path.is_file():
        raise FileNotFoundError(f"prompts is {path}, but there is no such file; give a JSON file of prompts by task.")
    try:
        by_task = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prompts file {path} is not JSON ({error}); correct it.") from error
    if not isinstance(by_task, dict):
        raise ValueError(f"prompts file {path} holds a {type(by_task).__name__}, but must be {FORM}; correct it.")
    by_task = {task: [prompts] if isinstance(prompts, str) else prompts for task, prompts in by_task.items()}
    for task, prompts in by_task.items():
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts file {path} has {prompts!r:.60} for {task!r}, but must be {FORM}; correct it.")
    return Prompts({task: tuple(prompts) for task, prompts in by_task.items()}, template)
