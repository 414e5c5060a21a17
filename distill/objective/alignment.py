"""Where the tokens of two tokenizers meet in the bytes of one answer.

Bytes and not characters: byte-level BPE and byte fallback may cut a character in two, and a boundary inside it counts
when both tokenizers have it. Knows tokenizers of the `tokenizers` library; no model, no loss.

Shapes: S the answer's tokens on one side, its end tokens among them; M pairs of tokens that match.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teachers.words.ending import End

NO_CHUNK = -1


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _decoder_types(decoder: dict | None) -> set[str]:
    """Names of a serialized decoder and of those it is made of."""
    if decoder is None:
        return set()
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else []
    return {decoder["type"]}.union(*(_decoder_types(part) for part in parts))


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes that each id stands for, in the order of the ids; empty for an id without a token.

    Args:
        tokenizer: a fast transformers tokenizer: byte-level BPE (Llama 3, Qwen), or sentencepiece with or without byte
            fallback (Llama 2, Gemma). An added token stands for its own text.

    Raises:
        ValueError: it is no fast one, or its decoder is of another kind, so that tokens do not concatenate to the text.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer of {tokenizer.name_or_path} is a {type(tokenizer).__name__}, but bytes are known of fast "
            f"tokenizers only; save it with a tokenizer.json."
        )
    types = _decoder_types(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    added = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
    if "ByteLevel" in types:
        alphabet = byte_alphabet()
        read = lambda piece: bytes(alphabet[character] for character in piece)  # noqa: E731
    elif types & {"Metaspace", "Replace", "ByteFallback"}:
        read = lambda piece: _read_sentencepiece(piece, "ByteFallback" in types)  # noqa: E731
    else:
        raise ValueError(
            f"decoder of {tokenizer.name_or_path} is {', '.join(sorted(types)) or 'none'}, but bytes are known of "
            f"byte-level BPE and sentencepiece only; use such a teacher and student."
        )
    ids = tokenizer.get_vocab()
    table = [b""] * (max(ids.values()) + 1)
    for piece, index in ids.items():
        table[index] = added[index] if index in added else read(piece)
    return table


def _read_sentencepiece(piece: str, has_byte_fallback: bool) -> bytes:
    if has_byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def byte_ends(ids: Sequence[int], pieces: Sequence[bytes], text: str) -> list[int]:
    """Where each token of an answer ends in the text's UTF-8 bytes.

    Args:
        ids: the answer's tokens without its end tokens; a cut answer has only its first ones.
        pieces: bytes of every id, from `token_bytes`.
        text: the answer.

    Raises:
        ValueError: the tokens do not spell the text, because the tokenizer normalizes it or lacks a character.
    """
    data, spelled, ends = text.encode(), b"", []
    for index in ids:
        spelled += pieces[index]
        ends.append(len(spelled))
    # Llama 2's sentencepiece puts a space before the first word, whatever the text starts with.
    extra = 1 if spelled.startswith(b" ") and not data.startswith(spelled) else 0
    if not data.startswith(spelled[extra:]):
        raise ValueError(
            f"tokens of the answer spell {spelled[extra:].decode(errors='replace')!r}, but its text is {text!r}; "
            f"write the text as the tokenizer normalizes it (often Unicode NFC)."
        )
    return [max(0, end - extra) for end in ends]


def answer_ends(ids: Sequence[int], pieces: Sequence[bytes], text: str, end: End) -> list[int | None]:
    """Where each token of an answer ends in its bytes: its end tokens one behind the last, or nowhere if it was cut.

    A token that is the answer's last character and the beginning of an end that is text belongs to the end.

    Args:
        ids: the answer's tokens with its end tokens.
        pieces: bytes of every id, from `token_bytes`.
        text: the answer.
        end: the end of its model.

    Raises:
        ValueError: the tokens do not spell the text.
    """
    num_bytes, num_ends = len(text.encode()), len(end.ids)
    if end.text and len(ids) >= len(end.tail):
        whole = text.removesuffix(end.text) + end.text
        try:
            spelled = byte_ends(ids[: len(ids) - len(end.tail)], pieces, whole)
        except ValueError:
            spelled = []  # it was cut, and the end stands alone
        if spelled and spelled[-1] == len(whole.encode()):
            num_bytes = len(whole.encode()) - len(end.text.encode())
            return [n if n <= num_bytes else num_bytes + 1 for n in spelled] + [num_bytes + 1] * len(end.tail)
    said = byte_ends(ids[: len(ids) - num_ends], pieces, text)
    is_whole = (said[-1] if said else 0) == num_bytes
    return said + [num_bytes + 1 if is_whole else None] * num_ends


@dataclass(frozen=True)
class Alignment:
    """The chunks of one answer or of a batch of answers: the shortest spans at whose ends both tokenizers end a token.

    Attributes:
        teacher_chunk_S: the chunk of each teacher token, `NO_CHUNK` after the last common end (a cut answer).
        student_chunk_S: the same of each student token.
        num_chunks: how many chunks there are.
        teacher_single_M: teacher tokens that are the only ones of their chunk on both sides.
        student_single_M: the student's tokens of the same chunks.
    """

    teacher_chunk_S: Tensor
    student_chunk_S: Tensor
    num_chunks: int
    teacher_single_M: Tensor
    student_single_M: Tensor

    @classmethod
    def concatenate(cls, alignments: Sequence["Alignment"]) -> "Alignment":
        """Several answers' tokens, one after the other, as one batch."""
        parts: list[list[Tensor]] = [[], [], [], []]
        chunks = teachers = students = 0
        for one in alignments:
            for part, ids in zip(parts, (one.teacher_chunk_S, one.student_chunk_S)):
                part.append(ids.where(ids == NO_CHUNK, ids + chunks))
            parts[2].append(one.teacher_single_M + teachers)
            parts[3].append(one.student_single_M + students)
            chunks += one.num_chunks
            teachers += len(one.teacher_chunk_S)
            students += len(one.student_chunk_S)
        joined = [torch.cat(part) if part else torch.zeros(0, dtype=torch.long) for part in parts]
        return cls(joined[0], joined[1], chunks, joined[2], joined[3])

    def to(self, device: torch.device | str) -> "Alignment":
        """The same on another device."""
        tensors = (self.teacher_chunk_S, self.student_chunk_S, self.teacher_single_M, self.student_single_M)
        teacher, student, teacher_single, student_single = (x.to(device, non_blocking=True) for x in tensors)
        return Alignment(teacher, student, self.num_chunks, teacher_single, student_single)


def align(
    teacher_ends: Sequence[int],
    student_ends: Sequence[int],
    num_bytes: int,
    num_teacher_end_tokens: int = 1,
    num_student_end_tokens: int = 1,
) -> Alignment:
    """Align two tokenizations of one answer.

    Args:
        teacher_ends: where each of the teacher's tokens ends, in bytes, its end tokens at the tail (their value does
            not matter). Tokens that share an end, as tokenizers report for the parts of one character, are not parted.
        student_ends: the student's.
        num_bytes: length of the answer.
        num_teacher_end_tokens: tokens at the tail that are no text; they are one chunk of their own.
        num_student_end_tokens: the student's.
    """
    teacher = _closing(teacher_ends, num_bytes, num_teacher_end_tokens)
    student = _closing(student_ends, num_bytes, num_student_end_tokens)
    common = sorted(set(teacher) & set(student) - {None})
    teacher_chunk = [_chunk(end, common) for end in teacher]
    student_chunk = [_chunk(end, common) for end in student]
    teacher_of, student_of = _singles(teacher_chunk), _singles(student_chunk)
    singles = sorted(teacher_of.keys() & student_of.keys())
    return Alignment(
        torch.tensor(teacher_chunk, dtype=torch.long),
        torch.tensor(student_chunk, dtype=torch.long),
        len(common),
        torch.tensor([teacher_of[chunk] for chunk in singles], dtype=torch.long),
        torch.tensor([student_of[chunk] for chunk in singles], dtype=torch.long),
    )


def _closing(ends: Sequence[int], num_bytes: int, num_end_tokens: int) -> list[int | None]:
    """The ends, with the end tokens after the last byte, or nowhere when the answer was cut before them."""
    text = list(ends[: len(ends) - num_end_tokens])
    is_whole = (text[-1] if text else 0) == num_bytes
    return text + [num_bytes + 1 if is_whole else None] * num_end_tokens


def _chunk(end: int | None, common: list[int]) -> int:
    index = len(common) if end is None else bisect_left(common, end)
    return NO_CHUNK if index == len(common) else index


def _singles(chunks: list[int]) -> dict[int, int]:
    """Chunk to token, for the chunks of exactly one token."""
    tokens: dict[int, list[int]] = {}
    for token, chunk in enumerate(chunks):
        tokens.setdefault(chunk, []).append(token)
    return {chunk: where[0] for chunk, where in tokens.items() if len(where) == 1 and chunk != NO_CHUNK}
