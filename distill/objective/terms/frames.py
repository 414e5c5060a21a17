"""The distance of the student's Whisper frames to the teacher's, frame by frame: what teaches smaller ears to hear.

Shapes: B batch, R frames of a row, F frames of audio that both have, row after row, E width.
"""

from typing import TYPE_CHECKING

from distill.objective.features import feature_loss
from distill.objective.terms.needs import Held
from distill.objective.terms.term import Seen, SeenTerm

if TYPE_CHECKING:
    from torch import Tensor


class FrameDistance(SeenTerm):
    """Of each frame that holds audio."""

    title = "Distance of frames"
    needs_teacher = True
    settings = ("frames_kind",)

    def lacks(self, loss, held: Held) -> str | None:
        """The teacher's frames."""
        if held.has_frames:
            return None
        return (
            "loss.frames is above 0, but the teacher's targets hold no frames of its ears; cache again with "
            "cache.frames=float16, or set teacher.online=true or loss.frames=0."
        )

    def lacks_in(self, student) -> str | None:
        """A Whisper that is trained."""
        if any(p.requires_grad for p in student.whisper.parameters()):
            return None
        return (
            "loss.frames is above 0, but this student's ears are frozen and cannot follow it; build the student with "
            "train_ears=True or ears_lora_rank=8, or set loss.frames=0."
        )

    def rows(self, m) -> "Tensor":
        """The batch row of each frame: row_F."""
        shared = m.batch.row_S.new_tensor(shared_frames(m.batch, m.targets))
        return shared.new_tensor(range(len(shared))).repeat_interleave(shared)

    def values(self, seen: Seen) -> "Tensor":
        """The distance of each frame: frames_F."""
        from torch import cat

        shared = shared_frames(seen.batch, seen.targets)
        own_FE, theirs_FE = (
            cat([frames[0][b, :count] for b, count in enumerate(shared)])
            for frames in (seen.heard.frames, seen.targets.frames)
        )
        return feature_loss(seen.loss.frames_kind, seen.project("frames", own_FE), theirs_FE, self.rows(seen))

    def projections(self, student, loss) -> dict[str, tuple[str, int]]:
        """Whisper's frames."""
        return {"frames": (loss.frames_kind, student.whisper.width)}


def shared_frames(batch, targets) -> list[int]:
    """Frames of each clip that hold audio: a student's ears give one each 20 ms, as the teacher's do."""
    from teachers.ears.frontend import FRAME_SAMPLES

    longest = targets.frames[0].shape[1]
    return [min(longest, -(-len(sample.waveform_N) // FRAME_SAMPLES)) for sample in batch.samples]
