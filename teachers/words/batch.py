"""One batch of the LLM: each sample's prompt, audio places and answer in one contiguous row. Knows no weights.

Shapes: B batch, T LLM positions, N audio samples, S supervised positions flattened (row after row).
Right by construction where SALMONN's trainer is not: nothing stands between prompt and answer, the end token is always
there and always learned, and padding is at the end for training and at the start for generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from shards.sample import MelMask, Sample
from teachers.words.controls import TextEncoder
from teachers.words.ending import End
from teachers.words.prompts import Prompts

NO_BOS = "none"  # as text of the token that begins a row: nothing does


@dataclass(frozen=True)
class Row:
    """One sample in token ids.

    `before` and `after` stand around the audio; `answer` ends with the end token and is empty in generation.
    """

    before: list[int]
    num_audio_tokens: int
    after: list[int]
    answer: list[int]

    @property
    def prompt_length(self) -> int:
        return len(self.before) + self.num_audio_tokens + len(self.after)


@dataclass(frozen=True)
class Batch:
    """Samples as tensors. `*_S` index positions or rows of the flattened `B x T` grid."""

    samples: list[Sample]
    rows: list[Row]
    waveforms_BN: Tensor  # float32, 16 kHz, zero-padded at the end
    num_samples_B: Tensor
    input_ids_BT: Tensor  # the pad id stands where audio goes
    attention_mask_BT: Tensor
    audio_places: Tensor  # flat positions in B x T of every audio token, row after row
    predicting_S: Tensor  # flat position in B x T whose hidden state predicts the label
    labels_S: Tensor
    row_S: Tensor  # the batch row of each supervised position

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return Batch(**moved)

    @property
    def masks_B(self) -> list[MelMask | None] | None:
        """What SpecAugment hides of each clip; None: of none."""
        masks = [sample.mel_mask for sample in self.samples]
        return masks if any(masks) else None

    @property
    def num_supervised(self) -> int:
        return self.labels_S.numel()


class RowTokenizer:
    """Turns a sample into a `Row`: prompt pieces are tokenised apart, without special tokens, as SALMONN does.

    A control token that template or prompts spell is that token: their author means it. One that a sample's question
    or text spells is text.

    Args:
        tokenizer: the LLM's tokenizer.
        prompts: the prompts by task.
        end_token: text of the end token; empty takes the tokenizer's own.
        max_answer_tokens: longer answers are cut, and the end token still follows.
        bos_token: text of the token that begins a row; empty takes the tokenizer's own, `NO_BOS` none.

    Raises:
        ValueError: there is no end token, or `bos_token` is none of the tokenizer's.
    """

    def __init__(self, tokenizer, prompts: Prompts, end_token: str, max_answer_tokens: int, bos_token: str = ""):
        self.tokenizer, self.prompts, self.max_answer_tokens = tokenizer, prompts, max_answer_tokens
        self._text = TextEncoder(tokenizer)
        self.end = self._read_end(end_token) if end_token else self._own_end()
        self.end_ids = list(self.end.ids)  # where the end stands alone
        self.bos_ids = self._read_bos(bos_token)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[-1]

    @property
    def text(self) -> TextEncoder:
        """Encodes what is data: the questions and answers of samples."""
        if self._text.tokenizer is not self.tokenizer:
            self._text = TextEncoder(self.tokenizer)
        return self._text

    def _own_end(self) -> End:
        index = self.tokenizer.eos_token_id
        if index is None:
            raise ValueError(
                f"eos_token of {self.tokenizer.name_or_path} is None, but answers must end; set teacher.end_token."
            )
        return End("", (index,), (index,))

    def _read_bos(self, bos_token: str) -> list[int]:
        own = self.tokenizer.bos_token_id
        if not bos_token:
            return [] if own is None else [own]
        if bos_token == NO_BOS:
            return []
        ids = self.tokenizer.get_vocab()
        if bos_token not in ids:
            raise ValueError(
                f"bos_token is {bos_token!r}, but {self.tokenizer.name_or_path} has no such token; set "
                f"teacher.bos_token to one that it has, or to {NO_BOS}."
            )
        return [ids[bos_token]]

    def _read_end(self, end_token: str) -> End:
        """Text up to the first control token, and the ids from there on."""
        found = self.text.pattern.search(end_token)
        head = end_token[: found.start()] if found else end_token
        tail = self.encode(end_token[len(head) :]) if found else []
        return End(head, tuple(tail), (*(self.text.encode(head) if head else ()), *tail))

    def encode(self, text: str) -> list[int]:
        """Ids of what template, prompts and config say; control tokens in it are those tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def answer_ids(self, text: str) -> list[int]:
        """The answer's ids with the end token.

        An end that is text is tokenised in one piece with the answer, as SALMONN's trainers do, and is not written
        twice where the answer has it already. Only where an answer is cut it stands alone.
        """
        if self.end.text and not self.end.tail:
            text = text.removesuffix(self.end.text)
        ids = self.text.encode(text)
        if len(ids) > self.max_answer_tokens or not self.end.text:
            return ids[: self.max_answer_tokens] + self.end_ids
        return self.text.encode(text + self.end.text) + list(self.end.tail)

    def prompt_ids(self, text: str, question: str | None) -> list[int]:
        """Ids of a part of a prompt, in which a question may stand that is a sample's own."""
        if not question or question not in text or not self.text.pattern.search(question):
            return self.encode(text)
        head, _, rest = text.partition(question)
        start = max((match.end() for match in self.text.pattern.finditer(head)), default=0)
        found = self.text.pattern.search(rest)
        stop = found.start() if found else len(rest)
        own = self.text.encode(head[start:] + question + rest[:stop])
        return [*(self.encode(head[:start]) if start else []), *own, *(self.encode(rest[stop:]) if found else [])]

    def row(self, sample: Sample, *, with_answer: bool, first_prompt: bool, num_audio_tokens: int = 0) -> Row:
        """One sample's row; an unlabelled sample has no row with an answer.

        Args:
            sample: the clip.
            with_answer: for training; else for `generate`.
            first_prompt: of its task's; else one that the key chooses.
            num_audio_tokens: of the clip, where the row is to be heard and not only named.

        Raises:
            ValueError: the task is unknown, or the sample has no text and an answer is asked for.
        """
        before, after = self.prompts.choose(sample.task, sample.key, sample.question, first=first_prompt)
        if with_answer and sample.text is None:
            raise ValueError(
                f"text of sample {sample.key} is None, but training needs an answer; cache the teacher's targets "
                f"(they bring its own answer) or set data.labelled_only=true."
            )
        answer = self._answer(sample) if with_answer else []
        before_ids = self.prompt_ids(before, sample.question)
        if before_ids[: len(self.bos_ids)] != self.bos_ids:  # a template may write it itself
            before_ids = self.bos_ids + before_ids
        return Row(before_ids, num_audio_tokens, self.prompt_ids(after, sample.question), answer)

    def _answer(self, sample: Sample) -> list[int]:
        return self.answer_ids(sample.text) if sample.answer_ids is None else list(sample.answer_ids)


def check_pad_id(pad_id: int, llm: nn.Module) -> None:
    """Refuse padding that has no row in the LLM's embeddings, before it ends a step in the middle of a lookup.

    Raises:
        ValueError: naming both numbers.
    """
    num_rows = llm.get_input_embeddings().weight.shape[0]
    if not 0 <= pad_id < num_rows:
        raise ValueError(
            f"pad id of the tokenizer is {pad_id}, but the embeddings of {llm.config.name_or_path or 'the LLM'} have "
            f"{num_rows} rows; give the tokenizer a pad_token that its LLM has, such as a reserved one, and add none."
        )


def collate(samples: Sequence[Sample], rows: Sequence[Row], pad_id: int) -> Batch:
    """Lay rows out as tensors: padded on the right when they have answers, on the left when they have none."""
    lengths = [row.prompt_length + len(row.answer) for row in rows]
    size, length = len(rows), max(lengths)
    on_left = not any(row.answer for row in rows)
    ids_BT = np.full((size, length), pad_id, dtype=np.int64)
    mask_BT = np.zeros((size, length), dtype=np.int64)
    audio, predicting, labels, row_index = [], [], [], []
    for b, row in enumerate(rows):
        start = length - lengths[b] if on_left else 0
        mask_BT[b, start : start + lengths[b]] = 1
        audio_start = start + len(row.before)
        after_start = audio_start + row.num_audio_tokens
        answer_start = after_start + len(row.after)
        ids_BT[b, start:audio_start] = row.before
        ids_BT[b, after_start:answer_start] = row.after
        ids_BT[b, answer_start : answer_start + len(row.answer)] = row.answer
        audio.append(np.arange(audio_start, after_start) + b * length)
        predicting.append(np.arange(answer_start - 1, answer_start - 1 + len(row.answer)) + b * length)
        labels += row.answer
        row_index += [b] * len(row.answer)
    waveforms_BN, num_samples_B = pad_waveforms([sample.waveform_N for sample in samples])
    return Batch(
        samples=list(samples),
        rows=list(rows),
        waveforms_BN=waveforms_BN,
        num_samples_B=num_samples_B,
        input_ids_BT=torch.from_numpy(ids_BT),
        attention_mask_BT=torch.from_numpy(mask_BT),
        audio_places=torch.from_numpy(np.concatenate(audio)),
        predicting_S=torch.from_numpy(np.concatenate(predicting)),
        labels_S=torch.tensor(labels, dtype=torch.long),
        row_S=torch.tensor(row_index, dtype=torch.long),
    )


def pad_waveforms(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Waveforms as one zero-padded float32 tensor [B, N], and their lengths [B]."""
    lengths = [len(waveform) for waveform in waveforms]
    padded_BN = np.zeros((len(waveforms), max(lengths)), dtype=np.float32)
    for b, waveform in enumerate(waveforms):
        padded_BN[b, : len(waveform)] = waveform
    return torch.from_numpy(padded_BN), torch.tensor(lengths, dtype=torch.long)
