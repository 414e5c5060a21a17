"""What looks like a credential: no config may hold one, and no line of a log shows one."""

import re

SECRET = re.compile(r"(^|_)(token|secret|password|api_?key)$", re.IGNORECASE)
NO_CREDENTIALS = ("end_token", "bos_token")  # though they are named like one
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}")


def refuse_secrets(tree, origin: str, prefix: str = "") -> None:
    """Refuse keys named like a credential and values shaped like one; a config is copied into every run folder."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            refuse_secrets(value, origin, f"{prefix}{key}.")
        elif (SECRET.search(str(key)) and key not in NO_CREDENTIALS) or SECRET_VALUE.search(str(value)):
            raise ValueError(
                f"{origin}: {prefix}{key} looks like a credential, but configs are copied into run folders; "
                f"log in with `hf auth login` or set HF_TOKEN instead."
            )
