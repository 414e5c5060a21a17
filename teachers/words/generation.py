"""Answers of a LLM by a config of our own: nothing that lies in the LLM's folder changes them but its end ids.

A folder's `generation_config.json` may hold a repetition penalty, sampling, a length or forbidden words that were meant
for a chat; transformers takes whatever is not said otherwise from there.

Shapes: B batch, T LLM positions or new ids, V vocabulary, D LLM width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from teachers.words.ending import Ends, TextEnd

ANSWERS = 1  # version of how answers are made; another one is due when the same model would answer otherwise


class RealTokens(LogitsProcessor):
    """Forbids the rows of a padded head, which stand for no token.

    Args:
        num_tokens: ids of the tokenizer.
    """

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_padding_V = torch.arange(scores.shape[-1], device=scores.device) >= self.num_tokens
        return scores.masked_fill(is_padding_V, -torch.inf)


class EndSequence(StoppingCriteria):
    """Ends each row (and each beam) of its own accord when its ids end with a sequence."""

    def __init__(self, ids: Sequence[int]):
        self.ids = list(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        if input_ids.shape[1] < len(self.ids):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return (input_ids[:, -len(self.ids) :] == torch.tensor(self.ids, device=input_ids.device)).all(1)


class EndText(StoppingCriteria):
    """Ends each row (and each beam) of its own accord when its text says the end; only its last ids are decoded.

    Args:
        end: the end.
        min_new_tokens: before so many nothing ends.
    """

    def __init__(self, end: TextEnd, min_new_tokens: int = 0):
        self.end, self.min_new_tokens = end, min_new_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        if input_ids.shape[1] < self.min_new_tokens:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        last = input_ids[:, -self.end.num_ids - len(self.end.tail) :].tolist()
        return torch.tensor([self.end.is_at(row) for row in last], device=input_ids.device)


def own_end_ids(llm: nn.Module) -> list[int]:
    """The ids that end an answer by the LLM's `generation_config`: all that is read of it."""
    own = llm.generation_config.eos_token_id
    return [] if own is None else list(own) if isinstance(own, Sequence) else [int(own)]


@contextmanager
def without_generation_defaults(llm: nn.Module) -> Iterator[None]:
    """While it is open, the LLM has no generation settings of its own."""
    own, llm.generation_config = llm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        llm.generation_config = own


def generate_without_defaults(llm: nn.Module, embeds_BTD: Tensor, mask_BT: Tensor, *, ends: Ends, pad_id: int,
                              num_tokens: int, processors: Sequence[LogitsProcessor] = (),
                              repetition_penalty: float = 1.0, min_new_tokens: int = 0,
                              **options) -> list[list[int]]:  # fmt: skip
    """New ids of each row, padded behind its end.

    Args:
        llm: a causal LM of transformers.
        embeds_BTD: prompts, padded on the left.
        mask_BT: where they are no padding.
        ends: each row and each beam ends at the first of them.
        pad_id: what follows an end.
        num_tokens: ids from this on are never said.
        processors: applied last.
        repetition_penalty: that of every id that this row has said, once however often; the prompt does not count, and
            neither does padding (transformers' own processor skips as many new ids as the row has padding). A row in a
            batch is penalized as the row alone.
        min_new_tokens: before so many nothing ends.
        options: the fields of `GenerationConfig`.
    """
    before: list[LogitsProcessor] = [RealTokens(num_tokens)]
    if repetition_penalty != 1:
        before.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    single = [end[0] for end in ends if not isinstance(end, TextEnd) and len(end) == 1]
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=list(dict.fromkeys(single)) or None,
        pad_token_id=pad_id,
        min_new_tokens=min_new_tokens or None,
        **options,
    )
    stops = [EndText(e, min_new_tokens) if isinstance(e, TextEnd) else EndSequence(e) for e in ends[:1]]
    with without_generation_defaults(llm):
        return llm.generate(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            generation_config=config,
            logits_processor=LogitsProcessorList([*before, *processors]),
            stopping_criteria=StoppingCriteriaList(stops),
        ).tolist()
