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
from teachers.words.rows import Row


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
