"""How a teacher's distribution at S positions becomes bytes and comes back.

Every codec has three steps: `capture` where the logits are, `encode` on the host, `decode` in the training run. A
payload describes itself, so `decode(payload)` needs nothing else; it has no checksum, the record's file has one.
Knows no tar, no sample and no teacher.

S supervised positions, K kept ids, V vocabulary, D LLM width, N draws.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shards.targets.bitpack import Reader, pack_bits, pack_sets, unpack_bits, unpack_sets
from shards.targets.distributions import Distribution, Sparse
from shards.targets.payload import VERSION, pack_header, read_header
from shards.targets.record import dequantize_rows, quantize_rows
from shards.targets.topk import Adaptive, TopK

GROUP = 128  # dimensions of a hidden state that share a quantisation step


@dataclass(frozen=True)
class Sampled:
    """Random-sampled KD: ids drawn from the teacher, so that the gradient is right on average at a dozen ids a token.

    N draws from q = p^exponent / Z give id i the weight count_i / N * p_i / q_i, whose expectation is p_i (arXiv
    2503.16870, "Sparse Logit Sampling"). At exponent 1 the weights are counts and sum to one; at another they sum to
    one on average only. What is stored holds for temperature 1 and cannot be re-tempered without bias.
    """

    draws: int = 50
    exponent: float = 1.0  # of the proposal; below 1 it draws more of the tail

    name: ClassVar[str] = "sampled"
    reads: ClassVar[str] = "logits"

    def __post_init__(self):
        if not (1 <= self.draws < 2**16 and 0 < self.exponent <= 1):
            raise ValueError(
                f"(draws, exponent) is {(self.draws, self.exponent)}, but draws must be from 1 to 65,535 and exponent "
                f"in (0, 1]; change them in the config's cache section."
            )

    def capture(self, logits_SV: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw where the logits are.

        The generator is the CPU's: seeded by the sample, a repeated job draws the same on a GPU and without one.
        """
        logprobs_SV = torch.log_softmax(logits_SV.float(), -1)
        log_proposal_SV = torch.log_softmax(self.exponent * logprobs_SV, -1)
        uniform_SN = torch.rand(len(logits_SV), self.draws, dtype=torch.double, generator=generator)
        cumulative_SV = log_proposal_SV.double().exp().cumsum(-1)
        # right: the first id whose cumulative mass is larger, so never one without mass
        draws_SN = torch.searchsorted(
            cumulative_SV, uniform_SN.to(logits_SV.device) * cumulative_SV[:, -1:], right=True
        ).clamp(max=logits_SV.shape[-1] - 1)
        log_ratio_SN = logprobs_SV.gather(-1, draws_SN) - log_proposal_SV.gather(-1, draws_SN)
        size = torch.tensor(logits_SV.shape[-1])
        return {"draws_SN": draws_SN.int(), "log_ratio_SN": log_ratio_SN, "vocab_size": size}

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        draws_SN, vocab_size = captured["draws_SN"], int(captured["vocab_size"])
        order_SN = np.argsort(draws_SN, 1)
        draws_SN = np.take_along_axis(draws_SN, order_SN, 1)
        is_first_SN = np.ones(draws_SN.shape, bool)
        is_first_SN[:, 1:] = draws_SN[:, 1:] != draws_SN[:, :-1]
        firsts = np.flatnonzero(is_first_SN)
        repeats = np.diff(np.append(firsts, draws_SN.size))
        counts_S = is_first_SN.sum(1)
        pieces = [
            pack_header(self.name, len(draws_SN), vocab_size, self.draws, self.exponent),
            pack_bits(counts_S, self.draws.bit_length()),
            pack_sets(draws_SN[is_first_SN].astype(np.int64), counts_S, vocab_size),
            pack_bits(repeats - 1, (self.draws - 1).bit_length()),
        ]
        if self.exponent != 1:
            pieces.append(
                np.take_along_axis(captured["log_ratio_SN"], order_SN, 1)[is_first_SN].astype("<f2").tobytes()
            )
        return b"".join(pieces)

    @staticmethod
    def read(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> Distribution:
        """What `decode` calls after the headers: log-weights for log-probabilities, and no mass outside."""
        draws, exponent = int(parameters[0]), parameters[1]
        counts_S = unpack_bits(reader, sizes, draws.bit_length())
        num_positions = len(counts_S)
        ids = unpack_sets(reader, sizes, counts_S, vocab_size)
        num_ids = np.diff(np.append(0, np.cumsum(counts_S))[list(accumulate(sizes, initial=0))]).tolist()
        weights = np.log((unpack_bits(reader, num_ids, (draws - 1).bit_length()) + 1) / np.float32(draws))
        if exponent != 1:
            weights += reader.take("<f2", num_ids)
        is_used_SK = np.arange(counts_S.max(initial=1)) < counts_S[:, None]
        ids_SK = np.zeros(is_used_SK.shape, np.int64)
        logprobs_SK = np.full(is_used_SK.shape, -np.inf, np.float32)
        ids_SK[is_used_SK], logprobs_SK[is_used_SK] = ids, weights
        nothing_S = torch.full((num_positions,), -torch.inf)
        partition = {1.0: torch.zeros(num_positions)}
        return Distribution(
            torch.from_numpy(ids_SK), torch.from_numpy(logprobs_SK), partition, vocab_size, {1.0: nothing_S}
        )


@dataclass
class HiddenStates:
    """What the `hidden` codec decodes to: the input of the teacher's head. With the head it reads as a `Distribution`.

    Attributes:
        hidden_SD: float32, after the last norm; each value off by at most `max / 254` of its group of 128 dimensions.
        vocab_size: rows of the head.
        head_weight_VD: the teacher's head, in any float type; None until `with_head`.
        softcap: c of `c * tanh(logits / c)`, applied last; None: none.
        logit_scale: multiplies the head's product.
    """

    hidden_SD: Tensor
    vocab_size: int
    head_weight_VD: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def concatenate(cls, parts: Sequence["HiddenStates"]) -> "HiddenStates":
        """Several samples' positions as one batch's."""
        return replace(parts[0], hidden_SD=torch.cat([part.hidden_SD for part in parts]))

    def to(self, device: torch.device | str) -> "HiddenStates":
        """The same on another device."""
        head_VD = self.head_weight_VD
        head_VD = head_VD if head_VD is None else head_VD.to(device, non_blocking=True)
        return replace(self, hidden_SD=self.hidden_SD.to(device, non_blocking=True), head_weight_VD=head_VD)

    def with_head(self, head_weight_VD: Tensor, *, softcap: float | None = None,
                  logit_scale: float = 1.0) -> "HiddenStates":  # fmt: skip
        """The same with the teacher's head, and what its LLM does to the product.

        Raises:
            ValueError: the head is of another vocabulary.
        """
        if len(head_weight_VD) != self.vocab_size:
            raise ValueError(
                f"head has {len(head_weight_VD)} rows, but the cached teacher's {self.vocab_size}; load the head of "
                f"the teacher that made the cache."
            )
        return replace(self, head_weight_VD=head_weight_VD, softcap=softcap, logit_scale=logit_scale)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is outside the kept ids: always, all V are there."""
        return True

    @property
    def ids_SK(self) -> Tensor:
        """All V ids, at every position."""
        return torch.arange(self.vocab_size, device=self.hidden_SD.device).expand(len(self.hidden_SD), -1)

    def logits(self) -> Tensor:
        """The teacher's logits at temperature 1, S by V, float32."""
        logits_SV = (self.hidden_SD.to(self.head_weight_VD) @ self.head_weight_VD.T).float() * self.logit_scale
        return logits_SV if self.softcap is None else self.softcap * torch.tanh(logits_SV / self.softcap)

    def at(self, temperature: float) -> Sparse:
        """As `Distribution.at`: log-probabilities of all V ids at any temperature, and no mass outside."""
        logprobs_SV = torch.log_softmax(self.logits() / temperature, -1)
        return Sparse(self.ids_SK, logprobs_SV, logprobs_SV.new_full((len(logprobs_SV),), -torch.inf))


@dataclass(frozen=True)
class Hidden:
    """The last hidden state as int8: 1.03 D bytes a token, every temperature, and the head to be loaded.

    A step for each 128 dimensions, not for the row: a few dimensions of a trained LLM are many times the others.
    """

    name: ClassVar[str] = "hidden"
    reads: ClassVar[str] = "hidden"

    def capture(self, hidden_SD: Tensor, vocab_size: int) -> dict[str, Tensor]:
        """What `encode` needs of the head's input and its number of rows."""
        return {"hidden_SD": hidden_SD.float(), "vocab_size": torch.tensor(vocab_size)}

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        num_positions, width = captured["hidden_SD"].shape
        group = math.gcd(width, GROUP)
        quantized, scale = quantize_rows(captured["hidden_SD"].reshape(-1, group))
        header = pack_header(self.name, num_positions, int(captured["vocab_size"]), width, group)
        return b"".join([header, scale.astype("<f4").tobytes(), quantized.tobytes()])

    @staticmethod
    def read(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> HiddenStates:
        """What `decode` calls after the headers."""
        width, group = (int(value) for value in parameters)
        scale = reader.take("<f4", [size * width // group for size in sizes])
        quantized = reader.take("i1", [size * width for size in sizes]).reshape(-1, group)
        hidden_SD = dequantize_rows(quantized, scale).reshape(-1, width)
        return HiddenStates(torch.from_numpy(hidden_SD), vocab_size)


@dataclass(frozen=True)
class Dense:
    """All V log-probabilities in float16: for tests and for measuring the others."""

    name: ClassVar[str] = "dense"
    reads: ClassVar[str] = "logits"

    def capture(self, logits_SV: Tensor) -> dict[str, Tensor]:
        """What `encode` needs, computed where the logits are."""
        return {"logprobs_SV": torch.log_softmax(logits_SV.float(), -1)}

    def encode(self, captured: dict[str, np.ndarray]) -> bytes:
        """Bytes of what `capture` returned, as numpy arrays."""
        num_positions, vocab_size = captured["logprobs_SV"].shape
        return pack_header(self.name, num_positions, vocab_size) + captured["logprobs_SV"].astype("<f2").tobytes()

    @staticmethod
    def read(reader: Reader, sizes: Sequence[int], vocab_size: int, parameters: Sequence[float]) -> Distribution:
        """What `decode` calls after the headers."""
        values_SV = reader.take("<f2", [size * vocab_size for size in sizes]).reshape(-1, vocab_size)
        return Distribution.from_logits(torch.from_numpy(values_SV.astype(np.float32)))


CODECS = {"topk": TopK, "adaptive": Adaptive, "sampled": Sampled, "hidden": Hidden, "dense": Dense}
Codec = TopK | Adaptive | Sampled | Hidden | Dense


def describe_codec(codec: Codec) -> dict:
    """Name, version and parameters: the codec's part of a cache's identity."""
    return {"name": codec.name, "version": VERSION, **asdict(codec)}


def decode(*payloads: bytes) -> Distribution | HiddenStates:
    """Read payloads of any codec, one after the other's positions, into CPU tensors.

    Raises:
        ValueError: a payload is not one, is of an unknown codec or version, or is cut.
    """
    headers = [read_header(payload) for payload in payloads]
    first = headers[0]
    if first.name not in CODECS:
        raise ValueError(
            f"codec is {first.name!r}, but this program knows {', '.join(CODECS)}; cache this sample again."
        )
    if any(header.layout != first.layout for header in headers):
        decoded = [decode(payload) for payload in payloads]
        return type(decoded[0]).concatenate(decoded)
    reader = Reader(payloads, [header.size for header in headers])
    sizes = [header.num_positions for header in headers]
    decoded = CODECS[first.name].read(reader, sizes, first.vocab_size, first.parameters)
    reader.finish()
    return decoded
