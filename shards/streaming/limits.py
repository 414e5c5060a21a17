"""What a stream may use and put up with: processes, copies of remote shards, sizes, bad samples. Knows no sample."""

from dataclasses import dataclass, field
from pathlib import Path

from shards.tars.archive import MAX_MEMBER_BYTES
from shards.tars.localcopy import ShardCache

MIN_MAX_BAD = 10  # samples that may be bad however few were read


@dataclass(frozen=True)
class Limits:
    """The limits of a stream; none of them changes which samples come, or when.

    Raises:
        ValueError: one is out of its range.
    """

    workers: int = 0  # processes that read and decode; 0: in this one
    max_bad: float = 0.001  # the share of bad samples to stop above, if they are over MIN_MAX_BAD
    bad_samples: str | Path | None = None  # a JSON Lines file to append bad samples to
    max_member_bytes: int = MAX_MEMBER_BYTES  # the largest member allowed in a shard
    cache: ShardCache = field(default_factory=ShardCache)  # where remote shards are kept, and how many bytes of them

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, but it must be 0 (this process) or more; set it so.")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is {self.max_bad}, but a share is 0 to 1; set it so.")
        if self.max_member_bytes <= 0:
            raise ValueError(f"max_member_bytes is {self.max_member_bytes}, but it must be above 0; set it so.")

    def allowed_bad(self, num_read: int) -> float:
        """The most bad samples among so many."""
        return max(MIN_MAX_BAD, self.max_bad * num_read)
