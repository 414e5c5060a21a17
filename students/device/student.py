"""Runs a folder exported for devices: recordings in, answers out, with numpy, OpenVINO and tokenizers alone.

Answers as the trained student does: the same features, windows, prompts, ends and search.

Shapes: B batch, T LLM positions, P positions so far, L audio tokens, N audio samples, W windows, R encoder frames,
E encoder width, M mel bins, X mel frames, D LLM width.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import openvino as ov

from shards.field_types import to_path
from shards.sample import SAMPLE_RATE, Sample
from students.asking import ASR, Listener
from students.device.folder import BANKS, EMBEDDINGS, GRAPHS, TOKENIZER, read_device
from students.device.frontend import HOP_SAMPLES, WINDOW_SAMPLES, Fbank, LogMel
from students.device.graph import Graph
from students.device.search import Search
from students.device.words import DeviceTokenizer
from teachers.words.ending import Ends, TextEnd, has_ended, read_answer
from teachers.words.prompts import Prompts
from teachers.words.rows import Row, RowTokenizer

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
PRODUCTS = ("exact", "fast")
ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"  # of the kernels that OpenVINO's products take
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def find_properties(products: str) -> dict[str, str]:
    """OpenVINO's properties for products: "exact", or "fast", as it chooses for the processor.

    It asks the processor alone whether there is bfloat16, and fails where its kernels may not use it: there "fast" is
    "exact".
    """
    is_limited = os.environ.get(ISA_LIMIT, "").upper() in WITHOUT_BF16
    return EXACT if products == "exact" or is_limited else {}


class DeviceStudent(Listener):
    """A student of a folder that `distill export --device` wrote.

    Args:
        folder: the folder.
        products: "exact": float32, as it was verified; "fast": as OpenVINO chooses for the processor (bfloat16 where it
            is quick, 8-bit activations); None: as the folder says.
        threads: the threads of the processor; 0: as many as OpenVINO chooses.
        check_files: compare every file with its hash.

    Raises:
        FileNotFoundError, ValueError: see `read_device`.
    """

    def __init__(self, folder: str | Path, *, products: str | None = None, threads: int = 0, check_files: bool = True):
        self.folder = to_path(folder)
        self.device = read_device(self.folder, check_files=check_files)
        products = products or self.device.precision["products"]
        if products not in PRODUCTS:
            raise ValueError(f"products is {products!r}, but must be one of {', '.join(PRODUCTS)}; choose one.")
        properties = find_properties(products) | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})
        core = ov.Core()
        self.graphs = {
            part: Graph(core, self.folder / name, properties)
            for part, name in GRAPHS.items()
            if (self.folder / name).is_file()
        }
        self.embeddings = np.load(self.folder / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        banks = np.load(self.folder / BANKS, allow_pickle=False)
        self.log_mel = LogMel(banks["whisper"], self.device.whisper["num_mel_frames"])
        second = self.device.second
        self.fbank = second and Fbank(banks["kaldi"], **second["fbank"])
        self.max_samples, self.min_samples = (self.device.audio[name] for name in ("max_samples", "min_samples"))
        self.rows = self._read_rows()

    def _read_rows(self) -> RowTokenizer:
        words = self.device.words
        self.tokenizer = DeviceTokenizer(self.folder / TOKENIZER, words["special"])
        return RowTokenizer(self.tokenizer, Prompts(**self.device.prompts), words["end_token"],
                            words["max_answer_tokens"], words["bos_token"])  # fmt: skip

    @cached_property
    def ends(self) -> Ends:
        """Everything that ends an answer: our own end, and the single ids that do."""
        own = TextEnd(self.tokenizer, self.rows.end) if self.rows.end.text else self.rows.end_ids
        return [own, *([token] for token in self.device.words["end_ids"])]

    # Hearing

    def num_heard(self, num_samples: int) -> int:
        """Audio samples that the ears hear of a clip of so many; silence follows a shorter one."""
        return max(num_samples, min(self.device.audio["least_samples"], self.max_samples))

    def num_second_frames(self, num_samples: int) -> int:
        """The second encoder's frames of so many audio samples."""
        second, mel_frames = self.device.second, max(0, (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1)
        steps = -(-mel_frames // second["patch"]) if second["rounds_up"] else mel_frames // second["patch"]
        return steps * second["bands"]

    def num_speech_frames(self, num_samples: int) -> int:
        """Whisper's frames of a clip: all it has, or up to the end of what it hears and of the clip's windows."""
        full, padding = self.device.whisper["num_frames"], self.device.audio["padding_seconds"]
        if padding is None:
            return full
        num_heard = self.num_heard(num_samples) + round(padding * SAMPLE_RATE)
        length, stride = (self.device.windows[name] for name in ("window_frames", "stride_frames"))
        end = (self.num_windows(num_samples) - 1) * stride + length if length else 0
        return min(full, max(-(-num_heard // self.device.audio["frame_samples"]), end))

    def num_frames(self, num_samples: int, num_speech: int) -> int:
        """Frames of a clip, those of the encoder that gives more; Whisper gives `num_speech`."""
        own = self.num_second_frames(self.num_heard(num_samples)) if self.device.second else 0
        return max(num_speech, own)

    def num_windows(self, num_samples: int) -> int:
        """Q-Former windows of a clip of so many audio samples."""
        windows, num_frames = self.device.windows, self.num_frames(num_samples, self.device.whisper["num_frames"])
        if not windows["window_frames"]:
            return 1
        fitting = (num_frames - windows["window_frames"]) // windows["stride_frames"] + 1
        if windows["which"] == "all":
            return fitting
        audio_frames = -(-self.num_heard(num_samples) // self.device.audio["frame_samples"])
        return max(1, min(-(-audio_frames // windows["stride_frames"]), fitting))

    def frames(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each encoder's frames_BRE of a batch of clips."""
        heard = [np.pad(x_N, (0, self.num_heard(len(x_N)) - len(x_N))) for x_N in waveforms]
        found = [self._hear_speech(waveforms, np.stack([self.log_mel(x_N) for x_N in heard]))]
        if self.fbank is not None:
            mels = [self.fbank(x_N) for x_N in heard]
            lengths_B = np.array([len(mel_XM) for mel_XM in mels], np.int64)
            mel_BXM = np.full((len(mels), lengths_B.max(), mels[0].shape[1]), self.fbank.silence, np.float32)
            for b, mel_XM in enumerate(mels):
                mel_BXM[b, : len(mel_XM)] = mel_XM
            found.append(self.graphs["second"].run({"mel": mel_BXM, "lengths": lengths_B}))
        return found

    def _hear_speech(self, waveforms: Sequence[np.ndarray], mel_BMX: np.ndarray) -> np.ndarray:
        """Whisper's frames of a batch; clips that are cut to their length are heard one by one, zeros behind them."""
        if self.device.audio["padding_seconds"] is None:
            return self.graphs["whisper"].run({"mel": mel_BMX})
        lengths = [self.num_speech_frames(len(x_N)) for x_N in waveforms]
        frames_BRE = np.zeros((len(lengths), max(lengths), self.device.whisper["width"]), np.float32)
        for b, length in enumerate(lengths):
            frames_BRE[b, :length] = self.graphs["whisper"].run({"mel": mel_BMX[b : b + 1, :, : 2 * length]})[0]
        return frames_BRE

    def hear(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What the LLM gets of each clip: tokens_LD."""
        frames, windows = self.frames(waveforms), self.device.windows
        length = windows["window_frames"]
        tokens = []
        for b, x_N in enumerate(waveforms):
            size, total = self.num_windows(len(x_N)), self.num_frames(len(x_N), self.num_speech_frames(len(x_N)))
            starts_W = np.arange(size) * windows["stride_frames"] if length else np.zeros(1, np.int64)
            places_WR = starts_W[:, None] + np.arange(length or total)
            inputs = {name: cut(part[b], places_WR) for name, part in zip(("speech", "audio"), frames)}
            tokens.append(self.graphs["connector"].run(inputs).reshape(-1, self.device.llm["width"]))
        for part in self.graphs.keys() - {"llm"}:
            self.graphs[part].release()
        return tokens

    # Answering

    def row(self, sample: Sample) -> Row:
        """The ids around a clip's audio, as evaluation asks."""
        num_tokens = self.num_windows(len(sample.waveform_N)) * self.device.windows["num_queries"]
        return self.rows.row(sample, with_answer=False, first_prompt=True, num_audio_tokens=num_tokens)

    def embed(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts with what was heard, padded on the left: embeds_BTD, and mask_BT."""
        heard = self.hear([sample.waveform_N for sample in samples])
        parts = []
        for sample, tokens_LD in zip(samples, heard):
            row = self.row(sample)
            parts.append(np.concatenate([self.look_up(row.before), tokens_LD, self.look_up(row.after)]))
        length = max(map(len, parts))
        embeds_BTD = np.zeros((len(parts), length, self.device.llm["width"]), np.float32)
        mask_BT = np.zeros((len(parts), length), np.int64)
        for b, part in enumerate(parts):
            embeds_BTD[b, length - len(part) :] = part
            mask_BT[b, length - len(part) :] = 1
        return embeds_BTD, mask_BT

    def look_up(self, ids: Sequence[int]) -> np.ndarray:
        """Embeddings of ids, float32."""
        return np.asarray(self.embeddings[np.asarray(ids, np.int64)], np.float32).reshape(len(ids), -1)

    def generate(self, samples: Sequence[Sample], *, max_new_tokens: int = 100, **options) -> list[str]:
        """The answers to one batch of clips, greedy by default; see `answer_ids`."""
        return [self.read(row) for row in self.answer_ids(samples, max_new_tokens=max_new_tokens, **options)]

    def read(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without its end."""
        return read_answer(self.tokenizer, ids, self.ends)

    def answer_ids(self, samples: Sequence[Sample], *, on_ids: Callable[[list[list[int]]], None] = lambda ids: None,
                     **options) -> list[list[int]]:  # fmt: skip
        """The new ids of each clip up to and with its end.

        Args:
            samples: clips with their task and question.
            on_ids: is called with all ids so far after each step of a greedy search.
            options: fields of `Search`: `max_new_tokens`, `num_beams`, `length_penalty`, `repetition_penalty`, …

        Raises:
            ValueError: a clip is longer or shorter than the ears take, or prompt and answer are longer than the graph.
        """
        self._check(samples)
        search = Search(
            lambda ids: has_ended(ids, self.ends),
            num_tokens=self.device.words["num_tokens"],
            pad_id=self.rows.pad_id,
            num_ends=len({end[0] for end in self.ends if not isinstance(end, TextEnd) and len(end) == 1}),
            **options,
        )
        embeds_BTD, mask_BT = self.embed(samples)
        most = self.device.llm["max_positions"]
        if embeds_BTD.shape[1] + search.max_new_tokens > most:
            raise ValueError(
                f"max_new_tokens is {search.max_new_tokens}, but the prompt has {embeds_BTD.shape[1]} positions and "
                f"this graph takes {most} in all; ask for a shorter answer."
            )
        return search.run(StatefulDecoder(self.graphs["llm"], embeds_BTD, mask_BT, self.look_up), on_ids)

    def _check(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if not self.min_samples <= len(sample.waveform_N) <= self.max_samples:
                raise ValueError(
                    f"sample {sample.key} lasts {sample.duration:.2f} s, but these ears take "
                    f"{self.min_samples / SAMPLE_RATE:g} to {self.max_samples / SAMPLE_RATE:g} s; cut it."
                )

    def stream(self, waveform_N: np.ndarray, task: str = ASR, *, question: str | None = None,
               max_new_tokens: int = 100) -> Iterator[str]:  # fmt: skip
        """The greedy answer to one clip, piece by piece as it is said; the pieces joined are the answer.

        Args:
            waveform_N: float32 mono at 16 kHz, not longer than the ears take.
            task, question, max_new_tokens: see `Listener.ask`.
        """
        from queue import SimpleQueue
        from threading import Thread

        queue: SimpleQueue = SimpleQueue()
        sample = Sample("audio", waveform_N, None, task, question, "", "")

        def work() -> None:
            try:
                rows = self.answer_ids([sample], max_new_tokens=max_new_tokens,
                                         on_ids=lambda rows: queue.put(self.settled(rows[0])))  # fmt: skip
                queue.put((self.read(rows[0]),))
            except BaseException as error:
                queue.put(error)

        Thread(target=work, daemon=True).start()
        said = ""
        while True:
            found = queue.get()
            if isinstance(found, BaseException):
                raise found
            text = found[0] if isinstance(found, tuple) else found
            if text.startswith(said) and len(text) > len(said):
                yield text[len(said) :]
                said = text
            if isinstance(found, tuple):
                return

    def settled(self, ids: Sequence[int]) -> str:
        """The text of an unfinished answer that no later id changes: no half character, no beginning of an end."""
        text = read_answer(self.tokenizer, ids, self.ends).rstrip("\ufffd")
        end = self.rows.end.text
        held = next((n for n in range(len(end), 0, -1) if text.endswith(end[:n])), 0)
        return text[: len(text) - held].rstrip()


class StatefulDecoder:
    """The LLM's graph with the prompts of one batch; see `search.Decoder`."""

    def __init__(self, graph: Graph, embeds_BTD: np.ndarray, mask_BT: np.ndarray,
                 look_up: Callable[[Sequence[int]], np.ndarray]):  # fmt: skip
        self.graph, self.look_up = graph, look_up
        self.embeds_BTD, self.mask_BP = embeds_BTD, mask_BT

    def start(self, times: int) -> np.ndarray:
        embeds_BTD, self.mask_BP = (np.repeat(x, times, axis=0) for x in (self.embeds_BTD, self.mask_BP))
        self.graph.reset()
        positions_BT = np.maximum(self.mask_BP.cumsum(1) - 1, 0)
        return self._step(embeds_BTD, positions_BT, np.arange(len(embeds_BTD)))

    def follow(self, ids: np.ndarray, beams: np.ndarray) -> np.ndarray:
        self.mask_BP = np.concatenate([self.mask_BP[beams], np.ones((len(ids), 1), np.int64)], axis=1)
        return self._step(self.look_up(ids)[:, None], self.mask_BP.sum(1, keepdims=True) - 1, beams)

    def _step(self, embeds_BTD: np.ndarray, positions_BT: np.ndarray, beams: np.ndarray) -> np.ndarray:
        return self.graph.run({"embeds": embeds_BTD, "mask": self.mask_BP, "positions": positions_BT.astype(np.int64),
                               "beams": beams.astype(np.int32)})  # fmt: skip


def cut(frames_RE: np.ndarray, places_WR: np.ndarray) -> np.ndarray:
    """Windows of an encoder's frames; frames that it does not have are zeros, which the connector does not hear."""
    missing = int(places_WR.max()) + 1 - len(frames_RE)
    return np.pad(frames_RE, ((0, max(0, missing)), (0, 0)))[places_WR]
