"""What a command says beside its result: lines on stderr, which `--quiet` silences in all of its processes.

Results go to stdout, for a script as JSON; errors go to stderr and are never silenced.
"""

import json
import logging
import math
import os
import sys
import warnings

QUIET = "DISTILL_QUIET"  # set in the environment, so that stages and workers of a quiet command are quiet too


def set_quiet() -> None:
    """From now on only results and errors are printed, here and in the processes that are started."""
    os.environ[QUIET] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return os.environ.get(QUIET) == "1"


def print_status(text: str) -> None:
    """A line for who watches."""
    if not is_quiet():
        print(text, file=sys.stderr, flush=True)


def print_json(value) -> None:
    """A result for a script: the only thing on stdout. What is not finite is null, as JSON has no number for it."""
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False))


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
