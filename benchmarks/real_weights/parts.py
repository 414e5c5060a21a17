"""Makes `llm` and `whisper`, folders of transformers, from the packages' files, and proves each by what it does."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import jiwer
import torch
from llama_from_gguf import convert_gguf
from packages import SMOLLM2, WHISPER_CONFIG, WHISPER_HALVES, WHISPER_TOKENIZER, find
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration
from whisper_from_ctranslate2 import convert_ctranslate2

from distill.evaluation.metrics.normalization import normalize_text
from shards.audio.decode import load_audio
from shards.manifests.manifest import read_manifest

TEXT = (
    "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius at sea level. "
    "Plants use sunlight, water and carbon dioxide to make sugar, and they give off oxygen as they do so."
)
QUESTION = "What is the capital of France?"
MOST_WER, MOST_PERPLEXITY = 0.07, 20.0  # of Whisper base on read English; of SmolLM2 135M on plain sentences
BATCH_SIZE = 8  # clips that Whisper reads at once


def make_parts(folder: Path) -> tuple[Path, Path]:
    """The folders of SmolLM2-135M-Instruct and Whisper base; what is there is used again."""
    llm, whisper = folder / "smollm2-135m", folder / "whisper-base"
    if not (llm / "config.json").is_file():
        convert_gguf(find(SMOLLM2), llm)
    if not (whisper / "config.json").is_file():
        data = b"".join(find(half).read_bytes() for half in WHISPER_HALVES)
        convert_ctranslate2(data, find(WHISPER_TOKENIZER), json.loads(find(WHISPER_CONFIG).read_text()), whisper)
    return llm, whisper


@torch.no_grad()
def read_with_llm(folder: Path) -> tuple[float, str]:
    """A LLM's perplexity on plain sentences, and its answer to a question in its own chat form."""
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids_BT = tokenizer(TEXT, return_tensors="pt").input_ids
    perplexity = math.exp(llm(input_ids=ids_BT, labels=ids_BT).loss)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said_BT = llm.generate(**asked, max_new_tokens=24, do_sample=False)
    return perplexity, tokenizer.decode(said_BT[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def transcribe_with_whisper(folder: Path, paths: Sequence[Path]) -> list[str]:
    """What a Whisper hears in recordings of at most 30 s, greedy."""
    whisper = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, features = AutoTokenizer.from_pretrained(folder), WhisperFeatureExtractor.from_pretrained(folder)
    texts = []
    for start in range(0, len(paths), BATCH_SIZE):
        waveforms = [load_audio([path]) for path in paths[start : start + BATCH_SIZE]]
        mel_BMX = features(waveforms, sampling_rate=16_000, return_tensors="pt").input_features
        ids_BT = whisper.generate(mel_BMX, language="en", task="transcribe", max_new_tokens=120)
        texts += tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
    return [text.strip() for text in texts]


def prove_parts(llm: Path, whisper: Path, manifest: Path, num_clips: int) -> dict:
    """What shows that both converters kept the model.

    Args:
        llm, whisper: folders.
        manifest: of read English.
        num_clips: of it that Whisper reads, evenly spread.

    Raises:
        ValueError: one of them is worse than the model that it was made from.
    """
    perplexity, answer = read_with_llm(llm)
    entries = list(read_manifest(manifest))
    chosen = entries[:: max(1, len(entries) // num_clips)][:num_clips]
    heard = transcribe_with_whisper(whisper, [entry.path for entry in chosen])
    said = [normalize_text(entry.text or "", english=True) for entry in chosen]
    wer = float(jiwer.process_words(said, [normalize_text(text, english=True) for text in heard]).wer)
    for name, value, most in (
        ("WER of Whisper", wer, MOST_WER),
        ("perplexity of SmolLM2", perplexity, MOST_PERPLEXITY),
    ):
        if not value <= most:
            raise ValueError(f"{name} is {value:.3g}, but the original has at most {most:g}; convert it anew.")
    return {"perplexity": perplexity, "question": QUESTION, "answer": answer, "wer": wer, "clips": len(chosen)}
