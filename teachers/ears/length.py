"""How much of a clip Whisper hears: padded to its full 30 s, as it was trained, or cut to the clip and some silence.

A frozen Whisper answers wrongly when it is cut, so nothing is cut that was not trained so: the length is one of the
settings of a model, of the frames in a cache, and of an export. Knows no encoder.
"""

import re

FULL = "30"  # all that the ears can take, whatever the clip
PATTERN = re.compile(r"clip(?:\+(\d+(?:\.\d+)?))?")


def parse_ears_seconds(text: str, name: str = "ears_seconds") -> float | None:
    """Seconds of silence that are heard behind a clip; None: as many as fit.

    Args:
        text: "30", "clip" or "clip+P".
        name: the name of the field, for the message.

    Raises:
        ValueError: it is none of these.
    """
    if text == FULL:
        return None
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{name} is {text!r}, but must be '30' (padded to the ears' full length), 'clip', or 'clip+P' with P "
            f"seconds of silence behind the clip, such as clip+1; correct it."
        )
    return float(match[1] or 0.0)
