"""What a config may not say although every type is right, and no config may hold. Reads no file.

`check_section` is each section's own gate, `check_config` holds what sections say of each other: a field that is wrong
is refused in the same words whether a file, the command line or Python gave it.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

from distill.objective.divergences import DIVERGENCES
from distill.objective.features import FEATURES
from distill.objective.schedule import build_schedules, parse_schedule, weight_of
from distill.objective.terms import TERMS
from distill.objective.terms.needs import check_needs, held_by_config
from distill.training.falls import FALLS
from distill.training.monitoring.trackers import TRACKERS
from shards.field_types import convert_fields
from shards.targets.codecs.table import CODECS, find_codec
from students.hearing import check_trainable
from teachers.ears.encoders import second_kinds
from teachers.ears.length import parse_ears_seconds
from teachers.lora import EXPERTS
from teachers.words.templates import check_template

CHOICES: dict[str, tuple | Callable[[], tuple]] = {  # of a dict of parts: what it holds when it is asked
    "precision": ("auto", "float32", "bf16", "fp16"),
    "corpus.kind": ("manifest", "synth"),
    "corpus.channels": ("left", "mean"),
    "teacher.quantization": ("none", "int8"),
    "student.quantization": ("nf4", "none"),
    "student.ears_quantization": ("none", "bf16", "int8"),
    "student.connector": ("teacher", "new"),
    "student.windows": ("audio", "all"),
    "teacher.second_kind": lambda: ("", *second_kinds()),
    "student.second_kind": lambda: ("", "none", *second_kinds()),
    "teacher.ears": ("auto", "float32", "fp16", "bf16"),
    "teacher.front_end": ("exact", "shared"),
    "cache.codec": CODECS,
    "cache.features": ("int8", "float16", "none"),
    "cache.frames": ("int8", "float16", "none"),
    "cache.answers": ("label", "teacher", "both"),
    "loss.feature_kind": FEATURES,
    "loss.hidden_kind": FEATURES,
    "loss.frames_kind": FEATURES,
    "loss.kl_kind": DIVERGENCES,
    "loss.cross_tokenizer": ("refuse", "chunk"),
    "train.resume": ("auto", "must", "never"),
    "teach.windows": ("audio", "all"),
    "train.schedule": FALLS,
    "train.optimizer": ("adamw", "adamw_8bit"),
    "train.kernels": ("none", "liger"),
    "train.clip": ("fixed", "running"),
}
POSITIVE = ("train.steps", "train.batch_size", "train.micro_batch_size", "train.learning_rate", "train.max_grad_norm",
            "train.save_every", "train.keep", "train.clip_deviations",
            "student.lora_rank", "student.lora_alpha", "loss.temperature",
            "loss.chunk_temperature", "cache.k", "cache.draws", "cache.exponent", "cache.batch_size", "cache.num_beams",
            "cache.max_new_tokens",
            "on_policy.clips", "on_policy.max_new_tokens", "eval.batch_size", "eval.num_beams", "eval.max_new_tokens",
            "eval.repetition_penalty", "data.max_member_mb", "corpus.num_train", "corpus.shard_samples",
            "scratch.batch_size", "scratch.learning_rate", "scratch.ear_steps", "scratch.text_steps",
            "scratch.vocab_size", "scratch.seconds",
            "scratch.ear_width", "scratch.ear_layers", "scratch.llm_width", "scratch.llm_layers",
            "scratch.student_width", "scratch.student_layers", "scratch.qformer_width", "scratch.qformer_layers",
            "scratch.window_seconds", "scratch.num_queries", "teach.lora_rank", "teach.lora_alpha",
            "teach.window_seconds", "teach.num_queries", "teach.qformer_width", "teach.qformer_layers")  # fmt: skip
NOT_NEGATIVE = ("data.workers", "data.bucket_batches", "data.batch_seconds", "cache.threshold", "train.warmup_steps",
                "train.min_learning_rate", "train.weight_decay", "train.eval_every", "train.early_stop",
                "train.stop_after", "train.max_minutes", "train.hang_minutes", "train.max_bad_steps",
                "train.spike_deviations", "train.max_returns", "on_policy.round",
                "student.whisper_layers", "student.ears_lora_rank", "student.prefix_tokens", "on_policy.temperature",
                 "data.task_weights", "loss.task_weights", "scratch.steps")  # fmt: skip
SHARES = (
    "train.decay_share",
    "data.labelled_share",
    "data.max_bad",
    "corpus.valid_share",
    "on_policy.share",
    "on_policy.clips",
    "on_policy.step_share",
)
BELOW_ONE = ("train.beta2", "train.ema", "student.lora_dropout", "student.qformer_dropout", "teach.lora_dropout",
             "teach.qformer_dropout")  # fmt: skip
TEMPLATES = ("teacher.template", "student.template")
LONG = sys.maxsize  # steps of a run whose length is not known yet


def check_section(name: str, section) -> None:
    """The gate of one section, called when it is made; numbers and lists take the field's own type, in place.

    Args:
        name: the name of the section, such as `train`; empty: the config itself.
        section: a dataclass of `distill.config`.

    Raises:
        ValueError: naming the field, its value and the rule.
    """
    prefix = f"{name}." if name else ""
    convert_fields(section, prefix)
    for field in dataclasses.fields(section):
        check_value(f"{prefix}{field.name}", getattr(section, field.name))
    if name in RULES:
        RULES[name](section)


def choices_of(key: str) -> tuple | None:
    """What a field may be; None: it is none of a few."""
    choices = CHOICES.get(key)
    return choices() if callable(choices) else choices


def check_value(key: str, value) -> None:
    """Refuse a value that its own field forbids, whatever the others are."""
    choices = choices_of(key)
    if choices is not None and value not in choices:
        names = ", ".join(choice or "''" for choice in choices)
        raise ValueError(f"{key} is {value!r}, but must be one of {names}; correct it.")
    if isinstance(value, dict):
        for name, inner in value.items():
            if key in NOT_NEGATIVE and not inner >= 0:
                raise ValueError(f"{key}.{name} is {inner}, but must be 0 or more; correct it.")
    elif key in TEMPLATES:
        check_template(key, value)
    elif key in POSITIVE and not value > 0:
        raise ValueError(f"{key} is {value}, but must be above 0; correct it.")
    elif key in NOT_NEGATIVE and not value >= 0:
        raise ValueError(f"{key} is {value}, but must be 0 or more; correct it.")
    elif key.startswith("loss.") and key.removeprefix("loss.") in (*TERMS, "pseudo_ce") and not value >= 0:
        raise ValueError(f"{key} is {value}, but a weight is 0 or more; correct it.")
    elif key in SHARES and not 0 <= value <= 1:
        raise ValueError(f"{key} is {value}, but is a share from 0 to 1; correct it.")
    elif key in BELOW_ONE and not 0 <= value < 1:
        raise ValueError(f"{key} is {value}, but must be 0 or more and below 1; correct it.")


def check_train(train) -> None:
    """Refuse a learning rate that climbs where it should fall, a tracker that there is not, and a stop by nothing."""
    unknown = [name for name in train.trackers if name not in TRACKERS]
    if unknown:
        raise ValueError(
            f"train.trackers names {unknown[0]!r}, but must be among {', '.join(TRACKERS)}; correct the name, or give "
            f"Distiller a callback of your own."
        )
    if train.min_learning_rate > train.learning_rate:
        raise ValueError(
            f"train.min_learning_rate is {train.min_learning_rate:g}, but train.learning_rate, the peak, is "
            f"{train.learning_rate:g}; lower it."
        )
    if train.early_stop and not train.eval_every:
        raise ValueError(
            f"train.early_stop is {train.early_stop}, but train.eval_every is 0 and validates at the end alone; set it "
            f"to the steps between two validations."
        )


def check_loss(loss) -> None:
    """Refuse schedules that cannot be read, and a divergence without its parameter or with one it does not take."""
    for name, text in loss.schedules.items():
        parse_schedule(text, 1.0, LONG, f"loss.schedules.{name}")
    DIVERGENCES[loss.kl_kind].check(loss.kl_kind, loss.kl_parameter)


def check_temperatures(cache) -> None:
    """Refuse temperatures without 1, at which every cache can be read."""
    if not all(t > 0 for t in cache.temperatures) or 1.0 not in cache.temperatures:
        raise ValueError(
            f"cache.temperatures is {list(cache.temperatures)}, but all must be above 0 and 1.0 among them; correct it."
        )


def check_student(student) -> None:
    """Refuse to train all of ears in few bits or with LoRA, and a length of the ears that cannot be."""
    check_trainable(student.train_ears, student.ears_quantization, student.ears_lora_rank, "student.")
    check_ears(student)


def check_ears(section, name: str = "student") -> None:
    """Refuse a length of the ears that is none, or one that leaves nothing for windows of padding to see."""
    if not section.ears_seconds:
        return
    is_cut = parse_ears_seconds(section.ears_seconds, f"{name}.ears_seconds") is not None
    if is_cut and section.windows == "all":
        raise ValueError(
            f"{name}.ears_seconds is {section.ears_seconds!r}, but {name}.windows is 'all' and windows of pure "
            f"padding are not heard then; set {name}.windows=audio, or {name}.ears_seconds=30."
        )


HEAD_WIDTH = 64  # of a Q-Former, as BERT's


def check_teach(teach) -> None:
    """Refuse a Q-Former whose width is no whole number of heads, and a length of the ears as a student's."""
    check_ears(teach, "teach")
    if teach.qformer_width % HEAD_WIDTH:
        raise ValueError(
            f"teach.qformer_width is {teach.qformer_width}, but a head is {HEAD_WIDTH} wide; set a multiple of that."
        )


RULES = {"teach": check_teach, "train": check_train, "loss": check_loss, "cache": check_temperatures,
         "student": check_student}  # fmt: skip


def used_terms(loss) -> dict:
    """The loss terms that may have a weight; those across tokenizers only where such are compared."""
    return {
        name: term
        for name, term in TERMS.items()
        if (weight_of(name, term, loss) or name in loss.schedules)
        and (not term.only_crossed or loss.cross_tokenizer == "chunk")
    }


def read_by_terms() -> Iterator[tuple]:
    """What `READ_WHERE` says, of the fields of the loss that its terms alone read."""
    crossed = "loss.cross_tokenizer=chunk"
    readers: dict[str, list[str]] = {}
    for name, term in TERMS.items():
        if term.only_crossed and term.weight is None:
            yield (f"loss.{name}",), lambda c: c.loss.cross_tokenizer == "chunk", crossed
        for field in term.settings:
            readers.setdefault(f"loss.{field}", []).append(name)
    for key, names in readers.items():
        said = [f"{f'{crossed} and ' if TERMS[name].only_crossed else ''}loss.{name} above 0" for name in names]
        yield (key,), lambda c, names=names: used_terms(c.loss).keys() & set(names), " or ".join(said)


CODEC_FIELDS = ("k", "threshold", "draws", "exponent")  # of the cache: what some of its codecs alone read


def name_codecs(field: str) -> str:
    """Which codecs read a field of the cache, in words; imports all of them, so it is asked for an error alone."""
    return f"cache.codec={' or '.join(codec for codec in CODECS if field in find_codec(codec).settings)}"


TEACH = ("start", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "window_seconds", "num_queries", "windows",
         "ears_seconds", "qformer_width", "qformer_layers", "qformer_dropout", "checkpoint")  # fmt: skip
# Fields that nothing reads unless something else is so: when they are read, and that in words, or what finds them
READ_WHERE = (
    (("corpus.train", "corpus.valid", "corpus.test", "corpus.valid_share", "corpus.channels"),
     lambda c: c.corpus.kind == "manifest", "corpus.kind=manifest"),
    (("corpus.num_train",), lambda c: c.corpus.kind == "synth", "corpus.kind=synth"),
    (("corpus.valid_share",), lambda c: not (c.corpus.valid and c.corpus.valid_share), "an empty corpus.valid"),
    (("train.min_learning_rate",), lambda c: c.train.schedule != "constant", "a train.schedule that falls"),
    (("train.clip_deviations",), lambda c: c.train.clip == "running", "train.clip=running"),
    (("train.decay_share",), lambda c: c.train.schedule == "wsd", "train.schedule=wsd"),
    *(((f"cache.{name}",), lambda c, name=name: name in find_codec(c.cache.codec).settings, partial(name_codecs, name))
      for name in CODEC_FIELDS),
    (("on_policy.clips",), lambda c: c.on_policy.round, "on_policy.round above 0"),
    (("on_policy.temperature", "on_policy.max_new_tokens"), lambda c: c.on_policy.round or c.on_policy.step_share,
     "on_policy.round or on_policy.step_share above 0"),
    (("eval.length_penalty",), lambda c: c.eval.num_beams > 1, "eval.num_beams above 1"),
    *(((f"augment.{name}_range",), lambda c, name=name: getattr(c.augment, f"{name}_share"),
       f"augment.{name}_share above 0") for name in ("speed", "room", "noise", "gain")),
    (tuple(f"augment.mask_{name}" for name in ("bands", "band_share", "spans", "span_seconds", "span_share")),
     lambda c: c.augment.mask_share, "augment.mask_share above 0"),
    (("scratch.batch_size", "scratch.learning_rate", "scratch.ear_steps", "scratch.text_steps", "scratch.vocab_size",
      "scratch.seconds", "scratch.ear_width", "scratch.ear_layers", "scratch.llm_width", "scratch.llm_layers",
      "scratch.student_width", "scratch.student_layers", "scratch.qformer_width", "scratch.qformer_layers",
      "scratch.window_seconds", "scratch.num_queries"), lambda c: c.scratch.steps, "scratch.steps above 0"),
    (tuple(f"teach.{name}" for name in TEACH), lambda c: not c.scratch.steps, "scratch.steps=0"),
    (("augment.teacher_hears",), lambda c: c.augment.is_active, "one of augment.*_share above 0"),
)  # fmt: skip


def check_unread(config) -> None:
    """Refuse a field that differs from its default where nothing reads it: whoever set it expects it to count.

    Raises:
        ValueError: naming the field, and what would read it.
    """
    for keys, is_read, where in (*READ_WHERE, *read_by_terms()):
        for key in keys:
            section, _, name = key.partition(".")
            value, default = value_at(config, key), default_of(getattr(config, section), name)
            if value != default and not is_read(config):
                where = where() if callable(where) else where
                raise ValueError(
                    f"{key} is {show(value)}, but nothing reads it without {where}; set that, or leave {key} at "
                    f"{show(default)}."
                )
    for name in config.loss.schedules:
        if TERMS[name].only_crossed and config.loss.cross_tokenizer != "chunk":
            raise ValueError(
                f"loss.schedules names {name}, but that term is there only with loss.cross_tokenizer=chunk; set that, "
                f"or leave it out."
            )


def default_of(section, name: str):
    """The default of a field of a dataclass."""
    field = next(field for field in dataclasses.fields(section) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def show(value) -> str:
    """A value as a message has it."""
    return f"{value:g}" if isinstance(value, float) else repr(value)


def check_config(config) -> None:
    """The one gate for sections that contradict each other."""
    check_terms(config.loss, config.train.steps)
    check_unread(config)
    check_name(config)
    check_needs(used_terms(config.loss), config.loss, held_by_config(config))
    check_augmentation(config)
    check_trained_parts(config)
    check_round(config)
    check_scratch(config)
    check_places(config)


def check_trained_parts(config) -> None:
    """Refuse a term that only trained ears, or trained routers, could follow where they are frozen."""
    if "balance" in used_terms(config.loss) and EXPERTS not in config.student.lora_targets:
        raise ValueError(
            f"loss.balance is {config.loss.balance:g}, but student.lora_targets has no {EXPERTS} and frozen routers "
            f"cannot follow it; add {EXPERTS} to it, or set loss.balance=0."
        )
    if "frames" in used_terms(config.loss) and not config.student.hearing.trains_ears:
        raise ValueError(
            f"loss.frames is {config.loss.frames:g}, but student.train_ears is false and frozen ears cannot follow it; "
            f"set student.train_ears=true or student.ears_lora_rank=8, or loss.frames=0."
        )


def check_places(config) -> None:
    """Refuse a URL where something is kept that only a folder of this machine can hold."""
    if "://" in config.runs:
        raise ValueError(f"runs is {config.runs}, but a run's folder is on this machine; name a local folder.")
    if config.on_policy.round and "://" in str(config.cache_folder):
        raise ValueError(
            f"on_policy.round is {config.on_policy.round} and the cache is {config.cache_folder}, but answers of a "
            f"round are kept in a local cache alone; set cache.folder to a local folder."
        )


def check_name(config) -> None:
    """Refuse a name that is none of a folder inside `runs`."""
    if config.name in ("", ".", "..") or re.search(r"[/\\\0]", config.name):
        raise ValueError(
            f"name is {config.name!r}, but the run's folder is runs/NAME; give a name without slashes, and "
            f"set runs= for another place."
        )


def check_terms(loss, num_steps: int, own: Mapping = MappingProxyType({})) -> None:
    """Refuse an objective of no term, and schedules longer than the run or of a term that there is not.

    Args:
        loss: the objective.
        num_steps: the number of steps of the run.
        own: loss terms of one's own, by name.
    """
    schedules = build_schedules({**TERMS, **own}, loss, num_steps)
    names = [
        name
        for name, term in TERMS.items()
        if not term.needs_routing and (not term.only_crossed or loss.cross_tokenizer == "chunk")
    ]
    if not any(schedules[name].is_ever_above_zero for name in (*names, *own)):
        raise ValueError(
            f"the weights of {', '.join(f'loss.{name}' for name in names)} are all 0, but a student learns from one at "
            f"least; set one above 0."
        )


def check_round(config) -> None:
    """Refuse a round, or answers within the steps, that cannot be.

    Raises:
        ValueError: naming the settings.
    """
    needs = {"on_policy.round": config.on_policy.round, "student.start": config.student.start}
    for name, value in needs.items():
        if config.on_policy.share and not value:
            raise ValueError(
                f"on_policy.share is {config.on_policy.share}, but {name} is {value!r}; set the round of "
                f"`distill answers`, and as student.start the student that answered."
            )
    check_own_answers(config.on_policy, config.loss)


def check_own_answers(on_policy, loss) -> None:
    """Refuse a student's own answers where nothing learns from them.

    Raises:
        ValueError: naming the share.
    """
    for name in ("share", "step_share"):
        share = getattr(on_policy, name)
        if share and "kl" not in used_terms(loss):
            raise ValueError(
                f"on_policy.{name} is {share}, but loss.kl is 0 and a student's answer has no cross-entropy to learn "
                f"from; set loss.kl above 0, or on_policy.{name}=0."
            )


def check_scratch(config) -> None:
    """Refuse to describe a teacher that is made here, as `scratch` says all of it, and ears of no length.

    Raises:
        ValueError: naming the settings.
    """
    parse_ears_seconds(config.scratch.ears_seconds, "scratch.ears_seconds")
    if not config.scratch.steps or config.teacher.path:
        return
    for name in ("llm", "whisper", "second", "second_kind", "end_token", "bos_token", "prompts", "template"):
        if getattr(config.teacher, name):
            raise ValueError(
                f"teacher.{name} is {getattr(config.teacher, name)!r}, but scratch.steps is "
                f"{config.scratch.steps} and makes a teacher of its own; leave teacher.{name} out, or set "
                f"scratch.steps=0 and teacher.path."
            )


def check_augmentation(config) -> None:
    """Refuse what would train on targets of another sound than the student hears: cached ones are of the clean clip.

    Raises:
        ValueError: naming both settings.
    """
    augment = config.augment
    if not augment.is_active:
        return
    if augment.teacher_hears == "same" and not config.teacher.online:
        raise ValueError(
            "augment.teacher_hears is 'same', but cached targets belong to the clean clip; "
            "set augment.teacher_hears=clean, or teacher.online=true."
        )
    if config.cache.frames != "none" and not config.teacher.online:
        raise ValueError(
            f"augment is set, but cache.frames is {config.cache.frames!r} and cached frames are of the clean "
            f"clip; set cache.frames=none, or every augment.*_share=0."
        )
    if augment.speed_share and augment.teacher_hears == "clean" and config.loss.feature:
        raise ValueError(
            f"augment.speed_share is {augment.speed_share}, but loss.feature is {config.loss.feature} and "
            f"compares windows at equal times, which speed moves; set one of them to 0."
        )


def value_at(config, key: str):
    """The value of a dotted key."""
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
