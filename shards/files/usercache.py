"""Where this user's copies of remote files, and what is remembered of local ones, are kept. Knows none of them."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """A place of that name in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / name
