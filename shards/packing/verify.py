"""`distill pack --verify`: reads every byte of a packed folder again. Knows what pack wrote and believes none of it."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shards.audio.decode import decode_audio, hash_waveform
from shards.audio.limits import AudioError
from shards.manifests.manifest import missing_file_error
from shards.pool import count_cpus, map_in_order, progress_bar
from shards.sample import SAMPLE_RATE
from shards.streaming.catalog import LISTED, read_listing
from shards.tars.archive import Member, Walk
from shards.tars.index import sidecar_path, unpack_sidecar

NUM_SHOWN = 5


@dataclass(frozen=True)
class VerifyReport:
    """What was read and found as it was written."""

    out: Path
    num_shards: int
    num_samples: int
    seconds: float

    def __str__(self) -> str:
        hours = self.seconds / 3600
        return f"{self.out}: {self.num_shards} shards, {self.num_samples} samples, {hours:.2f} h, all as written"


def verify(out: Path, *, workers: int | None = None, show_progress: bool = False) -> VerifyReport:
    """Read every shard of a packed folder: its hash, its members, and each sample decoded against its hash.

    Raises:
        FileNotFoundError: the folder holds no finished pack.
        ValueError: what differs, by shard and key.
    """
    out = Path(out)
    if not (out / "index.json").exists():
        near = sorted(path.parent for path in out.glob("*/index.json"))
        if near:
            raise FileNotFoundError(
                f"{out} is no packed folder, but {', '.join(map(str, near))} are; name one of them."
            )
        raise missing_file_error(out / "index.json")
    shards = read_listing(out / "index.json", (out / "index.json").read_bytes(), (*LISTED, "seconds"))
    totals = {field: sum(shard[field] for shard in shards) for field in ("samples", "seconds")}
    workers = count_cpus() if workers is None else workers
    problems, last_key = [], ""
    with progress_bar("verifying", totals["samples"], show=show_progress) as advance:
        found = map_in_order(partial(_verify_shard, out), shards, workers=workers)
        for shard, (first_key, final_key, shard_problems) in zip(shards, found):
            problems += shard_problems
            # keys begin with the row's number, so rising keys are unique keys
            if first_key <= last_key:
                problems.append(f"{shard['name']} begins with {first_key}, but {last_key} came before it")
            last_key = final_key or last_key
            advance(shard["samples"])
    if problems:
        more = f" (and {len(problems) - NUM_SHOWN} more)" if len(problems) > NUM_SHOWN else ""
        raise ValueError(f"{out} is not as it was packed: {'; '.join(problems[:NUM_SHOWN])}{more}; pack again.")
    return VerifyReport(out, len(shards), totals["samples"], totals["seconds"])


def _verify_shard(out: Path, shard: dict) -> tuple[str, str, list[str]]:
    """First key, last key and problems of one shard."""
    path = out / shard["name"]
    try:
        walk = Walk(path)
        members = list(walk)
        problems = [] if walk.sha256 == shard["sha256"] else [f"{path} has another SHA-256 than index.json says"]
        problems += _verify_sidecar(path, walk.sha256, members)
        if [member.kind for member in members] != ["audio", "json"] * shard["samples"]:
            return "", "", [*problems, f"{path} does not hold {shard['samples']} pairs of audio and JSON"]
        with path.open("rb") as file:
            for audio, fields in zip(members[::2], members[1::2]):
                file.seek(audio.offset)
                problems += _verify_sample(f"{path}: {audio.key}", file.read(audio.size), json.loads(fields.data))
    except (OSError, ValueError) as error:
        return "", "", [str(error)]
    keys = [member.key for member in members[::2]]
    if keys != sorted(set(keys)) or keys != [member.key for member in members[1::2]]:
        problems.append(f"{path} has keys that do not rise")
    return keys[0], keys[-1], problems


def _verify_sidecar(path: Path, sha256: str, members: list[Member]) -> list[str]:
    """A sidecar that is missing or damaged is built again by the stream; one that is whole and wrong is not."""
    sidecar = sidecar_path(path)
    index = unpack_sidecar(sidecar.read_bytes()) if sidecar.exists() else None
    if index is None or index.sha256 != sha256:
        return [f"{sidecar} is missing or not of this shard"]
    rows = [(member.offset, member.size, member.crc32) for member in members]
    if index.members["audio"].tolist() == list(map(list, rows[::2])) and index.keys == [m.key for m in members[::2]]:
        return []
    return [f"{sidecar} says that its samples lie elsewhere"]


def _verify_sample(name: str, data: bytes, fields: dict) -> list[str]:
    try:
        waveform_N = decode_audio(data, name=name)
    except AudioError as error:
        return [str(error)]
    if hash_waveform(waveform_N) != fields["sha256"]:
        return [f"{name} decodes to other samples than were packed"]
    if len(waveform_N) / SAMPLE_RATE != fields["duration"]:
        return [f"{name} has {len(waveform_N) / SAMPLE_RATE} s, but its JSON says {fields['duration']}"]
    return []
