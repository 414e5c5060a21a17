"""What may happen to a training clip: the `augment:` section of a config. Applies nothing and imports nothing heavy."""

import math
from dataclasses import dataclass, fields

from shards.field_types import convert_fields

TEACHER_HEARS = ("clean", "same")


@dataclass(frozen=True)
class Augmentation:
    """Training clips only, drawn anew each epoch. A `*_share` is the share of clips that something happens to."""

    speed_share: float = 0.0  # played faster or slower
    speed_range: tuple[float, float] = (0.9, 1.1)  # times as fast; pitch goes with it
    room_share: float = 0.0  # heard in a room
    room_range: tuple[float, float] = (0.1, 0.6)  # seconds until an echo is 60 dB down
    noise_share: float = 0.0  # with noise beside it
    noise_range: tuple[float, float] = (5.0, 30.0)  # dB of the clip above the noise
    gain_share: float = 0.0  # louder or softer
    gain_range: tuple[float, float] = (-12.0, 6.0)  # dB; a clip that would overflow is scaled to its peak instead
    mask_share: float = 0.0  # SpecAugment: parts of the log-mel are set to its mean
    mask_bands: int = 2  # bands of mel bins
    mask_band_share: float = 0.2  # the most of the bins that one band takes
    mask_spans: int = 2  # spans of time
    mask_span_seconds: float = 0.5  # the longest
    mask_span_share: float = 0.2  # the most of a clip that one span takes
    teacher_hears: str = "clean"  # the clip as it was, or "same": the very one that the student hears

    def __post_init__(self):
        convert_fields(self, "augment.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_share") and not 0 <= value <= 1:
                raise ValueError(f"augment.{field.name} is {value}, but a share is 0 to 1; set it so.")
            if field.name.endswith("_range") and not (all(map(math.isfinite, value)) and value[0] <= value[1]):
                raise ValueError(
                    f"augment.{field.name} is {value}, but it goes from the lower to the higher; turn it round."
                )
        if not 0.5 <= self.speed_range[0] <= self.speed_range[1] <= 2:
            raise ValueError(f"augment.speed_range is {self.speed_range}, but it must lie in 0.5 to 2; set it so.")
        if not 0.02 <= self.room_range[0] <= self.room_range[1] <= 3:
            raise ValueError(f"augment.room_range is {self.room_range}, but it must lie in 0.02 to 3 s; set it so.")
        if min(self.mask_bands, self.mask_spans, self.mask_span_seconds) < 0:
            raise ValueError(
                "augment.mask_* is below 0 somewhere, but bands, spans and seconds are counted; set it so."
            )
        if self.teacher_hears not in TEACHER_HEARS:
            raise ValueError(
                f"augment.teacher_hears is {self.teacher_hears!r}, but must be one of {TEACHER_HEARS}; choose one."
            )

    @property
    def is_active(self) -> bool:
        """Whether anything can happen to any clip."""
        return any((self.speed_share, self.room_share, self.noise_share, self.gain_share, self.mask_share))
