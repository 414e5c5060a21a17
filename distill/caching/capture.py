"""What the teacher says about a few samples, as their target records. Knows no shard and no file.

Whose answer is learned, `cache.answers`: "label" has one record a clip. So has "both": a labelled clip's record holds
the targets of the teacher's own answer beside those of the label (`TargetRecord.other`), and training takes turns, the
label in even epochs. A second sample under another key would have changed the number of samples, their order and the
length of an epoch; so keys, audio, queries and the resumption stay as they are, and the record says which is which.

Shapes: S supervised positions, V vocabulary, W windows, Q queries a window, E width, R encoder frames.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distill.config import CacheConfig, Config
from distill.evaluation.metrics.scores import error_rate
from distill.objective.alignment import answer_ends, token_bytes
from distill.training.ranks import resolve_precision
from shards.sample import Sample
from shards.targets.codecs.table import decode, find_codec
from shards.targets.distributions import HiddenStates
from shards.targets.header import HEAD_INPUT
from shards.targets.record import TargetRecord
from teachers.blocks import record_blocks
from teachers.logits import head_logits
from teachers.online import OnlineTeacher
from teachers.salmonn import Heard, Salmonn
from teachers.targets import FRAMES, QUERIES, hidden_name, identify_row
from teachers.teacher import learns_own_answer
from teachers.words.batch import Batch, pad_waveforms
from teachers.words.draws import seeded_generator

NO_BYTES = -1  # end of a token in an answer that the tokens do not spell


class Capturer:
    """Runs the teacher over samples; a batch's records depend on the batch alone, draws included.

    Args:
        teacher: with the answers' settings.
        config: the configuration of the run.
    """

    def __init__(self, teacher: OnlineTeacher, config: Config):
        self.teacher, self.model, self.config = teacher, teacher.model, config
        self.codec = find_codec(config.cache.codec).of(config.cache)
        self.dtype = resolve_precision(config.precision)
        self.layers = [layer for layer in config.cache.hidden_layers if layer != HEAD_INPUT]
        self.pieces = read_pieces(self.model)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> dict[str, TargetRecord]:
        """Each sample's record, by key."""
        cache = self.config.cache
        with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32):
            frames = self._frames(samples)
            own = self._answer(samples, frames)
            primary = [replace(s, text=own[s.key]) if learns_own_answer(s, cache.answers) else s for s in samples]
            batch = self.model.collate(primary).to(self.model.device)
            sources = ["teacher" if learns_own_answer(s, cache.answers) else "label" for s in samples]
            records = self._capture(batch, frames, sources, self._frames_to_keep(batch, frames))
            others = self._capture_others(samples, frames, own) if cache.answers == "both" else {}
        for sample in samples:
            notes = self._note_transcript(sample, own[sample.key]) if cache.transcripts else {}
            records[sample.key] = replace(records[sample.key], notes=notes, other=others.get(sample.key))
        return records

    def _frames(self, samples: Sequence[Sample]) -> list[Tensor]:
        """What the ears make of the clips: once, whatever is asked about them."""
        waveforms_BN, num_samples_B = pad_waveforms([sample.waveform_N for sample in samples])
        return self.model.frames(waveforms_BN.to(self.model.device), num_samples_B.to(self.model.device))

    def _answer(self, samples: Sequence[Sample], frames: list[Tensor]) -> dict[str, str]:
        """The teacher's own answers by key, to the clips whose answer is kept or learned."""
        cache = self.config.cache
        is_every = cache.transcripts or cache.answers == "both"
        rows = [b for b, sample in enumerate(samples) if is_every or learns_own_answer(sample, cache.answers)]
        asked = [samples[b] for b in rows]
        return dict(zip([s.key for s in asked], self.teacher.answer(asked, [x_BRE[rows] for x_BRE in frames])))

    def _capture_others(self, samples: Sequence[Sample], frames: list[Tensor], own: dict[str, str]):
        """Records of the teacher's own answers to labelled clips, without what is the same for both answers."""
        places = [b for b, sample in enumerate(samples) if sample.text is not None]
        if not places:
            return {}
        answered = [replace(samples[b], text=own[samples[b].key]) for b in places]
        batch = self.model.collate(answered).to(self.model.device)
        return self._capture_answers(batch, [x_BRE[places] for x_BRE in frames], "teacher")

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> dict[str, TargetRecord]:
        """Records of the student's answers, which are the samples' own, without what is the same for every answer."""
        with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32):
            batch = self.model.collate(samples).to(self.model.device)
            return self._capture_answers(batch, self.model.frames(batch.waveforms_BN, batch.num_samples_B), "student")

    def _capture_answers(self, batch: Batch, frames: list[Tensor], source: str) -> dict[str, TargetRecord]:
        """Records of answers that stand beside a clip's first record, which has queries and frames."""
        records, shared = self._capture(batch, frames, [source] * len(batch.rows)), (QUERIES, FRAMES)
        return {
            key: replace(record, features={n: x for n, x in record.features.items() if not n.startswith(shared)})
            for key, record in records.items()
        }

    def _frames_to_keep(self, batch: Batch, frames: list[Tensor]) -> list[Tensor]:
        """The frames that a student is to hear: the teacher's own, or those of the ears cut as the student's are."""
        seconds = frames_seconds(self.config, self.model)
        if self.config.cache.frames == "none" or seconds == self.model.config.ears_seconds:
            return frames
        return self.model.frames(batch.waveforms_BN, batch.num_samples_B, ears_seconds=seconds)

    def _capture(self, batch: Batch, frames: list[Tensor], sources: list[str],
                 kept: list[Tensor] | None = None) -> dict[str, TargetRecord]:  # fmt: skip
        """One pass of the LLM; each sample's record by key. `kept` are frames that go to the disk, if others."""
        heard = self.model.hear(batch, frames)
        with record_blocks(self.model, self.layers) as outputs:
            hidden_SD = self.model.answer_states(batch, heard)
        logits_SV = head_logits(self.model.llm, hidden_SD)
        states = {n: x_BTD.flatten(0, 1)[batch.predicting_S] for n, x_BTD in outputs.items()}
        if HEAD_INPUT in self.config.cache.hidden_layers:
            states[HEAD_INPUT] = hidden_SD
        states = {hidden_name(n): x_SD.float().cpu().numpy() for n, x_SD in states.items()}
        label_logprobs_S, entropy_S = score_labels(logits_SV, batch.labels_S)
        identities = [identify_row(sample, row) for sample, row in zip(batch.samples, batch.rows)]
        ends = np.cumsum([0] + [len(row.answer) for row in batch.rows])
        parts = [slice(start, end) for start, end in pairwise(ends)]
        payloads = self._encode(logits_SV, hidden_SD, parts, identities)
        records = {}
        for b, (sample, row, part) in enumerate(zip(batch.samples, batch.rows, parts)):
            features = {name: x_SD[part] for name, x_SD in states.items()} | self._hear(
                b, sample, heard, kept or frames
            )
            records[sample.key] = TargetRecord(
                payload=payloads[b],
                answer_ids_S=np.asarray(row.answer, np.int32),
                label_logprobs_S=label_logprobs_S[part],
                entropy_S=entropy_S[part],
                byte_ends_S=self._byte_ends(row.answer, sample.text),
                answer=sample.text,
                answer_source=sources[b],
                identity=identities[b],
                features=features,
            )
        return records

    def _encode(self, logits_SV: Tensor, hidden_SD: Tensor, parts: list[slice], identities: list[str]) -> list[bytes]:
        """Each sample's payload; draws are seeded by what the sample is."""
        if self.codec.is_random:
            draw = self.codec.capture
            captured = [draw(logits_SV[p], hidden_SD[p], seeded_generator(i)) for p, i in zip(parts, identities)]
            return [self.codec.encode(to_host(one)) for one in captured]
        captured = to_host(self.codec.capture(logits_SV, hidden_SD))
        return [self.codec.encode({n: x[part] if x.ndim else x for n, x in captured.items()}) for part in parts]

    def _hear(self, b: int, sample: Sample, heard: Heard, frames: list[Tensor]) -> dict[str, np.ndarray]:
        """What was heard of one clip, as far as it is kept."""
        kept = {}
        if self.config.cache.features != "none" and self.model.has_queries:
            kept[QUERIES] = heard.queries_BWQE[b, : heard.num_windows_B[b]].float().cpu().numpy()
        if self.config.cache.frames != "none":
            windows, seconds = self.config.student.windows, frames_seconds(self.config, self.model)
            kept |= frame_features(self.model, b, sample, frames, windows, seconds)
        return kept

    def _byte_ends(self, answer: list[int], text: str) -> np.ndarray:
        """Where each token ends in the answer's bytes, its end tokens with the last; NO_BYTES where that is unknown."""
        try:
            if self.pieces is None:
                raise ValueError("the tokenizer's pieces are no bytes")
            ends = answer_ends(answer, self.pieces, text, self.model.rows.end)
        except ValueError:
            return np.full(len(answer), NO_BYTES, np.int32)
        num_bytes = len(text.encode())
        return np.asarray([num_bytes if end is None else min(end, num_bytes) for end in ends], np.int32)

    def _note_transcript(self, sample: Sample, own: str) -> dict[str, str]:
        """The teacher's own answer beside a label, and its error rate where the task has one."""
        if sample.text is None:
            return {}
        rate = error_rate(sample.task, sample.text, own, normalize=self.config.eval.normalize)
        return {"transcript": own} | ({} if rate is None else {"wer": f"{rate:.6f}"})


def score_labels(logits_SV: Tensor, labels_S: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each label and the entropy of each position, nats, float32."""
    logprobs_SV = torch.log_softmax(logits_SV.float(), -1)
    entropy_S = -(logprobs_SV.exp() * logprobs_SV).nan_to_num(0.0).sum(-1)
    return logprobs_SV.gather(1, labels_S[:, None])[:, 0].cpu().numpy(), entropy_S.cpu().numpy()


def feature_dtypes(cache: CacheConfig, record: TargetRecord) -> dict[str, str]:
    """How each of a record's features is stored, by name."""
    states = "int8" if cache.features == "none" else cache.features
    names = record.features.keys() | (record.other.features.keys() if record.other else set())
    return {name: cache.frames if name.startswith(FRAMES) else states for name in names}


def captured_mass(payload: bytes) -> float:
    """Probability that a payload keeps, summed over its positions; hidden states keep all of it."""
    if not payload:  # of a record of frames alone
        return 0.0
    decoded = decode(payload)
    if isinstance(decoded, HiddenStates):
        return float(len(decoded.hidden_SD))
    return float(decoded.logprobs_SK.exp().sum())


def frame_features(
    model: Salmonn, b: int, sample: Sample, frames: list[Tensor], windows: str, ears_seconds: str
) -> dict[str, np.ndarray]:
    """The frames of row `b`, one feature an encoder, as far as these windows read them."""
    size = num_frames_read(model, len(sample.waveform_N), windows, ears_seconds)
    return {f"{FRAMES}{number}_RE": x_BRE[b, :size].float().cpu().numpy() for number, x_BRE in enumerate(frames)}


def num_frames_read(model: Salmonn, num_samples: int, windows: str, ears_seconds: str = "") -> int:
    """Encoder frames of a clip that a student's windows, "audio" or "all", read: up to the end of the last one."""
    if windows == "all" or not model.qformer.window_frames:
        return model.num_frames(num_samples, ears_seconds)
    return model.end_of_windows(num_samples)


def frames_seconds(config: Config, teacher: Salmonn) -> str:
    """What Whisper hears for the frames that a cache keeps: the student's, or what trained ears are pulled to."""
    own = teacher.config.ears_seconds
    return own if config.student.hearing.trains_ears else config.student.ears_seconds or own


def read_pieces(model: Salmonn) -> list[bytes] | None:
    """The bytes of every id of the teacher; None for a tokenizer whose pieces are no bytes."""
    try:
        return token_bytes(model.tokenizer)
    except ValueError:
        return None


def to_host(captured: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What a codec captured, on the host."""
    return {name: values.cpu().numpy() for name, values in captured.items()}
