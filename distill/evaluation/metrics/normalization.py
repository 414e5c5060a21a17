"""What texts go through before they are compared: words for error rates, whole answers for exact match, captions.

Two texts that a reader takes for the same are equal afterwards (case, Unicode forms, typographic apostrophes), and no
two that mean something else: marks of Indic, Arabic or other scripts belong to their letters, a minus sign to its
number. It knows texts, nothing of scores.
"""

import json
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from itertools import groupby
from pathlib import Path

import regex

Normalizer = Callable[[str], str]
# Typographic apostrophes, single quotes and the accents typed for them.
_APOSTROPHES = dict.fromkeys(map(ord, "’‘‛ʼʻ′´`＇"), "'")
_LETTER = r"[\p{L}\p{N}\p{M}_]"


@cache
def _build_normalizer() -> Normalizer:
    """Whisper's English rules: transformers ships them, the list of words is openai/whisper's (MIT; see NOTICE)."""
    # Imported here: transformers takes seconds, and who only shows scores needs none of it.
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(json.loads((Path(__file__).parent / "spelling.json").read_text()))


def is_latin(texts: Iterable[str]) -> bool:
    """Whether most letters of some texts are Latin, which the English rules are made for; also where there is none."""
    whole = "".join(texts)
    return 2 * len(regex.findall(r"\p{Latin}", whole)) >= len(regex.findall(r"\p{L}", whole))


def normalize_text(text: str, english: bool = True) -> str:
    """The words of a text as word error rates compare them, with one space between.

    Args:
        text: an answer or a reference.
        english: Whisper's English rules, the ones papers report with: case, punctuation, contractions, British
            spelling, numbers, no accents. They join spoken digits (`four seven` becomes `47`, one word), so that one
            wrong digit makes the whole number wrong. False: case, punctuation and what stands in brackets only; the
            choice for strings of digits and for other languages, whose letters keep their marks. A language that is
            written without spaces is one word a sentence either way: read its `cer`, not its WER.
    """
    # Whisper's rules look for apostrophes before they compose, know no joiners and soft hyphens, and make a word of an
    # ellipsis at the end
    text = regex.sub(r"\p{Cf}", "", unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)))
    text = regex.sub(r"\.{2,}", " ", text)
    return " ".join((_build_normalizer()(text) if english else _basic_words(text)).split())


def _basic_words(text: str) -> str:
    """As Whisper's basic rules, but marks stay with their letters, where those make spaces of them."""
    text = regex.sub(r"[<\[][^>\]]*[>\]]|\([^)]+?\)", " ", _fold(text))  # [laughter], (laughs)
    return regex.sub(r"(?<![\p{L}\p{N}\p{M}])\p{M}+|[\p{S}\p{P}\p{Cc}]", " ", text)


def normalize_phones(text: str) -> str:
    """Phones as they are, with one space between and their marks composed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def normalize_answer(text: str) -> str:
    """An answer as exact match compares it: without case, quotes, brackets (what is in them stays) and sentence signs.

    What says something stays: letters with their marks, symbols, a minus before a number or behind a letter (`B-`),
    the point or colon inside a number, articles. An answer of signs alone stays as it is.
    """
    whole = " ".join(regex.sub(r"\p{Cf}", "", _fold(_compose(text.translate(_APOSTROPHES)))).split())
    whole = regex.sub(r"[\p{Pd}−]", "-", whole)
    plain = regex.sub(r"<([^<>]*\w[^<>]*)>", r" \1 ", whole)
    plain = regex.sub(r"""(?<!\w)(['"])(.+?)\1(?!\w)""", r" \2 ", plain)
    plain = regex.sub(r"(?<=\p{L}\p{M}*)-(?=\p{L})|(?<!\S)-(?=\s+\D|\s*$)", " ", plain)  # twenty-one; yes - no
    plain = regex.sub(r"(?<!\S)-\s+(?=\d)", "-", plain)  # - 5
    plain = regex.sub(r"(?<!\w)'|'(?!\w)(?<!\d')", " ", plain)  # dogs'; but it's, and 5'
    plain = regex.sub(r"""(?<!\d)"|[\p{Ps}\p{Pe}\p{Pi}\p{Pf}]""", " ", plain)
    plain = regex.sub(r"(?<!\d)[,:]|[,:](?!\d)|\.(?!\d)|(?<=\p{L}\p{M}*)\.", " ", plain)  # but 3.5, 5:30
    plain = regex.sub(r"""[\p{Po}--[\-.,:'"#%&@*/\\§†‡‰‱]]""", " ", plain, flags=regex.V1)
    return " ".join(plain.split()) or whole


def split_caption(caption: str) -> tuple[str, ...]:
    """Lower-case words, numbers and symbols without punctuation, as caption scores count them.

    The cuts are those of the Penn Treebank, which the COCO tools make with Stanford's Java tokenizer: `dog's` is `dog`
    and `'s`, `isn't` is `is` and `n't`, `high-pitched` stays whole. They differ in brackets, which those count as
    words by an oversight, and in rare cuts (`speaking.then`, `rock'n'roll`).
    """
    text = unicodedata.normalize("NFC", caption.translate(_APOSTROPHES)).lower()
    text = regex.sub(rf"(?<={_LETTER})(n't)(?!{_LETTER})", r" \1", text)
    text = regex.sub(rf"(?<=\p{{L}}\p{{M}}*)'(?=(?:s|re|ve|ll|d|m)(?!{_LETTER}))", " '", text)
    text = regex.sub(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b", _with_space, text)
    word = rf"{_LETTER}+(?:(?:[-/@']|(?<=\d)[.,:](?=\d)){_LETTER}+)*"
    return tuple(
        regex.findall(rf"(?:\p{{L}}\.){{2,}}|(?<!\S)(?:n't|'(?:s|re|ve|ll|d|m))(?!\S)|{word}|[\p{{S}}%&*#@]", text)
    )


def _with_space(match: regex.Match) -> str:
    return " ".join(part for part in match.groups() if part is not None)


def _fold(text: str) -> str:
    """Without case, and composed again."""
    return unicodedata.normalize("NFC", text.casefold())


def _compose(text: str) -> str:
    """NFKC, which makes full-width letters and ligatures plain ones, but leaves raised digits: `x²` is no `x2`."""
    groups = groupby(unicodedata.normalize("NFC", text), key=_is_raised)
    return "".join("".join(g) if raised else unicodedata.normalize("NFKC", "".join(g)) for raised, g in groups)


def _is_raised(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(("<super>", "<sub>"))
