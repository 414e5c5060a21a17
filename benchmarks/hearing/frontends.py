"""Front ends and encoders against the original path, on the same clips in the same run.

Original: transformers' `WhisperFeatureExtractor` and torchaudio's Kaldi fbank, clip after clip, as SALMONN's data set
calls them; BEATs' attention with its scores and weights as tensors of their own. Process CPU time, one thread, the
paths taken in turn, medians. With a GPU, also the throughput of front ends and encoders there.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import torch
import torchaudio.compliance.kaldi as kaldi
from record import write_result
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperFeatureExtractor

from shards.sample import SAMPLE_RATE
from teachers.ears.beats import BEATS_FBANK, BeatsConfig, BeatsEar, GatedAttention
from teachers.ears.eat import EatConfig, EatEar
from teachers.ears.frontend import WhisperLogMel
from teachers.ears.one_frontend import OneFrontEnd, measure_approximation
from teachers.ears.whisper import WhisperEar

NUM_MELS = 128
LARGE_V3 = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": NUM_MELS,
}


class MaterialisedAttention(GatedAttention):
    """BEATs' attention as its authors wrote it, every step a tensor of its own."""

    def forward(self, frames_BRE: Tensor, bias_HRR: Tensor, is_padding_BR: Tensor) -> Tensor:
        query, key, value = (
            project(frames_BRE).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (query * query.shape[-1] ** -0.5 / 32) @ key.transpose(2, 3)
        scores = (scores - scores.max(dim=-1, keepdim=True)[0]) * 32
        scores = scores.masked_fill(is_padding_BR[:, None, None], -torch.inf)
        weights = (scores + self.gate(query) * bias_HRR).softmax(-1)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))


def synthesize_clips(seconds: list[float]) -> list[Tensor]:
    """Tones that come and go over noise, float32 in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    clips = []
    for number, length in enumerate(seconds):
        time_N = torch.arange(int(length * SAMPLE_RATE)) / SAMPLE_RATE
        tone_N = torch.sin(2 * torch.pi * (150 + 40 * number) * time_N) * torch.sin(3 * time_N).abs()
        clips.append(0.3 * tone_N + 0.02 * torch.randn(len(time_N), generator=generator))
    return clips


def time_in_turn(paths: dict, repetitions: int) -> dict[str, float]:
    """Median process CPU seconds of each path; one unmeasured turn first."""
    seconds = {name: [] for name in paths}
    for turn in range(repetitions + 1):
        for name, path in paths.items():
            start = time.process_time()
            path()
            if turn > 0:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def original_features(clips: list[Tensor], extractor: WhisperFeatureExtractor) -> tuple[list[Tensor], list[Tensor]]:
    """What the original data set and BEATs compute, clip after clip."""
    whisper = [
        extractor(clip.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"] for clip in clips
    ]
    fbank = [kaldi.fbank(clip[None] * 2**15, num_mel_bins=128, frame_length=25, frame_shift=10) for clip in clips]
    return whisper, [(mel - BEATS_FBANK.mean) / BEATS_FBANK.std for mel in fbank]


def measure_front_ends(seconds: list[float], repetitions: int) -> dict:
    """Clips a CPU second of each path, and how far ours is from the original's features."""
    clips = synthesize_clips(seconds)
    waveforms_BN, num_samples_B = pad_sequence(clips, batch_first=True), torch.tensor([len(clip) for clip in clips])
    extractor = WhisperFeatureExtractor(NUM_MELS)
    whisper = WhisperLogMel(NUM_MELS, 3000)
    ours, shared = OneFrontEnd(whisper), OneFrontEnd(whisper, approximate=True)
    times = time_in_turn(
        {
            "original": lambda: original_features(clips, extractor),
            "ours, batched": lambda: ours(waveforms_BN, num_samples_B),
            "ours, one clip a call": lambda: [ours(clip[None], torch.tensor([len(clip)])) for clip in clips],
            "ours, one approximate spectrum": lambda: shared(waveforms_BN, num_samples_B),
            "Whisper log-mel alone": lambda: whisper(waveforms_BN, num_samples_B),
            "BEATs fbank alone": lambda: BEATS_FBANK(waveforms_BN, num_samples_B),
        },
        repetitions,
    )
    expected_whisper, expected_fbank = original_features(clips, extractor)
    whisper_mel, fbank_mel, _ = ours(waveforms_BN, num_samples_B)
    return {
        "clip_seconds": seconds,
        "clips_per_cpu_second": {name: len(clips) / value for name, value in times.items()},
        "ratio": times["original"] / times["ours, batched"],
        "whisper_max_error": float((whisper_mel - torch.cat(expected_whisper)).abs().max()),
        "fbank_max_error": max(
            float((row[: len(mel)] - mel).abs().max()) for row, mel in zip(fbank_mel, expected_fbank)
        ),
    }


@torch.no_grad()
def measure_beats_attention(seconds: float, repetitions: int) -> dict:
    """CPU seconds of BEATs at its official size with one attention call and with materialized scores."""
    torch.manual_seed(0)
    ear = BeatsEar.from_config(BeatsConfig())
    waveforms_BN = synthesize_clips([seconds])[0][None]
    num_samples_B = torch.tensor([waveforms_BN.shape[1]])

    def hear_with(attention: type[nn.Module]) -> Tensor:
        for layer in ear.encoder.layers:
            layer.self_attn.__class__ = attention
        return ear(waveforms_BN, num_samples_B)[0]

    paths = {
        "materialized": lambda: hear_with(MaterialisedAttention),
        "one call": lambda: hear_with(GatedAttention),
    }
    times = time_in_turn(paths, repetitions)
    expected = paths["materialized"]()
    error = float((paths["one call"]() - expected).norm() / expected.norm())
    ratio = times["materialized"] / times["one call"]
    return {"clip_seconds": seconds, "cpu_seconds": times, "ratio": ratio, "relative_error": error}


def measure_approximate_effect() -> dict:
    """What the shared spectrum does to BEATs of the official size; its weights are random, a trained one differs."""
    torch.manual_seed(0)
    clips = synthesize_clips([10.0])
    ear = BeatsEar.from_config(BeatsConfig())
    return measure_approximation(WhisperLogMel(NUM_MELS, 3000), ear, torch.stack(clips), torch.tensor([len(clips[0])]))


@torch.no_grad()
def measure_gpu(batch_size: int = 32, repetitions: int = 10) -> dict:
    """Clips of 10 s a second on the GPU: front ends in float32, encoders of the official sizes in bfloat16."""
    clips = synthesize_clips([10.0] * batch_size)
    waveforms_BN, num_samples_B = torch.stack(clips).cuda(), torch.tensor([len(clip) for clip in clips])
    on_device_B = num_samples_B.cuda()
    front_end = OneFrontEnd(WhisperLogMel(NUM_MELS, 3000))
    paths = {"both front ends": lambda: front_end(waveforms_BN, on_device_B)}
    for name, ear in {
        "Whisper large-v3 encoder": WhisperEar.from_config(LARGE_V3),
        "BEATs": BeatsEar.from_config(BeatsConfig()),
        "EAT-base": EatEar.from_config(EatConfig()),
    }.items():
        ear = ear.to("cuda", torch.bfloat16)
        paths[name] = lambda ear=ear: ear(waveforms_BN, num_samples_B)
    rates = {}
    for name, path in paths.items():
        for _ in range(3):
            path()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repetitions):
            path()
        torch.cuda.synchronize()
        rates[name] = batch_size * repetitions / (time.perf_counter() - start)
    return {"batch_size": batch_size, "clip_seconds": 10.0, "clips_per_second": rates}


def write_table(figures: dict) -> str:
    """The figures in Markdown."""
    mixed = figures["mixed_lengths"]
    rows = [
        f"| {name} | {rate:.0f} | {mixed['clips_per_cpu_second'][name]:.0f} |"
        for name, rate in figures["clips_per_cpu_second"].items()
    ]
    attention = [
        f"| BEATs, {case['clip_seconds']:.0f} s | {case['cpu_seconds']['materialized']:.2f} | "
        f"{case['cpu_seconds']['one call']:.2f} | {case['ratio']:.2f} |"
        for case in figures["beats_attention"]
    ]
    lines = [
        "Clips a CPU second (one thread); the original is WhisperFeatureExtractor and torchaudio's fbank.",
        "",
        "| both front ends | clips of 10 s | clips of 2 to 28 s |",
        "|---|---|---|",
        *rows,
        f"| **ours, batched, to original** | **{figures['ratio']:.2f}×** | **{mixed['ratio']:.2f}×** |",
        "",
        "| CPU s | materialized scores | one attention call | ratio |",
        "|---|---|---|---|",
        *attention,
        "",
        "One approximate spectrum, errors: "
        + ", ".join(f"{name} {value:.3g}" for name, value in figures["approximate"].items())
        + " (random BEATs weights).",
    ]
    if "gpu" in figures:
        rates = figures["gpu"]["clips_per_second"].items()
        lines += [
            "",
            "On the GPU, 10 s clips a second: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates) + ".",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure everything and write `results/frontends.json`."""
    torch.set_num_threads(1)
    figures = measure_front_ends([10.0] * 8, repetitions=15)
    figures["mixed_lengths"] = measure_front_ends([2.0, 3.0, 5.0, 7.0, 9.0, 12.0, 16.0, 28.0], repetitions=15)
    figures["beats_attention"] = [measure_beats_attention(10.0, 5), measure_beats_attention(30.0, 3)]
    figures["approximate"] = measure_approximate_effect()
    if torch.cuda.is_available():
        figures["gpu"] = measure_gpu()
    write_result("frontends", figures, write_table(figures))


if __name__ == "__main__":
    main()
