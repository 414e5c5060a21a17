"""What a config may not say although every type is right, and no config may hold. Knows the fields, reads no file."""

import re

SECRET = re.compile(r"(^|_)(token|secret|password|api_?key)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}")

CHOICES = {
    "precision": ("auto", "float32", "bf16"),
    "corpus.kind": ("manifest", "synth"),
    "student.quantization": ("nf4", "none"),
    "student.connector": ("teacher", "new"),
    "student.second_kind": ("", "none", "beats", "eat"),
    "student.windows": ("audio", "all"),
    "teacher.front_end": ("exact", "shared"),
    "cache.codec": ("topk", "adaptive", "sampled", "hidden", "dense"),
    "cache.features": ("int8", "float16", "none"),
    "cache.frames": ("int8", "float16", "none"),
    "cache.answers": ("label", "teacher", "both"),
    "loss.feature_kind": ("mse", "cosine", "smooth_l1", "relation"),
    "loss.hidden_kind": ("mse", "cosine", "smooth_l1", "relation"),
    "loss.kl_kind": ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation"),
    "loss.cross_tokenizer": ("refuse", "chunk"),
    "train.resume": ("auto", "must", "never"),
}
POSITIVE = ("train.steps", "train.batch_size", "train.micro_batch_size", "train.learning_rate", "loss.temperature",
            "loss.chunk_temperature", "cache.k", "cache.draws", "cache.batch_size", "cache.num_beams",
            "on_policy.clips", "on_policy.max_new_tokens", "eval.batch_size", "eval.num_beams",
            "eval.repetition_penalty", "train.save_every", "train.keep")  # fmt: skip


def check_config(config, origin: str = "config") -> None:
    """The one gate for values that are well-typed and still wrong."""
    for key, choices in CHOICES.items():
        if value_at(config, key) not in choices:
            names = ", ".join(choice or "''" for choice in choices)
            raise ValueError(f"{origin}: {key} is {value_at(config, key)!r}, but must be one of {names}; correct it.")
    for key in POSITIVE:
        if not value_at(config, key) > 0:
            raise ValueError(f"{origin}: {key} is {value_at(config, key)}, but must be above 0; correct it.")
    for key in ("ce", "pseudo_ce", "kl", "feature", "hidden", "chunk"):
        if not 0 <= getattr(config.loss, key) < float("inf"):
            value = getattr(config.loss, key)
            raise ValueError(f"{origin}: loss.{key} is {value}, but a weight is 0 or more; correct it.")
    for key in ("data.labelled_share", "corpus.valid_share", "on_policy.share", "on_policy.clips"):
        if not 0 <= value_at(config, key) <= 1:
            raise ValueError(f"{origin}: {key} is {value_at(config, key)}, but is a share from 0 to 1; correct it.")
    check_augmentation(config, origin)
    check_round(config, origin)


def check_round(config, origin: str) -> None:
    """Refuse a round that cannot be.

    Raises:
        ValueError: naming the settings.
    """
    for key in ("round", "temperature"):
        value = getattr(config.on_policy, key)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{origin}: on_policy.{key} is {value}, but must be 0 or more; correct it.")
    needs = {"on_policy.round": config.on_policy.round, "student.start": config.student.start}
    for name, value in needs.items():
        if config.on_policy.share and not value:
            raise ValueError(
                f"{origin}: on_policy.share is {config.on_policy.share}, but {name} is {value!r}; set the round of "
                f"`distill answers`, and as student.start the student that answered."
            )
    if config.on_policy.share and not (config.loss.kl or "kl" in config.loss.schedules):
        raise ValueError(
            f"{origin}: on_policy.share is {config.on_policy.share}, but loss.kl is 0 and a student's answer has no "
            f"cross-entropy to learn from; set loss.kl above 0, or on_policy.share=0."
        )


def check_augmentation(config, origin: str) -> None:
    """Refuse what would train on targets of another sound than the student hears: cached ones are of the clean clip.

    Raises:
        ValueError: naming both settings.
    """
    augment = config.augment
    if not augment.is_active:
        return
    if augment.teacher_hears == "same" and not config.teacher.online:
        raise ValueError(
            f"{origin}: augment.teacher_hears is 'same', but cached targets belong to the clean clip; "
            f"set augment.teacher_hears=clean, or teacher.online=true."
        )
    if config.cache.frames != "none" and not config.teacher.online:
        raise ValueError(
            f"{origin}: augment is set, but cache.frames is {config.cache.frames!r} and cached frames are of the clean "
            f"clip; set cache.frames=none, or every augment.*_share=0."
        )
    if augment.speed_share and augment.teacher_hears == "clean" and config.loss.feature:
        raise ValueError(
            f"{origin}: augment.speed_share is {augment.speed_share}, but loss.feature is {config.loss.feature} and "
            f"compares windows at equal times, which speed moves; set one of them to 0."
        )


def value_at(config, key: str):
    """The value of a dotted key."""
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def refuse_secrets(tree, origin: str, prefix: str = "") -> None:
    """Refuse keys named like a credential and values shaped like one; a config is copied into every run folder."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            refuse_secrets(value, origin, f"{prefix}{key}.")
        elif (SECRET.search(str(key)) and key != "end_token") or SECRET_VALUE.search(str(value)):
            raise ValueError(
                f"{origin}: {prefix}{key} looks like a credential, but configs are copied into run folders; "
                f"log in with `hf auth login` or set HF_TOKEN instead."
            )
