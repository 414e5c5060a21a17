"""Bytes, speed and gradient error of every target codec, at the vocabularies of Llama 3 and Qwen 2.5.

The teacher is synthetic and peaked: every other position nearly certain, the others Zipf with an exponent from 1.5 to
2.5 over all V ids, which are at random places in the vocabulary, so that nothing is there for a compressor to find.
The student is the teacher with logits times 0.9 and noise of 0.5. Errors are of the gradient of the forward KL with
respect to the student's logits, over all positions together, against the dense teacher's. One thread, processor time,
codecs taken in turn, medians; the top-k over V belongs to the teacher's device and is not in the encoding time.

S positions, V vocabulary, K kept ids, D width.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import numpy as np
import torch
import zstandard
from codecs_teacher import make_hidden, make_teacher, measure_error
from record import write_result
from torch import Tensor

from distill.caching.fidelity import kl_gradient, noisy_probs
from shards.targets.codecs.adaptive import Adaptive
from shards.targets.codecs.codec import Codec
from shards.targets.codecs.dense import Dense
from shards.targets.codecs.hidden import Hidden
from shards.targets.codecs.sampled import Sampled
from shards.targets.codecs.table import decode
from shards.targets.codecs.topk import TopK
from shards.targets.distributions import Distribution

VOCABS = {"Llama 3": 128_256, "Qwen 2.5": 151_936}
NUM_POSITIONS, TILE, NUM_DENSE = 512, 32, 64
BLOCK, ANSWER = 2 * NUM_POSITIONS, 40  # positions encoded at once: a good block, and one answer
BATCH = 32  # answers decoded at once, as a training step does
ROUNDS = 31
NUM_DRAWS, NUM_DRAWN = 1000, 8
CODECS = [
    TopK(k=32),
    TopK(k=64),
    TopK(k=64, head=8),
    TopK(k=64, head=8, tail_bits=8),
    TopK(k=128),
    Adaptive(threshold=1e-3),
    Adaptive(),
    Adaptive(max_k=96, tail_bits=7),
    Adaptive(max_k=128),
    Adaptive(threshold=1e-4, max_k=128),
    Sampled(draws=50),
    Sampled(draws=50, exponent=0.8),
]
# Other formats as measured earlier for this project, same kind of teacher, V = 128,256; not run here.
DISTILLKIT_RATES = "36,000 to 97,000"  # of the three formats
QUOTED = [
    ("DistillKit, recommended (k = 128)", 328, DISTILLKIT_RATES, 0.0138),
    ("DistillKit, k = 64", 192, DISTILLKIT_RATES, 0.0049),
    ("DistillKit, budget", 121, DISTILLKIT_RATES, 0.303),
    ("Megatron, k = 64, float16, a member a sample", 265, "36,000", 0.0036),
    ("npz, int32 + float16, k = 64", 396, "143,000", 0.0036),
    ("17-bit id planes, 8-bit log-probabilities, zstd, k = 64", 188, "395,000", 0.0036),
    ("the same, adaptive (p >= 3e-4)", 90.5, "336,000", 0.0043),
]


def to_host(captured: dict[str, Tensor]) -> dict:
    return {name: tensor.numpy() for name, tensor in captured.items()}


def cut(captured: dict, start: int, count: int) -> dict:
    """Some of the captured positions."""
    return {name: array[start : start + count] if array.ndim else array for name, array in captured.items()}


def measure_size(codec: Codec, captured: dict) -> dict[str, float]:
    """Bytes a token in a block and in answers, and what a compressor would leave of them."""
    payload = codec.encode(captured)
    answers = [codec.encode(cut(captured, start, ANSWER)) for start in range(0, NUM_POSITIONS - ANSWER + 1, ANSWER)]
    compress = zstandard.ZstdCompressor(3).compress
    return {
        "bytes_per_token": len(payload) / NUM_POSITIONS,
        "bytes_per_token_answer": statistics.mean(map(len, answers)) / ANSWER,
        "zstd_ratio": len(compress(payload)) / len(payload),
        "zstd_ratio_answer": len(compress(answers[0])) / len(answers[0]),
    }


def measure_speed(captured: list[tuple[Codec, dict]]) -> list[dict[str, float]]:
    """Encoding and decoding rates, in blocks and in answers; all codecs in every round."""
    work: list[dict[str, Callable]] = []
    for codec, arrays in captured:
        block = {name: np.concatenate([array, array]) if array.ndim else array for name, array in arrays.items()}
        answer = cut(arrays, 0, ANSWER)
        batch = [codec.encode(cut(arrays, 15 * number, ANSWER)) for number in range(BATCH)]
        work.append(
            {
                "encode_tokens_per_second": partial(codec.encode, block),
                "decode_tokens_per_second": partial(decode, codec.encode(block)),
                "encode_tokens_per_second_answer": partial(codec.encode, answer),
                "decode_tokens_per_second_answer": partial(decode, codec.encode(answer)),
                "decode_tokens_per_second_batch": partial(decode, *batch),
            }
        )
    seconds = [{name: [] for name in calls} for calls in work]
    for _ in range(ROUNDS):
        for calls, measured in zip(work, seconds):
            for name, call in calls.items():
                repeats = 10 if name.endswith("answer") else 2
                start = time.process_time()
                for _ in range(repeats):
                    call()
                measured[name].append((time.process_time() - start) / repeats)
    return [rates(measured) for measured in seconds]


def rates(measured: dict[str, list[float]]) -> dict[str, float]:
    """Tokens a second from the median of the rounds, and from the best: a busy machine slows all but that."""
    result = {}
    for name, times in measured.items():
        count = {"answer": ANSWER, "batch": BATCH * ANSWER}.get(name.rpartition("_")[2], BLOCK)
        result |= {name: count / statistics.median(times), f"best_{name}": count / min(times)}
    return result


def measure_sampling(codec: Sampled, logprobs_SV: Tensor, student_SV: Tensor) -> dict[str, float]:
    """Is the mean over many draws the dense gradient, to within the error of a mean; and how far off is one draw?"""
    generator = torch.Generator().manual_seed(2)
    bias = expected = variance = norm = 0.0
    for logprobs_V, student_V in zip(logprobs_SV, student_SV):
        total_V = torch.zeros_like(student_V, dtype=torch.double)
        square = 0.0
        dense_V = student_V.double() - logprobs_V.double().exp()
        for _ in range(NUM_DRAWS // 50):
            drawn = decode(codec.encode(to_host(codec.capture(logprobs_V.expand(50, -1), generator=generator))))
            gradient_SV = kl_gradient(drawn, student_V.expand(50, -1))
            total_V += gradient_SV.sum(0)
            square += (gradient_SV - dense_V).square().sum().item()
        bias += (total_V / NUM_DRAWS - dense_V).square().sum().item()
        expected += square / NUM_DRAWS**2
        variance += square / NUM_DRAWS
        norm += dense_V.square().sum().item()
    return {
        "gradient_error": math.sqrt(variance / norm),
        "gradient_variance": variance / len(logprobs_SV),
        "bias_over_error_of_mean": math.sqrt(bias / expected),
        "mean_gradient_error": math.sqrt(bias / norm),
        "draws_averaged": NUM_DRAWS,
    }


def name_codec(codec: Codec) -> str:
    defaults = type(codec)()
    changed = [
        f"{n}={getattr(codec, n)}" for n in codec.__dataclass_fields__ if getattr(codec, n) != getattr(defaults, n)
    ]
    return f"{codec.name}({', '.join(changed)})"


def describe(codec: Codec, vocab_size: int) -> dict:
    kept = {"topk": "k", "adaptive": "max_k", "sampled": "draws"}
    k = getattr(codec, kept[codec.name]) if codec.name in kept else vocab_size
    return {"codec": name_codec(codec), "k": k, "vocab_size": vocab_size}


def measure_vocabulary(vocab_size: int) -> tuple[list[dict], list[tuple[Codec, dict]], list[dict]]:
    """A record per codec, what it encodes, and the records of the codecs that are timed apart."""
    logprobs_SV = make_teacher(vocab_size, NUM_POSITIONS)
    student_SV = noisy_probs(logprobs_SV)
    captured, records = [], []
    for codec in CODECS:
        start = time.process_time()
        arrays = to_host(codec.capture(logprobs_SV))
        rate = NUM_POSITIONS / (time.process_time() - start)
        captured.append((codec, arrays))
        pieces = (
            (decode(codec.encode(cut(arrays, t, TILE))), logprobs_SV[t : t + TILE], student_SV[t : t + TILE])
            for t in range(0, NUM_POSITIONS, TILE)
        )
        records.append(describe(codec, vocab_size) | measure_error(pieces) | {"capture_tokens_per_second_cpu": rate})
        if isinstance(codec, Sampled):
            records[-1] |= measure_sampling(codec, logprobs_SV[:NUM_DRAWN], student_SV[:NUM_DRAWN])
    records = [record | measure_size(*work) for record, work in zip(records, captured)]
    return records, captured, [measure_dense(logprobs_SV, student_SV), measure_hidden(vocab_size)]


def measure_all() -> list[dict]:
    """Every record, vocabulary by vocabulary; all are timed in the same rounds, as a machine has slow minutes."""
    measured = [measure_vocabulary(vocab_size) for vocab_size in VOCABS.values()]
    speeds = iter(measure_speed([work for _, captured, _ in measured for work in captured]))
    return [record for records, _, others in measured for record in (*(r | next(speeds) for r in records), *others)]


def measure_dense(logprobs_SV: Tensor, student_SV: Tensor) -> dict:
    """The float16 codec, on fewer positions."""
    codec, logprobs_SV, student_SV = Dense(), logprobs_SV[:NUM_DENSE], student_SV[:NUM_DENSE]
    arrays = to_host(codec.capture(logprobs_SV))
    payload, encode_seconds = time_call(lambda: codec.encode(arrays))
    decoded, decode_seconds = time_call(lambda: decode(payload))
    return (
        describe(codec, logprobs_SV.shape[1])
        | measure_error(iter([(decoded, logprobs_SV, student_SV)]))
        | {
            "bytes_per_token": len(payload) / NUM_DENSE,
            "encode_tokens_per_second": NUM_DENSE / encode_seconds,
            "decode_tokens_per_second": NUM_DENSE / decode_seconds,
        }
    )


def measure_hidden(vocab_size: int) -> dict:
    """The hidden-state codec, against the logits its own head makes of the exact hidden state."""
    codec, (hidden_SD, head_VD) = Hidden(), make_hidden(vocab_size, NUM_DENSE)
    arrays = to_host(codec.capture(torch.empty(len(hidden_SD), vocab_size, device="meta"), hidden_SD))
    payload, encode_seconds = time_call(lambda: codec.encode(arrays))
    decoded, decode_seconds = time_call(lambda: decode(payload))
    logprobs_SV = torch.log_softmax(hidden_SD @ head_VD.T, -1)
    distribution = Distribution.from_logits(decoded.with_head(head_VD).logits())
    piece = distribution, logprobs_SV, noisy_probs(logprobs_SV)
    return (
        describe(codec, vocab_size)
        | measure_error(iter([piece]))
        | {
            "bytes_per_token": len(payload) / NUM_DENSE,
            "encode_tokens_per_second": NUM_DENSE / encode_seconds,
            "decode_tokens_per_second": NUM_DENSE / decode_seconds,
        }
    )


def time_call(function: Callable):
    """What a function returns, and the median of its processor seconds."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def format_rate(row: dict, name: str) -> str:
    """Thousands of tokens a second: the median, the best round, one answer at a time, and a batch of answers."""
    names = (name, f"best_{name}", f"{name}_answer", f"{name}_batch")
    thousands = [row[key] / 1000 for key in names if key in row]
    return " / ".join(f"{rate:,.0f}k" if rate >= 10 else f"{rate:.1f}k" for rate in thousands)


def format_table(records: list[dict]) -> str:
    lines = [
        "| V | codec | bytes/token (block / 40-token answer) | gradient cosine | gradient error | KL to dense "
        "| encode tokens/s (median / best / one answer) | decode tokens/s (the same / 32 answers) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in records:
        size = f"{row['bytes_per_token']:,.1f}"
        size += f" / {row['bytes_per_token_answer']:,.1f}" if "bytes_per_token_answer" in row else ""
        encode, decoded = (format_rate(row, f"{step}_tokens_per_second") for step in ("encode", "decode"))
        lines.append(
            f"| {row['vocab_size']:,} | {row['codec']} | {size} | {row['gradient_cosine']:.6f} "
            f"| {row['gradient_error']:.4f} | {row['kl_to_dense']:.1e} | {encode} | {decoded} |"
        )
    lines += ["", "Quoted, not run here (measured earlier on the same kind of teacher, V = 128,256):", ""]
    lines += ["| format | bytes/token | decode tokens/s | gradient error |", "|---|---|---|---|"]
    lines += [f"| {name} | {size} | {rate} | {error} |" for name, size, rate, error in QUOTED]
    for row in records:
        if "draws_averaged" in row:
            lines.append(
                f"\n{row['codec']}, V = {row['vocab_size']:,}: the mean of {row['draws_averaged']:,} draws is off by "
                f"{row['bias_over_error_of_mean']:.2f} times the error of a mean (1 if unbiased), "
                f"{row['mean_gradient_error']:.3f} of the gradient; one draw's variance {row['gradient_variance']:.2e}."
            )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    records = measure_all()
    names = ("codec", "bytes_per_token", "decode_tokens_per_second", "gradient_error")
    figures = {
        "codecs": records,
        "quoted": [dict(zip(names, row)) for row in QUOTED],
        "definitions": __doc__,
        "block_tokens": BLOCK,
        "answer_tokens": ANSWER,
    }
    write_result("codecs", figures, format_table(records))


if __name__ == "__main__":
    main()
