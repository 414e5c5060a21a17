"""A finished student to use: loaded from a folder or the hub, asked about recordings of hours, saved and pushed.

Recordings longer than its ears take are cut at quiet places and answered piece by piece.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shards.audio.container import AudioLimits
from shards.audio.decode import hash_waveform, load_audio, pad_to_window, to_waveform
from shards.audio.quiet import cut_at_quiet
from shards.sample import SAMPLE_RATE, Sample
from students.student import load_student
from teachers.files.loading import CONFIG, read_config, save_salmonn
from teachers.salmonn import Salmonn

ASR, CAPTION, QUESTION = "asr", "audiocaption", "QA"  # tasks, whose first prompt is asked
BATCH_SIZE = 8  # pieces of audio that are answered at once
MAX_NEW_TOKENS = 200  # of the answer to one piece
LONG = AudioLimits(max_seconds=4 * 3600, max_header_seconds=4 * 3600, max_decoded_bytes=8_000_000_000)  # of a file
HUB_PARTS = ("llm", "whisper", "second")  # names in a student's config that another machine must find


@dataclass(frozen=True)
class Segment:
    """A piece of a recording, and what the student says of it."""

    start: float  # seconds, to the millisecond
    end: float
    text: str


@dataclass(frozen=True)
class Answer:
    """What a student says of a recording."""

    text: str  # of all its pieces
    segments: tuple[Segment, ...]

    def __str__(self) -> str:
        return self.text


class Student:
    """A model that answers about audio.

    Audio is a path, an array of float or int16 samples (`rate` says how many a second), or a list of those: then a list
    comes back, answered in batches.

    Args:
        model: as `build_student` or `load_student` gives it.
        settings: what is needed to build it again, as its folder's `config.json` holds it.
    """

    def __init__(self, model: Salmonn, settings: dict):
        self.model, self.settings = model, settings

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, device: str | torch.device | None = None,
                        dtype: torch.dtype | None = None) -> "Student":  # fmt: skip
        """Load a saved or exported student.

        Args:
            name: a folder, or the id of a hub repository.
            revision: of the repository.
            device: None: the GPU if there is one.
            dtype: of the products; None: bfloat16 on a GPU, else float32.

        Raises:
            FileNotFoundError: there is no such folder, and the hub does not give it.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = Path(name) if Path(name).is_dir() else fetch(str(name), revision)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        return cls(load_student(folder, dtype=dtype).to(device), read_config(folder)["settings"])

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a folder that `from_pretrained` reads: the student's own tensors, and the names of the frozen parts."""
        save_salmonn(self.model, folder, settings=self.settings)
        return Path(folder)

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

    def transcribe(self, audio, *, rate: int = SAMPLE_RATE, max_new_tokens: int = MAX_NEW_TOKENS):
        """What is said: an `Answer`, or a list of them for a list."""
        return self.ask(audio, ASR, rate=rate, max_new_tokens=max_new_tokens)

    def describe(self, audio, *, rate: int = SAMPLE_RATE, max_new_tokens: int = MAX_NEW_TOKENS):
        """What is heard, in a sentence a piece: an `Answer`, or a list of them for a list."""
        return self.ask(audio, CAPTION, rate=rate, max_new_tokens=max_new_tokens)

    def answer(self, audio, question: str, *, rate: int = SAMPLE_RATE, max_new_tokens: int = MAX_NEW_TOKENS):
        """The answer to a question, piece by piece: an `Answer`, or a list of them for a list."""
        return self.ask(audio, QUESTION, question=question, rate=rate, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def ask(self, audio, task: str, *, question: str | None = None, rate: int = SAMPLE_RATE,
            max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = BATCH_SIZE):  # fmt: skip
        """Any task's first prompt about one recording or a list of them.

        Args:
            audio: see the class.
            task: whose prompt.
            question: of a task that asks the sample's own.
            rate: samples a second of arrays.
            max_new_tokens: of the answer to one piece.
            batch_size: pieces at once.

        Raises:
            AudioError: a file cannot be decoded, or holds nothing to hear.
            FileNotFoundError: there is no such file.
            ValueError: an array is not one of audio samples; unknown task.
        """
        is_list = isinstance(audio, Sequence) and not isinstance(audio, str)
        waveforms = [load_waveform(one, rate, self.model) for one in (audio if is_list else [audio])]
        cuts = [cut_at_quiet(x_N, self.model.max_samples, self.model.min_samples) for x_N in waveforms]
        pieces = [x_N[start:end] for x_N, found in zip(waveforms, cuts) for start, end in found]
        texts = iter(self._say(pieces, task, question, max_new_tokens, batch_size))
        answers = [
            [Segment(round(start / SAMPLE_RATE, 3), round(end / SAMPLE_RATE, 3), next(texts)) for start, end in found]
            for found in cuts
        ]
        joined = [Answer(" ".join(s.text for s in found if s.text), tuple(found)) for found in answers]
        return joined if is_list else joined[0]

    def _say(self, pieces: list[np.ndarray], task: str, question: str | None, max_new_tokens: int,
             batch_size: int) -> list[str]:  # fmt: skip
        """The text of each piece; pieces of like length are answered together."""
        was_training, texts = self.model.training, [""] * len(pieces)
        self.model.eval()
        order = sorted(range(len(pieces)), key=lambda number: len(pieces[number]))
        for first in range(0, len(order), batch_size):
            numbers = order[first : first + batch_size]
            samples = [
                Sample(f"audio{n}", pieces[n], None, task, question, "", hash_waveform(pieces[n])) for n in numbers
            ]
            for number, text in zip(numbers, self.model.generate(samples, max_new_tokens=max_new_tokens)):
                texts[number] = text
        self.model.train(was_training)
        return texts


def load_waveform(audio, rate: int, model: Salmonn) -> np.ndarray:
    """A path or an array as float32 at SAMPLE_RATE, at least as long as the ears need.

    Raises:
        AudioError, FileNotFoundError, ValueError: see `Student.ask`.
    """
    if isinstance(audio, str | Path):
        if not Path(audio).is_file():
            raise FileNotFoundError(f"audio is {audio}, but there is no such file; give a wav, flac, ogg or mp3 file.")
        waveform_N = load_audio([Path(audio)], limits=LONG)
    else:
        waveform_N = pad_to_window(to_waveform(as_channels(audio), rate))
    return np.pad(waveform_N, (0, max(0, model.min_samples - len(waveform_N))))


def as_channels(audio) -> np.ndarray:
    """An array or tensor of audio as float32 samples_NC.

    Raises:
        ValueError: it is empty, not finite, of another type, or has more than two dimensions.
    """
    array = np.asarray(audio)
    is_sound = array.ndim in (1, 2) and array.size and (array.dtype.kind == "f" or array.dtype == np.int16)
    if not is_sound or not np.isfinite(array).all():
        raise ValueError(
            f"audio is an array of {array.dtype} and shape {array.shape}, but must hold finite float or int16 samples "
            f"in one or two dimensions; give a path or such an array."
        )
    samples = array.astype(np.float32) / (32768 if array.dtype == np.int16 else 1)
    if samples.ndim == 1:
        return samples[:, None]
    return samples.T if samples.shape[0] < samples.shape[1] else samples


def fetch(name: str, revision: str | None) -> Path:
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
