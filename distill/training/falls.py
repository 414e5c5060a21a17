"""How the learning rate falls from its peak to its minimum. A further way is one line in `FALLS`.

Imports no torch and no config, as what a config may say is read from here.
"""

import math
from collections.abc import Callable


def fall_at_the_end(progress: float, decay: float) -> float:
    """Flat, then linear over the last part `decay` of the way: WSD, as Hu et al., MiniCPM, 2024 (arXiv 2404.06395)."""
    return min(1.0, (1 - progress) / decay) if decay else 1.0


# What is left of the way from the peak to the minimum, after a part of the steps between warm-up and the last; `decay`
# is the part in which "wsd" falls
FALLS: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, decay: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress, decay: 1 - progress,
    "constant": lambda progress, decay: 1.0,
    "wsd": fall_at_the_end,
}
