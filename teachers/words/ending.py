"""What ends an answer: ids, or a text that the tokenizer may join to the answer's last word. Knows no model.

An end that is a control token is its id. Any other (`</s>` in Llama 3's vocabulary, which knows no such token) is
text: SALMONN's trainers tokenize it in one piece with the answer, whose last character can share a token with its first
(`.</`). So such an answer ends where its decoded text says the end, whatever the ids are.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class End:
    """The end of a model's answers.

    Attributes:
        text: the part that is text and is tokenized with the answer, up to the first control token; empty for an end
            that is one.
        tail: the ids from the first control token on.
        ids: the ids of the whole end where it stands alone, as after an answer that was cut.
    """

    text: str
    tail: tuple[int, ...]
    ids: tuple[int, ...]


class TextEnd:
    """The end of an answer in its decoded text.

    Args:
        tokenizer: that decodes.
        end: with a text.
    """

    def __init__(self, tokenizer, end: End):
        self.tokenizer, self.text, self.tail = tokenizer, end.text, list(end.tail)
        # every id is a byte or more, and one more is for the space that some tokenizers cut off a text's start
        self.num_ids = len(end.text.encode()) + 1

    def __repr__(self) -> str:
        return f"the text {self.text!r}{f' and ids {self.tail}' if self.tail else ''}"

    def is_at(self, ids: Sequence[int]) -> bool:
        """Whether these ids, and not already fewer of them, end with the end."""
        if not self.tail:
            return self.text in self._decode(ids[-self.num_ids :])
        if list(ids[-len(self.tail) :]) != self.tail:
            return False
        return self._decode(ids[: -len(self.tail)][-self.num_ids :]).endswith(self.text)

    def cut(self, ids: Sequence[int]) -> str:
        """The text before the end of ids that end there."""
        text = self._decode(ids[: len(ids) - len(self.tail)])
        return text.removesuffix(self.text) if self.tail else text.partition(self.text)[0]

    def before(self, ids: Sequence[int]) -> list[int] | None:
        """The ids before the end; None where one of them reaches into it."""
        text = self.cut(ids)
        return next((list(ids[:n]) for n in range(len(ids), -1, -1) if self._decode(ids[:n]) == text), None)

    def spells(self, ids: Sequence[int]) -> bool:
        """Whether nothing follows the end."""
        return bool(self.tail) or self._decode(ids).endswith(self.text)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


Ends = Sequence[Sequence[int] | TextEnd]  # of one model; the first is its own


def truncate_after_end(ids: list[int], ends: Ends) -> list[int]:
    """The ids up to and with the first of `ends`; all of them where none comes."""
    for stop in range(1, len(ids) + 1):
        if has_ended(ids[:stop], ends):
            return ids[:stop]
    return ids


def find_end(ids: Sequence[int], ends: Ends) -> Sequence[int] | TextEnd | None:
    """Which of `ends` the ids end with."""
    for end in ends:
        is_there = end.is_at(ids) if isinstance(end, TextEnd) else list(ids[-len(end) :]) == list(end)
        if is_there:
            return end
    return None


def has_ended(ids: Sequence[int], ends: Ends) -> bool:
    """Whether the ids end with one of `ends`."""
    return find_end(ids, ends) is not None


def read_answer(tokenizer, ids: Sequence[int], ends: Ends) -> str:
    """The text of an answer's ids, without the end that they may end with."""
    end = find_end(ids, ends)
    if isinstance(end, TextEnd):
        hidden = set(tokenizer.all_special_ids) - set(end.tail)
        return end.cut([index for index in ids if index not in hidden]).strip()
    if end is not None:
        ids = ids[: len(ids) - len(end)]
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()
