"""What a student hears with where that is not as its teacher hears, and what its connector starts from.

Both are plain data with the words of a config's `student`, whose defaults stand here, and cost no torch. Which tensors
that means is `students.ears`' to know.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teachers.ears.encoders import second_kinds, shares_spectrum

if TYPE_CHECKING:
    from teachers.salmonn import SalmonnConfig

NONE = "none"  # as a second encoder's kind: there is to be no second encoder; as bits: weights as they are


@dataclass(frozen=True)
class Connector:
    """LayerNorms, Q-Former and projection at their start.

    Attributes:
        start: "teacher" starts them from the teacher's weights where they fit, "new" from random ones.
        dropout: the dropout in the Q-Former, in training.
    """

    start: str = "teacher"
    dropout: float = 0.0


@dataclass(frozen=True)
class Hearing:
    """A student's ears; what is not named is as the teacher's.

    Attributes:
        whisper: folder or hub id; empty: the teacher's.
        second: file or folder of the second encoder; empty: the teacher's.
        second_kind: one of `teachers.ears.encoders`, or "none" for no second encoder; empty: the teacher's.
        windows: "audio" or "all", see `SalmonnConfig`.
        ears_seconds: what Whisper hears of a clip, "30", "clip" or "clip+P"; empty: as the teacher's does.
        ears_quantization: bits of the ears' linear layers: "none" (as they are), "bf16" or "int8".
        whisper_layers: that are kept of Whisper's, evenly spread; 0: all.
        train_ears: train all of Whisper too, from where it stands; it is then a copy of its own.
        ears_lora_rank: the rank of LoRA on Whisper's linear layers, trained in its stead; 0: none.
    """

    whisper: str = ""
    second: str = ""
    second_kind: str = ""
    windows: str = "audio"
    ears_seconds: str = ""
    ears_quantization: str = NONE
    whisper_layers: int = 0
    train_ears: bool = False
    ears_lora_rank: int = 0

    @property
    def trains_ears(self) -> bool:
        """Whether Whisper is trained, all of it or LoRA on it."""
        return self.train_ears or self.ears_lora_rank > 0

    def of(self, teacher: SalmonnConfig) -> SalmonnConfig:
        """The teacher's config with these ears.

        Raises:
            ValueError: the second encoder's name and kind contradict each other or the teacher's, or all of ears in
                few bits or with LoRA is to be trained.
        """
        second = self._second(teacher)
        bits = self.ears_quantization if self.ears_quantization != NONE else teacher.ears_quantization
        lora_rank = self.ears_lora_rank or teacher.ears_lora_rank
        check_trainable(self.train_ears, bits, lora_rank)
        return dataclasses.replace(
            teacher,
            whisper=self.whisper or teacher.whisper,
            front_end=teacher.front_end if shares_spectrum(second["second_kind"]) else "exact",
            windows=self.windows,
            ears_seconds=self.ears_seconds or teacher.ears_seconds,
            ears_quantization=bits,
            whisper_layers=self.whisper_layers or teacher.whisper_layers,
            ears_lora_rank=lora_rank,
            **second,
        )

    def _second(self, teacher: SalmonnConfig) -> dict[str, str]:
        """The second encoder's place and kind."""
        second, kind = self.second, self.second_kind
        if kind == NONE and second:
            raise ValueError(f"student.second is {second!r}, but student.second_kind is 'none'; empty one of them.")
        if second and not (kind or teacher.second_kind):
            raise ValueError(
                f"student.second is {second!r}, but student.second_kind is empty and the teacher has no second encoder "
                f"whose kind it could be; set student.second_kind to {' or '.join(second_kinds())}."
            )
        if not second and kind not in ("", NONE, teacher.second_kind):
            raise ValueError(
                f"student.second_kind is {kind!r}, but student.second is empty and the teacher's second encoder is "
                f"{teacher.second_kind or NONE!r}; give the {kind} file as student.second."
            )
        if kind == NONE:
            return {"second": "", "second_kind": ""}
        return {"second": second or teacher.second, "second_kind": kind or teacher.second_kind}


def check_trainable(train_ears: bool, ears_quantization: str, ears_lora_rank: int, section: str = "") -> None:
    """Refuse to train all of ears in few bits, or with LoRA; `section` is what an error puts before the names.

    Raises:
        ValueError: naming both settings.
    """
    if train_ears and ears_quantization != NONE:
        raise ValueError(
            f"{section}train_ears is true, but {section}ears_quantization is {ears_quantization!r} and weights in so "
            f"few bits are not trained; set it to none, and quantize with `distill export --ears-bits "
            f"{ears_quantization}` afterwards, or train {section}ears_lora_rank=8 beside them."
        )
    if train_ears and ears_lora_rank:
        raise ValueError(
            f"{section}train_ears is true, but {section}ears_lora_rank is {ears_lora_rank} and beside LoRA a Whisper's "
            f"own weights stay as they are; set {section}train_ears=false, or take ears without LoRA."
        )
