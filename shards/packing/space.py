"""What a pack will take on a disk, estimated from some of its recordings' headers. Looks at no disk."""

from collections.abc import Sequence

from shards.audio.container import read_header
from shards.audio.limits import AudioError
from shards.manifests.manifest import Entry
from shards.sample import SAMPLE_RATE

FLAC_BYTES_A_SECOND = 0.55 * 2 * SAMPLE_RATE  # of speech; 16-bit samples
MEMBER_BYTES = 2_500  # of a sample's two headers, their padding and its JSON
NUM_MEASURED = 200  # recordings whose headers are read


class EvenChoice:
    """Some entries of a stream of unknown length, evenly spaced: between `NUM_MEASURED` and twice as many."""

    def __init__(self):
        self.chosen: list[Entry] = []
        self._stride, self._count = 1, 0

    def add(self, entry: Entry) -> None:
        """Look at the next entry of the stream."""
        if self._count % self._stride == 0:
            self.chosen.append(entry)
            if len(self.chosen) == 2 * NUM_MEASURED:
                self.chosen, self._stride = self.chosen[::2], 2 * self._stride
        self._count += 1


def estimate_bytes(entries: Sequence[Entry], num_rows: int, *, longest: float) -> int:
    """What `num_rows` samples like these take as shards, by the seconds that their headers say, `longest` at most."""
    seconds = [_seconds(entry) for entry in entries]
    known = [min(value, longest) for value in seconds if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return int(num_rows * (mean * FLAC_BYTES_A_SECOND + MEMBER_BYTES))


def _seconds(entry: Entry) -> float | None:
    if entry.end is not None:
        return entry.end - entry.start
    try:
        return sum(read_header(path).seconds or 0.0 for path in entry.paths)
    except (AudioError, OSError):
        return None
