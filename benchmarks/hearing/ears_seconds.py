"""What it costs and what it spares to cut Whisper to the clip: WER of students, of a Whisper alone, and seconds.

On real spoken digits and on the demo, one student for each length. That of the digits is trained on the labels of
every clip behind the same frozen ears, whose pre-training heard clips padded to 4.3 s, so that only the connector and
LoRA can learn what a cut ear gives; that of the demo as its recipe says. On read English a released Whisper alone, by
its own decoder, which has learned no such frames. Times are of encoders with random weights, one clip at a time. The
parts are those that `benchmarks/fsdd.py`, `distill teach configs/demo.yaml` and `benchmarks/real_weights parts` make
first: `python benchmarks/hearing/ears_seconds.py [key=value …] [--only digits demo english times] [--lengths …]`. What
`--only` leaves out keeps its figures; students made before are used again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `record`

import jiwer
import torch
from digits.fsdd_students import CONFIG, score_wer
from record import RESULTS, write_result
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from distill.config import Config, LossConfig, load_config
from distill.demo.scratch import teacher_config
from distill.distiller import Distiller, Run
from distill.evaluation.evaluate import evaluate_run
from distill.evaluation.metrics.normalization import normalize_text
from distill.evaluation.scorecard import read_scorecard
from distill.pipeline import launch_stage
from distill.sizes.costs import model_config
from shards.audio.decode import load_audio
from shards.manifests.manifest import read_manifest
from shards.sample import SAMPLE_RATE
from students.hearing import Connector, Hearing
from students.student import build_student
from teachers.ears.frontend import FRAME_SAMPLES
from teachers.ears.whisper import WhisperEar
from teachers.files.loading import build_salmonn

LENGTHS = {"30": None, "clip": 0.0, "clip+1": 1.0, "clip+3": 3.0}  # and the seconds behind the clip
PARTS = {"digits": "WER % on fsdd", "demo": "on the demo", "english": "on read English, Whisper base alone"}
MODELS = ("openai/whisper-base", "openai/whisper-large-v2")
DEMO, ENGLISH, WHISPER = "configs/demo.yaml", "../shared/data/kathleen/test.json", "runs/real/parts/whisper-base"
RUNS = 3  # of a timed encoder, the fastest of which counts


def train_and_score(ears_seconds: str, config: Config, scratch: Path) -> float:
    """The test WER of a student whose ears are cut so."""
    torch.manual_seed(0)
    base = build_salmonn(teacher_config(config.scratch, scratch))
    student = build_student(base, str(scratch / "student-llm"), hearing=Hearing(ears_seconds=ears_seconds),
                            connector=Connector("new"), quantization="none", seed=config.seed)  # fmt: skip
    loss = LossConfig(kl=0.0, feature=0.0)
    name = ears_seconds.replace("+", "-plus-")
    run = Run(Path(config.runs) / f"fsdd-seconds-{name}-{config.train.steps}", config.seed, config.precision)
    Distiller(None, student, train=config.shards("train"), loss=loss, options=config.train, answers=config.eval,
              run=run).fit()  # fmt: skip
    return score_wer(student.eval(), config)


def train_demo(ears_seconds: str, words: list[str]) -> float:
    """The transcript's WER of a student of the demo whose ears are cut so; its teacher was made."""
    scratch = load_config(DEMO).run_folder / "scratch"
    changes = [f"name=demo-seconds-{ears_seconds.replace('+', '-plus-')}", f"student.ears_seconds={ears_seconds}",
               f"teacher.path={scratch}/teacher", f"student.llm={scratch}/student-llm", "eval.device=false",
               f"cache.folder=data/demo/cache-{ears_seconds}", *words]  # fmt: skip
    for stage in ("distill.cache", "distill.run"):
        launch_stage(stage, DEMO, changes, None)
    config = load_config(DEMO, changes)
    evaluate_run(config)
    return read_scorecard(config.run_folder).student.scores["asr"].value


@torch.no_grad()
def read_english(padding: float | None, num_clips: int) -> float:
    """The WER of a released Whisper by its own decoder, on clips with `padding` behind them; None: up to 30 s."""
    entries = list(read_manifest(Path(ENGLISH)))
    entries = entries[:: max(1, len(entries) // num_clips)][:num_clips]
    whisper = WhisperForConditionalGeneration.from_pretrained(WHISPER, dtype=torch.float32).eval()
    ear, tokenizer = WhisperEar(whisper.model.encoder), AutoTokenizer.from_pretrained(WHISPER)
    features, texts = WhisperFeatureExtractor.from_pretrained(WHISPER), []
    for entry in entries:
        waveform_N = load_audio([entry.path])
        mel_BMX = features(waveform_N, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        heard = BaseModelOutput(
            last_hidden_state=ear.encode(mel_BMX, num_frames(len(waveform_N) / SAMPLE_RATE, padding))
        )
        ids_BT = whisper.generate(encoder_outputs=heard, language="en", task="transcribe", max_new_tokens=120)
        texts.append(normalize_text(tokenizer.decode(ids_BT[0], skip_special_tokens=True), english=True))
    said = [normalize_text(entry.text or "", english=True) for entry in entries]
    return float(jiwer.process_words(said, texts).wer)


def num_frames(seconds: float, padding: float | None) -> list[int] | None:
    """The frames that a clip is cut to; None: it is not."""
    return None if padding is None else [min(1500, round((seconds + padding) * SAMPLE_RATE) // FRAME_SAMPLES)]


@torch.no_grad()
def time_encoder(name: str, seconds: float, padding: float | None) -> float:
    """Processor seconds that a Whisper of this size takes for one clip; `padding` behind it, or None: up to 30 s.

    They are this process's own, so that other work on the machine counts little.
    """
    sizes = model_config(name).to_dict()
    ear = WhisperEar.from_config(WhisperConfig(**sizes)).requires_grad_(False)
    mel_BMX = torch.randn(1, ear.log_mel.num_mels, ear.log_mel.num_frames)
    found = []
    for _ in range(RUNS):
        began = time.process_time()
        ear.encode(mel_BMX, num_frames(seconds, padding))
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    """Measure what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=[*PARTS, "times"], choices=[*PARTS, "times"], help="to measure")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the clip that encoders are timed on")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="that are timed")
    parser.add_argument("--clips", type=int, default=48, help="of read English (%(default)s)")
    parser.add_argument("--lengths", nargs="*", default=list(LENGTHS), choices=LENGTHS, help="that are measured")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(CONFIG, args.words)
    scratch = load_config(CONFIG).run_folder / "scratch"
    figures = json.loads((RESULTS / "ears_seconds.json").read_text())
    for length in args.lengths:
        padding = LENGTHS[length]
        measures = {
            "digits": lambda length=length: train_and_score(length, config, scratch),
            "demo": lambda length=length: train_demo(length, args.words),
            "english": lambda padding=padding: read_english(padding, args.clips),
        }
        for part in PARTS:
            if part in args.only:
                figures.setdefault("wer", {}).setdefault(part, {})[length] = measures[part]()
                print(f"{part}, {length}: WER {figures['wer'][part][length]:.4f}", flush=True)
    if "times" in args.only:
        figures |= {"clip_seconds": args.seconds, "threads": torch.get_num_threads()}
        figures["encoder_seconds"] = {
            name: {length: time_encoder(name, args.seconds, padding) for length, padding in LENGTHS.items()}
            for name in args.models
        }
    figures["steps"] = config.train.steps
    write_result("ears_seconds", figures, make_table(figures))


def make_table(figures: dict) -> str:
    """Markdown: a row a length."""
    times, wers = figures["encoder_seconds"], figures["wer"]
    names = [name.rpartition("/")[2] for name in times]
    titles = [*PARTS.values(), *(f"{name}, processor s a clip" for name in names)]
    lines = ["| Whisper hears | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for length in LENGTHS:
        cells = [f"{100 * wers[part][length]:.1f}" if length in wers.get(part, {}) else "" for part in PARTS]
        cells += [f"{found[length]:.2f}" for found in times.values()]
        lines.append(f"| {'all it takes' if length == '30' else length} | " + " | ".join(cells) + " |")
    threads = f"{figures['threads']} thread{'s' * (figures['threads'] != 1)}"
    return "\n".join([*lines, "", f"One seed, {figures['steps']} steps on the digits and the demo's own; the encoders' "
                      f"clip lasts {figures['clip_seconds']:g} s, {threads}."])  # fmt: skip


if __name__ == "__main__":
    main()
