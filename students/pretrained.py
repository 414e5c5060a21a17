"""A finished student to use: loaded from a folder or the hub, asked about recordings of hours, saved and pushed.

How recordings of any length are asked about is in `asking.py`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from shards.field_types import to_path
from shards.sample import Sample
from students.asking import Listener
from students.student import load_student
from teachers.files.loading import CONFIG, WEIGHTS, read_config, save_salmonn
from teachers.salmonn import Salmonn

HUB_PARTS = ("llm", "whisper", "second")  # names in a student's config that another machine must find


class Student(Listener):
    """A model that answers about audio.

    Args:
        model: as `build_student` or `load_student` gives it.
        settings: what is needed to build it again, as its folder's `config.json` holds it.
        folder: that it was loaded from; None: it was made here.
    """

    def __init__(self, model: Salmonn, settings: dict, folder: Path | None = None):
        self.model, self.settings, self.folder = model, settings, folder

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, device: str | torch.device | None = None,
                        dtype: torch.dtype | None = None, head: str = "auto") -> "Student":  # fmt: skip
        """Load a saved or exported student, as fast as the device allows.

        Args:
            name: a folder, or the id of a hub repository.
            revision: the revision of the repository.
            device: None: the GPU if there is one.
            dtype: the data type of the products; None: bfloat16 on a GPU, and on a processor whatever is fastest there
                (`students.answering`). torch.float32 is exact on every machine.
            head: of a processor's LLM and its embeddings: "auto", "whole", "bf16", or "int8", which is the smallest.

        Raises:
            FileNotFoundError: there is no such folder, and the hub does not give it.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = to_path(name) if to_path(name).is_dir() else fetch_from_hub(str(name), revision)
        is_fast = device.type == "cpu" and dtype is None
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        model = load_student(folder, dtype=dtype, for_inference=is_fast, head=head)
        return cls(model.to(device), read_config(folder)["settings"], folder)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a folder that `from_pretrained` reads: the student's own tensors, and the names of the frozen parts."""
        weights = self.folder / WEIGHTS if self.folder and self.model.only_answers else None
        save_salmonn(self.model, folder, settings=self.settings, weights=weights)
        return to_path(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = True, message: str = "Upload a student") -> str:
        """Upload what `save_pretrained` writes; the login is the hub's own (`hf auth login`). Returns the address.

        Raises:
            ValueError: a frozen part lies in a folder of this machine, where no other finds it.
        """
        for part in HUB_PARTS:
            place = getattr(self.model.config, part)
            if place and Path(place).exists():
                raise ValueError(
                    f"{part} of this student is {place}, but a hub repository is used on other machines; build it of "
                    f"parts that have a hub id, or give a folder of `distill export --whole` to `hf upload`."
                )
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "student")
            done = api.upload_folder(repo_id=repo_id, folder_path=str(Path(folder) / "student"), commit_message=message)
        return str(done)

    @property
    def max_samples(self) -> int:
        return self.model.max_samples

    @property
    def min_samples(self) -> int:
        return self.model.min_samples

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], *, max_new_tokens: int) -> list[str]:
        """The greedy answers to one batch of clips."""
        was_training = self.model.training
        self.model.eval()
        texts = self.model.generate(samples, max_new_tokens=max_new_tokens)
        self.model.train(was_training)
        return texts


def fetch_from_hub(name: str, revision: str | None) -> Path:
    """The local copy of a hub repository.

    Raises:
        FileNotFoundError: it cannot be had, or holds no student.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision))
    except Exception as error:  # the hub's own errors, the network's, and those of names that cannot be
        raise FileNotFoundError(
            f"student is {name}, but it is no folder here and the hub does not give it "
            f"({str(error).splitlines()[0]}); give a folder with a {CONFIG}, or log in with `hf auth login`."
        ) from error
    return folder
