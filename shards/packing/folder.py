"""The folder that `distill pack` fills: its shards, the record of those that are done, and the samples left out.

Knows no audio: samples come as the bytes of their members.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.files.hash import hash_file
from shards.files.write import open_atomically, remove_leftovers, write_atomically
from shards.jsonfile import ShapeError, is_a, parse_object, read_object, show
from shards.packing.encode import BadSample, Encoded, EncodeOptions, count_reasons, describe_reasons
from shards.tars.index import sidecar_path, write_index
from shards.tars.tarwriter import TarWriter, member_size

INDEX, PARTIAL_INDEX, BAD_SAMPLES = "index.json", "index.partial.json", "bad_samples.jsonl"
SHARD_FIELDS = {"name": str, "samples": int, "seconds": float, "bytes": int, "sha256": str, "rows": list}
VERSION = 1


@dataclass(frozen=True)
class ShardSize:
    """The most that one shard holds."""

    samples: int = 2_000
    bytes: int = 256_000_000  # of a shard that holds more than one sample


class PackFolder:
    """The folder that is being filled: its record, and the shard that is open."""

    def __init__(self, manifest: Path, out: Path, name: str, size: ShardSize, options: EncodeOptions):
        self.out, self.name, self.size = out, name, size
        self.identity = {
            "version": VERSION,
            "name": name,
            "manifest_sha256": hash_file(manifest),
            "shard_samples": size.samples,
            "shard_bytes": size.bytes,
            "options": asdict(options),
        }
        self.shards: list[dict] = []
        self.bad: list[BadSample] = []
        self.complete = False

    @property
    def next_row(self) -> int:
        """The first row that no finished shard covers."""
        return self.shards[-1]["rows"][1] if self.shards else 0

    def resume(self) -> int:
        """Take over the shards that an earlier run finished and that are as it left them; returns their number.

        Raises:
            ValueError: the folder holds another pack.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.out, "*")
        record_path = next((self.out / name for name in (INDEX, PARTIAL_INDEX) if (self.out / name).exists()), None)
        if record_path is None:
            return 0
        record = _read_record(record_path)
        for field, value in self.identity.items():
            if record.get(field) != value:
                raise ValueError(
                    f"{record_path} has {field} {record.get(field)}, but this run's is {value}; "
                    "choose another folder, or remove this one."
                )
        for shard in record["shards"]:
            path = self.out / shard["name"]
            if not path.exists() or path.stat().st_size != shard["bytes"] or hash_file(path) != shard["sha256"]:
                break
            if not sidecar_path(path).exists():
                write_index(path)
            self.shards.append(shard)
        self.complete = record_path.name == INDEX and len(self.shards) == len(record["shards"])
        self.bad = self._read_bad()
        if not self.complete:
            (self.out / INDEX).unlink(missing_ok=True)
            self._write_record(PARTIAL_INDEX)
        return len(self.shards)

    def write(self, encoded: Iterator[list], max_bad: int, num_rows: int, advance: Callable) -> None:
        """Write every sample, in order; a shard that is open when this fails leaves nothing behind."""
        first_row = row = self.next_row
        writer, count, seconds = None, 0, 0.0
        try:
            for result in (result for piece in encoded for result in piece):
                for bad in (sample for sample in result if isinstance(sample, BadSample)):
                    self._add_bad(bad, max_bad, num_rows)
                samples = [sample for sample in result if isinstance(sample, Encoded)]
                if samples and writer is not None and self._is_full(writer, count, samples):
                    self._finish(writer, count, seconds, first_row, row)
                    writer, first_row = None, row
                if samples and writer is None:
                    writer, count, seconds = TarWriter(self._shard_path()), 0, 0.0
                for sample in samples:
                    writer.add(f"{sample.key}.flac", sample.flac)
                    writer.add(f"{sample.key}.json", sample.json)
                count, seconds = count + len(samples), seconds + sum(sample.seconds for sample in samples)
                row += 1
                advance(1)
            if writer is not None:
                self._finish(writer, count, seconds, first_row, row)
        finally:
            if writer is not None:
                writer.discard()
            encoded.close()
        self._end(num_rows)

    def _shard_path(self) -> Path:
        return self.out / f"{self.name}-{len(self.shards):06d}.tar"

    def _is_full(self, writer: TarWriter, count: int, samples: list[Encoded]) -> bool:
        size = sum(member_size(sample.flac) + member_size(sample.json) for sample in samples)
        return count + len(samples) > self.size.samples or writer.size + size > self.size.bytes

    def _finish(self, writer: TarWriter, count: int, seconds: float, first_row: int, end_row: int) -> None:
        sha256 = writer.close()
        write_index(writer.path)
        self.shards.append(
            {
                "name": writer.path.name,
                "samples": count,
                "seconds": round(seconds, 6),
                "bytes": writer.size,
                "sha256": sha256,
                "rows": [first_row, end_row],
            }
        )
        self._write_record(PARTIAL_INDEX)

    def _add_bad(self, bad: BadSample, max_bad: int, num_rows: int) -> None:
        self.bad.append(bad)
        if len(self.bad) > max_bad:
            self._write_bad()
            raise ValueError(
                f"bad samples are {len(self.bad)} of {num_rows} ({describe_reasons(self.bad)}), but {max_bad} are "
                f"accepted at most; see {self.out / BAD_SAMPLES}, run distill audit, or raise --max-bad."
            )

    def _end(self, num_rows: int) -> None:
        if not self.shards:
            self._write_bad()
            raise ValueError(f"{self.name} has {num_rows} rows, but none gave a sample; see {self.out / BAD_SAMPLES}.")
        self._write_record(INDEX)
        (self.out / PARTIAL_INDEX).unlink(missing_ok=True)
        self.complete = True

    def _read_bad(self) -> list[BadSample]:
        """The bad rows that an earlier run met in the shards that are kept."""
        path = self.out / BAD_SAMPLES
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            bad = [BadSample(**parse_object(line, {"number": int})) for line in lines]
        except (ShapeError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read as what a pack left out ({error}), but a pack goes on from it; remove it and "
                f"{self.out / INDEX}, or choose another folder."
            ) from error
        return [sample for sample in bad if self.complete or sample.number < self.next_row]

    def _write_bad(self) -> None:
        with open_atomically(self.out / BAD_SAMPLES) as file:
            file.writelines(bad.to_json() + "\n" for bad in self.bad)

    def _write_record(self, file_name: str) -> None:
        self._write_bad()
        record = self.identity | self.totals() | {"bad": count_reasons(self.bad), "shards": self.shards}
        write_atomically(self.out / file_name, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def totals(self) -> dict:
        """Samples, seconds and bytes of all shards."""
        totals = {field: sum(shard[field] for shard in self.shards) for field in ("samples", "seconds", "bytes")}
        return totals | {"seconds": round(totals["seconds"], 6)}


def _read_record(path: Path) -> dict:
    try:
        record = read_object(path, {"shards": list})
        for shard in record["shards"]:
            parse_object(json.dumps(shard), SHARD_FIELDS)
            if len(shard["rows"]) != 2 or not all(is_a(row, int) for row in shard["rows"]):
                raise ShapeError(f"has rows {show(shard['rows'])}, but a first one and an end are needed")
        return record
    except ShapeError as error:
        raise ValueError(
            f"{path} cannot be read as the record of a pack (it {error}), but a pack goes on from it; remove it, or "
            f"choose another folder."
        ) from error
