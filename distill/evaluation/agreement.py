"""What a student says beside its teacher, token by token: how often the same, how far off, and how sure rightly.

Both read the right answers of held-out clips, asked as evaluation asks, and predict each next token. So a student is
told from one that only says the same words: answers are counted by their most probable tokens alone. One model is in
memory at a time: of the teacher K log-probabilities a position are kept, and the mass of all other tokens.

Shapes: S positions of all answers, V tokens, K kept ones. Knows no text.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.config import EvalConfig
from distill.evaluation.clips import find_clips
from distill.evaluation.scorecard import Agreement
from distill.objective.losses import forward_kl
from distill.training.monitoring.progress import Progress
from shards.targets.distributions import Distribution, Sparse
from teachers.logits import head_logits
from teachers.salmonn import Salmonn
from teachers.words.vocabulary import Vocabulary

KEPT = 64  # log-probabilities of the teacher, a position
BINS = 15  # of confidence, equally wide
CHUNK = 128  # positions whose logits are held at once


@dataclass(frozen=True)
class Predictions:
    """What a model thinks of every position of the right answers, clip by clip in the order of the split.

    `divergence_S` is KL(teacher ‖ this model) in nats, or None: there was no teacher of the same tokens.
    """

    vocabulary: str  # hash of what its ids mean
    labels_S: Tensor  # the right ids
    sparse: Sparse  # the KEPT most probable ones, the most probable first
    divergence_S: Tensor | None = None

    @property
    def top_S(self) -> Tensor:
        """The most probable ids."""
        return self.sparse.ids_SK[:, 0]

    @property
    def confidence_S(self) -> Tensor:
        """Their probabilities."""
        return self.sparse.logprobs_SK[:, 0].exp()


@torch.no_grad()
def predict_answers(
    model: Salmonn, shards: str | Path, options: EvalConfig, teacher: Predictions | None = None, title: str = "predict"
) -> Predictions:
    """Let a model predict each token of every clip's first right answer.

    Args:
        model: a teacher or student.
        shards: the split.
        options: the batch size.
        teacher: what its teacher predicted of the same split; the divergence from it is measured where both have the
            same tokens.
        title: the title of the progress line.

    Raises:
        ValueError: no clip of the split has a text.
    """
    stream = find_clips(shards).stream(shards, options.batch_size)
    vocabulary = Vocabulary.of(model.tokenizer).sha256
    is_alike = teacher is not None and teacher.vocabulary == vocabulary
    parts, start = [], 0
    with Progress(title, stream.num_samples, unit="clips") as progress:
        for samples in stream:
            if samples:
                batch = model.collate(samples, first_prompt=True).to(model.device)
                hidden_SD = model.answer_states(batch, model.hear(batch))
                for of_chunk, labels_S in zip(hidden_SD.split(CHUNK), batch.labels_S.split(CHUNK)):
                    stop = start + len(labels_S)
                    is_alike = is_alike and torch.equal(teacher.labels_S[start:stop], labels_S.cpu())
                    theirs = Sparse(*(x[start:stop] for x in teacher.sparse)) if is_alike else None
                    parts.append((labels_S.cpu(), *_predict(model, of_chunk, theirs)))
                    start = stop
            progress.advance(units=len(samples))
    labels_S, *sparse, divergence_S = (torch.cat(part) for part in zip(*parts))
    is_alike = is_alike and len(labels_S) == len(teacher.labels_S)
    return Predictions(vocabulary, labels_S, Sparse(*sparse), divergence_S if is_alike else None)


def _predict(model: Salmonn, hidden_SD: Tensor, teacher: Sparse | None) -> tuple[Tensor, ...]:
    """The kept distribution and the divergence, 0 without a teacher."""
    logits_SV = head_logits(model.llm, hidden_SD)[:, : len(model.tokenizer)]  # a padded head has more
    divergence_S = torch.zeros(len(logits_SV))
    if teacher is not None:
        divergence_S = forward_kl(logits_SV, Sparse(*(x.to(logits_SV.device) for x in teacher)), 1.0)
    sparse = Distribution.from_logits(logits_SV, min(KEPT, logits_SV.shape[1] - 1)).at(1.0)
    return tuple(x.cpu() for x in (*sparse, divergence_S))


def calibration_error(confidence_S: np.ndarray, is_right_S: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: how far the share of right predictions is from the confidence in them.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, eq. 5; bins are open below.
    """
    bin_S = np.clip(np.ceil(confidence_S * bins).astype(int) - 1, 0, bins - 1)
    gaps = [abs(np.sum(confidence_S[bin_S == i] - is_right_S[bin_S == i])) for i in range(bins)]
    return float(sum(gaps) / len(confidence_S))


def compare_predictions(teacher: Predictions, student: Predictions) -> Agreement:
    """A student's agreement with its teacher, and how well each is calibrated."""
    ece = [calibration_error(p.confidence_S.double().numpy(), (p.top_S == p.labels_S).numpy())
           for p in (teacher, student)]  # fmt: skip
    if student.divergence_S is None:
        return Agreement(len(student.labels_S), *ece)
    return Agreement(
        len(student.labels_S),
        *ece,
        top1=float((teacher.top_S == student.top_S).double().mean()),
        kl=float(student.divergence_S.double().mean()),
    )


def measure_agreement(
    teacher: Salmonn, student: Salmonn, shards: str | Path, options: EvalConfig | None = None
) -> Agreement:
    """Both models on a split of shards that neither was trained on.

    Args:
        teacher, student: the models; in evaluation mode.
        shards: see `shards.tars.source.expand_shards`.
        options: the batch size.
    """
    options = options or EvalConfig()
    theirs = predict_answers(teacher, shards, options)
    return compare_predictions(theirs, predict_answers(student, shards, options, theirs))
