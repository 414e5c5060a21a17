"""A sample in token ids: prompt, audio places and answer, right by construction. Knows no weights and imports no torch.

Nothing stands between prompt and answer, and the end token is always there, which SALMONN's trainer does not hold to.
"""

from dataclasses import dataclass

from shards.sample import Sample
from teachers.words.controls import TextEncoder
from teachers.words.ending import End
from teachers.words.prompts import Prompts
from teachers.words.templates import NO_BOS, owns_space

KEPT_TEXTS = 1000  # whose ids are kept; a prompt that asks a sample's own question is among them once


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

    @property
    def num_tokens(self) -> int:
        """Of prompt, audio and answer."""
        return self.prompt_length + len(self.answer)


class RowTokenizer:
    """Turns a sample into a `Row`: prompt pieces are tokenized apart, without special tokens, as SALMONN does.

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
        self._text, self._ids = TextEncoder(tokenizer), {}
        self.lead = " " if owns_space(prompts.template, tokenizer) else ""  # of every answer
        self.end = self._read_end(end_token) if end_token else self._own_end()
        self.end_ids = list(self.end.ids)  # where the end stands alone
        self.bos_ids = self._read_bos(bos_token)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[-1]

    @property
    def text(self) -> TextEncoder:
        """Encodes what is data: the questions and answers of samples."""
        if self._text.tokenizer is not self.tokenizer:
            self._text, self._ids = TextEncoder(self.tokenizer), {}  # another model's
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
        """Ids of what template, prompts and config say; control tokens in it are those tokens.

        They are kept: a task has few prompts, and every row of every batch has one.
        """
        tokenizer = self.text.tokenizer  # first, as it forgets another one's
        ids = self._ids.get(text)
        if ids is None:
            if len(self._ids) >= KEPT_TEXTS:
                self._ids.clear()
            ids = self._ids[text] = tokenizer.encode(text, add_special_tokens=False)
        return list(ids)

    def answer_ids(self, text: str) -> list[int]:
        """The answer's ids with the end token.

        An end that is text is tokenized in one piece with the answer, as SALMONN's trainers do, and is not written
        twice where the answer has it already. Only where an answer is cut it stands alone.
        """
        if self.end.text and not self.end.tail:
            text = text.removesuffix(self.end.text)
        text = self.lead + text
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
        if self.prompts.template.endswith(" "):
            after = after.removesuffix(" ")  # the answer's own, see `templates`
        before_ids = self.prompt_ids(before, sample.question)
        if before_ids[: len(self.bos_ids)] != self.bos_ids:  # a template may write it itself
            before_ids = self.bos_ids + before_ids
        return Row(before_ids, num_audio_tokens, self.prompt_ids(after, sample.question), answer)

    def _answer(self, sample: Sample) -> list[int]:
        return self.answer_ids(sample.text) if sample.answer_ids is None else list(sample.answer_ids)
