"""What a config may not say although every type is right, and no config may hold. Knows the fields, reads no file."""

import re

from distill.schedule import TERMS, parse_schedule

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
POSITIVE = ("train.steps", "train.batch_size", "train.micro_batch_size", "train.learning_rate", "train.max_grad_norm",
            "train.save_every", "train.keep", "student.lora_rank", "loss.temperature", "loss.chunk_temperature",
            "cache.k", "cache.draws", "cache.exponent", "cache.batch_size", "cache.num_beams", "cache.max_new_tokens",
            "on_policy.clips", "on_policy.max_new_tokens", "eval.batch_size", "eval.num_beams", "eval.max_new_tokens",
            "eval.repetition_penalty")  # fmt: skip
NOT_NEGATIVE = ("data.workers", "data.bucket_batches", "data.batch_seconds", "cache.threshold", "train.warmup_steps",
                "train.min_learning_rate", "train.weight_decay", "train.eval_every", "train.stop_after",
                "on_policy.round", "on_policy.temperature")  # fmt: skip
TAKES_PARAMETER = ("jsd", "skewed_kl", "skewed_reverse_kl")  # of loss.kl_kind
HEAD_INPUT = -1  # among hidden layers


def check_config(config, origin: str = "config") -> None:
    """The one gate for values that are well-typed and still wrong."""
    for key, choices in CHOICES.items():
        if value_at(config, key) not in choices:
            names = ", ".join(choice or "''" for choice in choices)
            raise ValueError(f"{origin}: {key} is {value_at(config, key)!r}, but must be one of {names}; correct it.")
    for key in POSITIVE:
        if not value_at(config, key) > 0:
            raise ValueError(f"{origin}: {key} is {value_at(config, key)}, but must be above 0; correct it.")
    for key in NOT_NEGATIVE:
        if not 0 <= value_at(config, key) < float("inf"):
            raise ValueError(f"{origin}: {key} is {value_at(config, key)}, but must be 0 or more; correct it.")
    for key in (*TERMS, "pseudo_ce"):
        if not 0 <= getattr(config.loss, key) < float("inf"):
            value = getattr(config.loss, key)
            raise ValueError(f"{origin}: loss.{key} is {value}, but a weight is 0 or more; correct it.")
    for key in ("data.labelled_share", "corpus.valid_share", "on_policy.share", "on_policy.clips"):
        if not 0 <= value_at(config, key) <= 1:
            raise ValueError(f"{origin}: {key} is {value_at(config, key)}, but is a share from 0 to 1; correct it.")
    check_name(config, origin)
    check_rates(config, origin)
    check_terms(config, origin)
    check_divergence(config, origin)
    check_targets(config, origin)
    check_augmentation(config, origin)
    check_round(config, origin)


def check_name(config, origin: str) -> None:
    """Refuse a name that is none of a folder inside `runs`."""
    if config.name in ("", ".", "..") or re.search(r"[/\\\0]", config.name):
        raise ValueError(
            f"{origin}: name is {config.name!r}, but the run's folder is runs/NAME; give a name without slashes, and "
            f"set runs= for another place."
        )


def check_rates(config, origin: str) -> None:
    """Refuse a learning rate that climbs where it should fall."""
    train = config.train
    if train.min_learning_rate > train.learning_rate:
        raise ValueError(
            f"{origin}: train.min_learning_rate is {train.min_learning_rate:g}, but train.learning_rate, the peak, is "
            f"{train.learning_rate:g}; lower it."
        )


def check_terms(config, origin: str) -> None:
    """Refuse an objective of no term, and schedules that cannot be."""
    loss, ends = config.loss, {}
    for name, text in loss.schedules.items():
        if name not in TERMS:
            raise ValueError(
                f"{origin}: loss.schedules names {name}, but the terms are {', '.join(TERMS)}; correct the name."
            )
        schedule = parse_schedule(text, getattr(loss, name), config.train.steps, f"{origin}: loss.schedules.{name}")
        ends[name] = 0.0 if schedule.kind == "constant" else schedule.end
    terms = [name for name in TERMS if name != "chunk" or loss.cross_tokenizer == "chunk"]
    if not any(getattr(loss, name) or (name in ends and ends[name]) for name in terms):
        raise ValueError(
            f"{origin}: the weights of {', '.join(f'loss.{name}' for name in terms)} are all 0, but a student learns "
            f"from one at least; set one above 0."
        )


def check_divergence(config, origin: str) -> None:
    """Refuse a parameter that the divergence does not take, and the lack of one that it does."""
    kind, parameter = config.loss.kl_kind, config.loss.kl_parameter
    if kind not in TAKES_PARAMETER and parameter is not None:
        raise ValueError(f"{origin}: loss.kl_parameter is {parameter}, but {kind} takes none; leave it out.")
    if kind in TAKES_PARAMETER and (parameter is None or not 0 < parameter < 1):
        raise ValueError(
            f"{origin}: loss.kl_parameter is {parameter}, but {kind} takes one strictly between 0 and 1; set it, or "
            f"use forward_kl or reverse_kl."
        )


def check_targets(config, origin: str) -> None:
    """Refuse an objective that the teacher's targets, as this config has them made, cannot serve."""
    loss, cache, is_online = config.loss, config.cache, config.teacher.online
    if not all(t > 0 for t in cache.temperatures) or 1.0 not in cache.temperatures:
        raise ValueError(
            f"{origin}: cache.temperatures is {list(cache.temperatures)}, but all must be above 0 and 1.0 among them; "
            f"correct it."
        )
    uses_kl = bool(loss.kl or "kl" in loss.schedules)
    if uses_kl and cache.codec == "sampled" and not is_online and (loss.kl_kind, loss.temperature) != ("forward_kl", 1):
        raise ValueError(
            f"{origin}: loss.kl_kind is {loss.kl_kind} at loss.temperature {loss.temperature:g}, but draws of the "
            f"teacher (cache.codec=sampled) give forward_kl at temperature 1 alone; use that, or cache.codec=topk."
        )
    is_kept = cache.codec in ("hidden", "dense") or loss.temperature in cache.temperatures
    if (uses_kl or loss.cross_tokenizer == "chunk") and not is_kept:
        raise ValueError(
            f"{origin}: loss.temperature is {loss.temperature:g}, but cache.temperatures is "
            f"{list(cache.temperatures)} and {cache.codec} keeps no other; add it there, or change it."
        )
    kept = {*cache.hidden_layers, *([HEAD_INPUT] if is_online or cache.codec == "hidden" else [])}
    lost = sorted(set(loss.layer_pairs) - kept)
    if (loss.hidden or "hidden" in loss.schedules) and lost:
        raise ValueError(
            f"{origin}: loss.hidden_layers names the teacher's {lost[0]}, but cache.hidden_layers is "
            f"{list(cache.hidden_layers)}; add it there, or set loss.hidden=0."
        )


def check_round(config, origin: str) -> None:
    """Refuse a round that cannot be.

    Raises:
        ValueError: naming the settings.
    """
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
