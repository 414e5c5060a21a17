"""Samples that Python holds, or that a Hugging Face data set has, as shards. Knows no model.

They are packed once, into a folder that is named after their content: the same samples find their shards again, and
other ones get a folder of their own, so that a run goes on exactly or is told that its data changed.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import soundfile

from shards.audio.limits import AudioLimits
from shards.field_types import to_path
from shards.files.write import write_atomically
from shards.manifests.manifest import ANY_TASK, ARRAY, KnownTasks
from shards.packing.encode import EncodeOptions
from shards.packing.folder import INDEX
from shards.packing.pack import pack
from shards.sample import MAX_SECONDS, SAMPLE_RATE, Sample

AUDIO_NAMES = ("audio", "path", "file", "wav", "speech")
TEXT_NAMES = ("text", "sentence", "transcription", "transcript", "normalized_text", "caption", "answer")
QUESTION_NAMES = ("question", "Q")
DEFAULT_TASK, QUESTION_TASK = "asr", "QA"
FEW = 256  # samples that are packed in this process


def pack_items(items: Iterable, folder: Path, name: str, *, max_seconds: float = MAX_SECONDS,
               tasks: KnownTasks = ANY_TASK, say: Callable[[str], None] = print) -> Path:  # fmt: skip
    """Pack samples into `folder/NAME-DIGEST` and return that; when they lie there already they are only read through.

    Args:
        items: a Hugging Face data set, or any iterable with an end of `Sample`s or dicts: `audio` (a path, the bytes of
            a file, an array at 16 kHz, `(array, rate)`, or `{"array": …, "sampling_rate": …}`), `text` (None: the clip
            is unlabelled), and where wanted `task` (by default asr, or QA with a question), `question`, `source`.
        folder: where the folder of the shards is made.
        name: the name of the split.
        max_seconds: the longest duration of a clip; what becomes of longer ones is `shards.packing.encode`'s affair.
        tasks: as `pack` takes them.
        say: is told what lies where.

    Raises:
        ValueError: an item is none of these, naming its place; too many clips cannot be used.
    """
    staging = folder / f".{name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    (staging / "audio").mkdir(parents=True)
    try:
        rows = [_to_row(item, staging, f"{name}[{number}]") for number, item in enumerate(read_items(items, name))]
        if not rows:
            raise ValueError(f"{name} holds no sample, but a run needs some; give an iterable that is not used up.")
        text = json.dumps([row for row, _ in rows], ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(json.dumps([max_seconds, [sha for _, sha in rows], text]).encode()).hexdigest()
        final = folder / f"{name}-{digest[:16]}"
        if (final / INDEX).exists():
            say(f"{name}: {final} holds these {len(rows)} samples, used again")
            return final
        manifest = staging / "manifest.json"
        write_atomically(manifest, json.dumps({ARRAY: [row for row, _ in rows]}, ensure_ascii=False))
        options = EncodeOptions(limits=AudioLimits(max_seconds=max_seconds))
        workers = 1 if len(rows) < FEW else None
        report = pack(manifest, final, name=name, tasks=tasks, options=options, workers=workers)
        say(f"{name}: {report}")
        return final
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_items(items: Iterable, name: str) -> Iterator:
    """The items; those of a Hugging Face data set with the audio as the bytes of its file, for our own decoder.

    Raises:
        ValueError: it is several splits, or it is not clear which of its columns are audio and text.
    """
    if isinstance(items, Mapping):
        raise ValueError(f"{name} holds splits ({', '.join(map(str, items))}), but one is needed; give one of them.")
    if not hasattr(items, "column_names") or not hasattr(items, "features"):
        yield from items
        return
    columns, features = items.column_names, dict(items.features or {})
    if columns is None:  # of one that is streamed through a map() the first row tells
        columns = list(next(iter(items), {}))
    by_type = [column for column in columns if type(features.get(column)).__name__ == "Audio"]
    audio = choose_column(columns, by_type or AUDIO_NAMES, "audio", name)
    text = choose_column(columns, TEXT_NAMES, "text", name)
    if audio in by_type:
        from datasets import Audio  # who has a data set has the package

        items = items.cast_column(audio, Audio(decode=False))
    for row in items:
        yield {**row, "audio": row[audio], "text": row[text]}


def choose_column(columns: Collection[str], known: Collection[str], what: str, name: str) -> str:
    """The column of that name, or the only one whose name is known for it.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [column for column in known if column in columns]
    if what in found or len(found) == 1:
        return what if what in found else found[0]
    which = f"several may be the {what} ({', '.join(found)})" if found else f"none is known to be the {what}"
    raise ValueError(f"columns of {name} are {', '.join(columns)}, but {which}; say which: rename_column(…, {what!r}).")


def _to_row(item, staging: Path, place: str) -> tuple[dict, str]:
    """A manifest's row of an item, whose audio is written to a file, and the hash of the audio."""
    if isinstance(item, Sample):
        item = {"audio": (item.waveform_N, SAMPLE_RATE), "text": item.text, "task": item.task, "source": item.source,
                "question": item.question}  # fmt: skip
    if not isinstance(item, Mapping) or "audio" not in item or "text" not in item:
        found = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise ValueError(
            f"{place} is {found}, but a sample is a Sample or a dict with audio and text (None where it has none); "
            f"give it so."
        )
    data = _read_audio(item["audio"], place)
    sha256 = hashlib.sha256(data).hexdigest()
    path = staging / "audio" / sha256
    if not path.exists():
        path.write_bytes(data)
    question = next((item[name] for name in QUESTION_NAMES if item.get(name) is not None), None)
    task = item.get("task") or (QUESTION_TASK if question is not None else DEFAULT_TASK)
    row = {"path": f"audio/{sha256}", "text": item["text"], "task": task, "source": item.get("source") or "items"}
    return row | ({"Q": question} if question is not None else {}), sha256


def _read_audio(audio, place: str) -> bytes:
    """The bytes of an audio file."""
    if isinstance(audio, Mapping) and audio.get("array") is not None:
        audio = (audio["array"], audio["sampling_rate"])
    elif isinstance(audio, Mapping):
        audio = audio.get("bytes") or audio.get("path")
    if isinstance(audio, bytes):
        return audio
    if isinstance(audio, str | Path):
        try:
            return to_path(audio).read_bytes()
        except OSError as error:
            raise FileNotFoundError(f"{place}.audio is {audio}, but cannot be read ({error.strerror}).") from error
    array, rate = audio if isinstance(audio, tuple) and len(audio) == 2 else (audio, SAMPLE_RATE)
    return write_wav(array, rate, place)


def write_wav(array, rate: int, place: str) -> bytes:
    """An array as the bytes of a WAV file, without loss: 16 bits, or 32-bit floats.

    Raises:
        ValueError: it is no array of one or two dimensions of int16 or floats.
    """
    samples = np.asarray(array)
    if samples.dtype.kind == "f":
        samples = samples.astype(np.float32)
    if samples.ndim not in (1, 2) or samples.dtype not in (np.float32, np.int16):
        raise ValueError(
            f"{place}.audio is {samples.dtype} of shape {samples.shape}, but must be a path, the bytes of a file, or "
            f"int16 or float samples of one or two dimensions; give it so."
        )
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T  # channels first
    buffer = io.BytesIO()
    subtype = "PCM_16" if samples.dtype == np.int16 else "FLOAT"
    soundfile.write(buffer, samples, int(rate), format="WAV", subtype=subtype)
    data = bytearray(buffer.getvalue())
    peak = data.find(b"PEAK", 12, 128)
    if peak >= 0:  # floats: libsndfile notes the second in which it writes, and the same array is the same clip
        data[peak + 12 : peak + 16] = bytes(4)
    return bytes(data)
