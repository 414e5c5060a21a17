"""What the demo's teacher is made of, from nothing: tokenizer, ears and LLMs, pre-trained on the corpus.

A user with a SALMONN checkpoint, or with parts that are trained already, has no need of it.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperModel

from distill.config import Config, ScratchConfig, TrainConfig, fingerprint
from distill.demo.tokenizer import train_tokenizer
from distill.training.monitoring.progress import Progress
from distill.training.optimizer import group_by_decay, learning_rate
from distill.training.ranks import average_gradients_over_ranks_
from shards.files.write import open_atomically
from shards.jsonfile import ShapeError, read_object
from shards.manifests.manifest import read_manifest
from shards.sample import SAMPLE_RATE, Sample
from shards.status import print_status
from shards.streaming.catalog import open_catalog
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from teachers.ears.frontend import FRAME_SAMPLES
from teachers.ears.length import FULL, parse_ears_seconds
from teachers.ears.whisper import WhisperEar
from teachers.files.loading import build_salmonn
from teachers.salmonn import LEAST_SAMPLES, Salmonn, SalmonnConfig
from teachers.words.batch import pad_waveforms
from teachers.words.prompts import Prompts, load_prompts

PARTS, DONE = "parts.json", "teach.json"  # written when the parts, and when the teacher, are whole
HEARD_IN_ORDER = ("asr", "audiocaption_v2", "audiocaption")  # tasks whose answers follow their audio in time
HEARD_AT_ONCE = ("gender_recognition",)  # tasks whose answers are one thing about all of their audio


def completion_mark(config: Config) -> str:
    """Hash of the settings that make a teacher what it is."""
    return fingerprint([config.scratch, config.corpus, config.data.task_weights, config.data.bucket_batches,
                        config.seed, config.cache.frames])  # fmt: skip


def is_done(folder: Path, mark: str) -> bool:
    """Whether a teacher of these settings is there; one of other settings is an error.

    Raises:
        FileExistsError: the folder holds a teacher of other settings.
    """
    found = read_mark(folder / DONE)
    if found is None:
        return False
    if found != mark:
        raise FileExistsError(
            f"{folder} holds a teacher of settings {found[:12]}, but this config's are {mark[:12]}; "
            f"choose another name= or remove the folder."
        )
    return True


def has_parts(folder: Path, mark: str) -> bool:
    """Whether the parts of these settings are whole; unfinished work of others is of no use to them, and is said."""
    if read_mark(folder / PARTS) == mark:
        return True
    if folder.exists():
        print_status(f"teacher: {folder} is unfinished or of other settings, made anew")
    return False


def read_mark(path: Path) -> str | None:
    """Whose settings what lies beside the file is of; None where it was not finished, or the file is damaged."""
    try:
        return read_object(path, {"fingerprint": str})["fingerprint"]
    except (FileNotFoundError, ShapeError):
        return None


def write_mark(path: Path, mark: str) -> None:
    """Say whose settings what lies beside the file is of."""
    with open_atomically(path) as file:
        json.dump({"fingerprint": mark}, file)


def make_parts(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Tokenizer, Whisper-shaped ears pre-trained on the transcripts, and two LLMs pre-trained on the corpus' text."""
    prompts = load_prompts(None, SalmonnConfig("", "").template)
    texts = corpus_texts(config.manifest("train"), prompts)
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        pieces = [piece for text in texts for piece in text]
        train_tokenizer(pieces, folder / "tokenizer", vocab_size=config.scratch.vocab_size)
    accelerator.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(config.seed)
    whisper = build_whisper(config.scratch)
    pretrain_ears_(WhisperEar(whisper.encoder), tokenizer, config, accelerator)
    if accelerator.is_main_process:
        whisper.save_pretrained(folder / "whisper")
        make_llms(config.scratch, tokenizer, texts, folder)
        write_mark(folder / PARTS, completion_mark(config))
    accelerator.wait_for_everyone()


def make_llms(scratch: ScratchConfig, tokenizer, texts: Sequence[tuple[str, ...]], folder: Path) -> None:
    """The teacher's LLM and the one that its student starts from."""
    sizes = {
        "llm": (scratch.llm_width, scratch.llm_layers),
        "student-llm": (scratch.student_width, scratch.student_layers),
    }
    for name, (width, layers) in sizes.items():
        llm = build_llm(len(tokenizer), width, layers, tokenizer)
        pretrain_on_text_(llm, tokenizer, texts, scratch.text_steps, title=f"text {name}")
        llm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def corpus_texts(manifest: Path, prompts: Prompts) -> list[tuple[str, str, str]]:
    """Each sample as the LLM will read it, without the audio: what stands before it, after it, and the answer."""
    entries = enumerate(read_manifest(manifest))
    return [(*prompts.choose(e.task, str(row), e.question), e.text or "") for row, e in entries]


def build_whisper(scratch: ScratchConfig) -> WhisperModel:
    """Ears with random weights, as long as the corpus' longest clip."""
    return WhisperModel(
        WhisperConfig(
            num_mel_bins=80,
            d_model=scratch.ear_width,
            encoder_layers=scratch.ear_layers,
            encoder_attention_heads=scratch.ear_width // 32,
            encoder_ffn_dim=4 * scratch.ear_width,
            decoder_layers=1,
            init_std=scratch.ear_width**-0.5,
            decoder_attention_heads=1,
            decoder_ffn_dim=scratch.ear_width,
            max_source_positions=round(50 * scratch.seconds),
            vocab_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def build_llm(vocab_size: int, width: int, layers: int, tokenizer) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings."""
    return LlamaForCausalLM(LlamaConfig(**llm_fields(vocab_size, width, layers, tokenizer)))


def llm_fields(vocab_size: int, width: int, layers: int, tokenizer) -> dict:
    """What makes a transformers config of any Llama-like family a small LLM, heads of 32, embeddings tied."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "max_position_embeddings": 1024,
        "initializer_range": width**-0.5,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def pretrain_ears_(ear: WhisperEar, tokenizer, config: Config, accelerator: Accelerator | None = None) -> None:
    """What a real Whisper brings along, in place: CTC on the answers that follow their audio in time, and on those that
    say one thing about all of it the cross-entropy of their first token from the mean of the frames.

    Each of the accelerator's ranks does its part of a batch, and all end with the same ears.

    Source: Graves et al., "Connectionist temporal classification", ICML 2006.
    """
    scratch = config.scratch
    options = TrainConfig(steps=scratch.ear_steps, learning_rate=2e-3, warmup_steps=30)
    tasks = sorted({*HEARD_IN_ORDER, *HEARD_AT_ONCE} & set(open_catalog(config.shards("train")).tasks))
    rank, size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    stream = ShardStream(
        config.shards("train"),
        Order(batch_size=scratch.batch_size, seed=config.seed, bucket_batches=config.data.bucket_batches),
        Selection(tasks=tasks),
        rank=rank,
        world_size=size,
    )
    heads = nn.ModuleDict({name: nn.Linear(ear.width, len(tokenizer)) for name in ("order", "whole")})
    parameters = dict(ear.encoder.named_parameters()) | dict(heads.named_parameters())
    optimizer = torch.optim.AdamW(group_by_decay(parameters, 0.01), lr=0.0, betas=(0.9, 0.98), fused=True)
    with Progress("ears", options.steps, accelerator=accelerator) as progress:
        for step, samples in zip(range(options.steps), stream):
            loss = ear_loss(ear, heads, samples, tokenizer, scratch.ears_seconds)
            set_learning_rate_(optimizer, learning_rate(step, options))
            loss.backward()
            average_gradients_over_ranks_(accelerator, [p for p in parameters.values() if p.requires_grad])
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.advance(f"loss {loss.item():.3f}")


def ear_loss(
    ear: WhisperEar, heads: nn.ModuleDict, samples: Sequence[Sample], tokenizer, ears_seconds: str = FULL
) -> Tensor:
    """The sum of both losses of `pretrain_ears_`, each a mean over the samples that have it."""
    ids = [tokenizer.encode(sample.text, add_special_tokens=False) for sample in samples]
    waveforms_BN, num_samples_B = pad_waveforms([sample.waveform_N for sample in samples])
    heard_B = heard_frames(num_samples_B, ears_seconds, ear.max_samples)
    frames_BRE, num_frames_B = ear(waveforms_BN, num_samples_B, None, heard_B)
    at_once = torch.tensor([sample.task in HEARD_AT_ONCE for sample in samples])
    in_order = [row for row, is_whole in zip(ids, at_once.tolist()) if not is_whole]
    loss = frames_BRE.sum() * 0.0
    if in_order:
        logprobs_RBV = heads["order"](frames_BRE[~at_once]).log_softmax(-1).transpose(0, 1)
        labels, lengths = torch.tensor([i for row in in_order for i in row]), torch.tensor([len(r) for r in in_order])
        loss = loss + ctc_loss(
            logprobs_RBV, labels, num_frames_B[~at_once], lengths, blank=tokenizer.pad_token_id, zero_infinity=True
        )
    if at_once.any():
        is_frame_BR = torch.arange(frames_BRE.shape[1]) < num_frames_B[:, None]
        means_BE = (frames_BRE * is_frame_BR[..., None]).sum(1) / num_frames_B[:, None]
        first = torch.tensor([row[0] for row, is_whole in zip(ids, at_once.tolist()) if is_whole])
        loss = loss + cross_entropy(heads["whole"](means_BE[at_once]), first)
    return loss


def heard_frames(num_samples_B: Tensor, ears_seconds: str, max_samples: int) -> list[int] | None:
    """The frames that ears in training hear of each clip; None: all that they can take."""
    padding_seconds = parse_ears_seconds(ears_seconds)
    if padding_seconds is None:
        return None
    heard_B = (num_samples_B + round(padding_seconds * SAMPLE_RATE)).clamp(LEAST_SAMPLES, max_samples)
    return (-(-heard_B // FRAME_SAMPLES)).tolist()


def set_learning_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of an optimizer the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def pretrain_on_text_(llm: nn.Module, tokenizer, texts: Sequence[tuple[str, ...]], steps: int, title: str) -> None:
    """Next-token training on text alone, in place: what a real LLM brings along."""
    options = TrainConfig(steps=steps, learning_rate=3e-3, warmup_steps=20)
    optimizer = torch.optim.AdamW(group_by_decay(dict(llm.named_parameters()), 0.01), lr=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    with Progress(title, options.steps) as progress:
        for step in range(options.steps):
            picks = torch.randint(len(texts), (16,), generator=generator).tolist()
            ids = [[tokenizer.bos_token_id, *encode_pieces(tokenizer, texts[i]), tokenizer.eos_token_id] for i in picks]
            length = max(map(len, ids))
            labels = torch.tensor([row + [-100] * (length - len(row)) for row in ids])
            loss = llm(input_ids=labels.clamp(min=0), labels=labels).loss
            set_learning_rate_(optimizer, learning_rate(step, options))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.advance(f"loss {loss.item():.3f}")


def encode_pieces(tokenizer, pieces: Sequence[str]) -> list[int]:
    """Ids of texts that are tokenized apart, as `RowTokenizer` does."""
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


def build_teacher(config: Config, folder: Path) -> Salmonn:
    """The SALMONN of these parts, everything trainable but Whisper: where its frames are kept all of it is frozen, else
    its fixed positions. New weights are drawn anew: the same whether the parts were made just before, or found."""
    torch.manual_seed(config.seed)
    model = build_salmonn(teacher_config(config.scratch, folder))
    model.requires_grad_(True)
    frozen = model.whisper if config.cache.frames != "none" else model.whisper.encoder.embed_positions
    frozen.requires_grad_(False)
    return model


def teacher_config(scratch: ScratchConfig, folder: Path) -> SalmonnConfig:
    """What the teacher is made of."""
    return SalmonnConfig(
        llm=str(folder / "llm"),
        whisper=str(folder / "whisper"),
        window_seconds=scratch.window_seconds,
        stride_seconds=scratch.window_seconds,
        windows="audio",
        ears_seconds=scratch.ears_seconds,
        num_queries=scratch.num_queries,
        qformer_width=scratch.qformer_width,
        qformer_layers=scratch.qformer_layers,
        qformer_heads=scratch.qformer_width // 32,
        qformer_ffn=2 * scratch.qformer_width,
    )
