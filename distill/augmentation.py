"""What augmentation goes together with: cached targets belong to the clean clip. Knows the config and nothing else."""


def check_augmentation(config, origin: str) -> None:
    """Refuse what would train on targets of another sound than the student hears.

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
