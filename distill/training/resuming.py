"""What a run that goes on may change: nothing that changes its result, unless it is allowed by name.

Knows settings and how they differ; no file and no model.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path

from distill.config import LossConfig, StudentConfig, TrainConfig
from distill.training.optimizer import learning_rate
from shards.targets.header import add_later_fields

DECISIVE = (  # of TrainConfig: what changes the result of a step
    "batch_size", "learning_rate", "min_learning_rate", "warmup_steps", "schedule", "decay_share", "weight_decay",
    "beta2", "max_grad_norm", "optimizer", "best_metric",
    "clip", "clip_deviations", "spike_deviations", "max_returns", "ema",
)  # fmt: skip
STEPS = "train.steps"
REST_OF_HASH = re.compile(r"(?<=\b[0-9a-f]{16})[0-9a-f]{48}\b")  # what an error need not show


def identify_training(options: TrainConfig) -> dict[str, float | str]:
    """The options that must stay as they were, and the number of steps, over which the schedules run."""
    return {f"train.{name}": getattr(options, name) for name in (*DECISIVE, "steps")}


def check_changes(
    there: dict,
    here: dict,
    *,
    checkpoint: Path,
    done: int,
    options: TrainConfig,
    has_schedules: bool,
    say: Callable[[str], None],
) -> None:
    """Refuse what would go on otherwise than it began, and say what changes with leave.

    Args:
        there: the identity of the run as its checkpoint knows it, as plain data.
        here: that of the run now.
        checkpoint: its folder, inside `checkpoints` of the run's; for messages.
        done: steps that it has behind it.
        options: the options that the run has now; `allow_change` names fields that may differ.
        has_schedules: whether weights of the loss move with the steps.
        say: is told of changes that are made.

    Raises:
        ValueError: each field that differs is named.
    """
    run_folder, there = checkpoint.parent.parent, add_what_came_later(there, here)
    changes = dict(compare(there, json.loads(json.dumps(here))))
    if STEPS in changes and STEPS in there:
        told = explain_steps(there[STEPS], done, options, has_schedules)
        if told is not None:
            say(f"{run_folder} {told}")
            del changes[STEPS]
    refused = [f"{field}: {values}" for field, values in changes.items() if field not in options.allow_change]
    if refused:
        raise ValueError(
            f"{checkpoint} is of a run with other settings ({'; '.join(refused)}), but a run goes on as it began; "
            f"choose another name= for a new run, put them back, or name them in train.allow_change."
        )
    for field, values in changes.items():
        say(f"{run_folder} goes on with another {field}, as train.allow_change says: {values}")


def add_what_came_later(there: dict, here: dict) -> dict:
    """An identity with the fields that its run's release had not: what was done then is what their defaults say."""
    defaults = {name: value for name, value in identify_training(TrainConfig()).items() if name != STEPS}
    for section, settings in (("loss", LossConfig()), ("student", StudentConfig())):
        if section in there:
            known = {name: value for name, value in asdict(settings).items() if name in here.get(section, ())}
            there = there | {section: known | there[section]}
    if "targets" in there:
        there = there | {"targets": add_later_fields(there["targets"], here.get("targets", {}))}
    return defaults | there


def explain_steps(before: int, done: int, options: TrainConfig, has_schedules: bool) -> str | None:
    """What another number of steps means for the schedules, where it may be; None where it would bend them midway."""
    is_constant = options.schedule == "constant" or options.learning_rate == options.min_learning_rate
    if is_constant and not has_schedules:
        return f"goes on to step {options.steps} instead of {before}; nothing in it depends on the last step"
    if done < before or options.steps < before:
        return None
    rates = [learning_rate(step, options) for step in (done, options.steps - 1)]
    weights = ", and so do loss.schedules" if has_schedules else ""
    return (
        f"was done after {before} steps and goes on to {options.steps}: its schedule runs over all {options.steps} "
        f"now, so the learning rate, {options.min_learning_rate:g} at the end of the first part, is {rates[0]:.3g} at "
        f"step {done + 1} and falls to {rates[1]:.3g} at the last{weights}"
    )


def report_changes(there: dict, here: dict, said: Collection[str], say: Callable[[str], None]) -> None:
    """Say every other setting of a run that goes on that changed.

    Args:
        there, here: the whole config, before and now, as plain data.
        said: fields that need no more words.
        say: is told.
    """
    for field, values in compare(there, here):
        if field not in (*said, "train.allow_change"):
            say(f"goes on with another {field}: {values}")


def compare(there: dict, here: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each field of plain data that differs, and how: `loss.kl`, `1.0 there, 0.25 here`."""
    for name in [*there, *(name for name in here if name not in there)]:
        values = [side.get(name, "nothing") for side in (there, here)]
        if all(isinstance(value, dict) for value in values):
            yield from compare(*values, f"{prefix}{name}.")
        elif values[0] != values[1]:
            old, new = (REST_OF_HASH.sub("", str(value)) for value in values)
            yield f"{prefix}{name}", f"{old} there, {new} here"
