"""A tokenizer as `teachers.words` asks for one, on the package `tokenizers` alone."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer


class DeviceTokenizer:
    """What a transformers tokenizer with a fast backend does, as far as prompts, ends and answers need it.

    Args:
        path: the path of `tokenizer.json`.
        special: text of the named tokens, such as `{"eos_token": "</s>"}`; one that there is none of is left out.
    """

    def __init__(self, path: Path, special: dict[str, str]):
        self.name_or_path, self.special = str(path), special
        self.backend_tokenizer = Tokenizer.from_file(str(path))
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_) -> str:
        """The text of ids."""
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(self.special.values()))

    @property
    def all_special_ids(self) -> list[int]:
        return [self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens]

    @property
    def unk_token(self) -> str | None:
        return self.special.get("unk_token")

    @property
    def eos_token(self) -> str | None:
        return self.special.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._find("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._find("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._find("pad_token")

    def _find(self, name: str) -> int | None:
        return self.backend_tokenizer.token_to_id(self.special[name]) if name in self.special else None
