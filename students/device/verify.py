"""How far an exported folder is from the trained student: logits along the student's own answers, and its greedy texts.

Shapes: B batch, T LLM positions, S positions of answers, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from shards.sample import Sample
from students.device.student import DeviceStudent, StatefulDecoder
from teachers.salmonn import Salmonn

MAX_ERROR = 1e-3  # of logits in float32: above it an export is not the student


@dataclass(frozen=True)
class Expected:
    """What the trained student says of each clip."""

    samples: Sequence[Sample]
    ids: list[list[int]]  # greedy, with the end
    texts: list[str]
    logits: list[np.ndarray]  # logits_SV along `ids`


@dataclass(frozen=True)
class Fidelity:
    """How an export compares."""

    logit_error: float  # norm of the difference by the norm of the student's logits
    top1: float  # share of positions with the same likeliest id
    texts_equal: int  # greedy answers that are the same, of `clips`
    clips: int

    def __str__(self) -> str:
        texts = f"{self.texts_equal} of {self.clips} texts equal"
        return f"logits {self.logit_error:.1e} off, top-1 {self.top1:.1%}, {texts}"

    def to_json(self) -> dict:
        return asdict(self)


@torch.no_grad()
def ask_student(model: Salmonn, samples: Sequence[Sample], max_new_tokens: int) -> Expected:
    """The trained student's answers and their logits, clip by clip."""
    ids, logits = [], []
    for sample in samples:
        batch = model.collate([sample], with_answer=False, first_prompt=True).to(model.device)
        found = model.generate_ids(batch, max_new_tokens=max_new_tokens)[0]
        prompt_BTD = model.embed(batch, model.hear(batch))
        said_BT = torch.tensor([found[:-1]], dtype=torch.long, device=model.device)  # empty where the end comes first
        said_BTD = model.llm.get_input_embeddings()(said_BT)
        embeds_BTD = torch.cat([prompt_BTD, said_BTD.to(prompt_BTD.dtype)], 1)
        out_BTV = model.llm(inputs_embeds=embeds_BTD, use_cache=False).logits
        ids.append(found)
        logits.append(out_BTV[0, prompt_BTD.shape[1] - 1 :].float().cpu().numpy())
    return Expected(samples, ids, [model.read(row) for row in ids], logits)


def compare(folder: Path, expected: Expected, products: str, max_new_tokens: int) -> Fidelity:
    """Ask an exported folder the same."""
    student = DeviceStudent(folder, products=products, check_files=False)
    wrong = total = right = places = equal = 0
    for sample, ids, text, want_SV in zip(expected.samples, expected.ids, expected.texts, expected.logits):
        got_SV = follow(student, sample, ids)
        wrong += float(np.square(got_SV - want_SV, dtype=np.float64).sum())
        total += float(np.square(want_SV, dtype=np.float64).sum())
        right += int((got_SV.argmax(1) == want_SV.argmax(1)).sum())
        places += len(ids)
        equal += student.generate([sample], max_new_tokens=max_new_tokens)[0] == text
    return Fidelity((wrong / total) ** 0.5, right / places, equal, len(expected.ids))


def follow(student: DeviceStudent, sample: Sample, ids: Sequence[int]) -> np.ndarray:
    """The export's logits_SV along an answer, step by step from its own hearing of the clip."""
    decoder = StatefulDecoder(student.graphs["llm"], *student.embed([sample]), student.look_up)
    found = [decoder.start(1)]
    for index in ids[:-1]:
        found.append(decoder.follow(np.array([index]), np.zeros(1, np.int64)))
    return np.concatenate(found)
