"""Which kinds of teacher there are, and how each is had from what a config names. A new kind is one file and one line.

A kind is a module of this folder, or any object, with

* `recognizes(path)`: whether a teacher's path is of this kind;
* `load(parts, path, dtype=…, ear_precision=…, llm_weights=…)`: the model, frozen and in evaluation mode, as
  `build_salmonn` takes them; it says what a user should know;
* `describe(parts, path)`: its `SalmonnConfig` and its LoRA (or None), from no weights, and where it is not here;
* `build_empty(config, llm_config, dtype, tokenizer)`: the model on the device of the context, for tables of sizes; None
  where it is built of its parts as any SALMONN.

`parts` has the fields of `distill.config.TeacherConfig`.
"""

from pathlib import Path

from teachers.kinds import qwen2_audio, released, saved

KINDS = {"released": released, "saved": saved, "qwen2_audio": qwen2_audio}  # the last that recognizes a path has it


def find_kind(path: str | Path) -> str:
    """The name of the kind of teacher that a path is of."""
    return next(name for name, kind in reversed(KINDS.items()) if kind.recognizes(Path(path)))
