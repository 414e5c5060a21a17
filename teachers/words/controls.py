"""Control tokens of a tokenizer, and text that only spells one: it stays text. Knows no model and no prompt.

A control token is one that a tokenizer has added as special (`</s>`, `<|im_end|>`), or that is written in angle or
square brackets (`<think>`, `[INST]`). Added words and runs of spaces are vocabulary like any other.
"""

import json
import re
from functools import cached_property

MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
UNREACHABLE = "\ufdd0"  # a code point that no text may hold; before a name it keeps the name from being found


class TextEncoder:
    """Turns text into ids; what spells a control token becomes the ids of its letters.

    Args:
        tokenizer: one of transformers', fast or slow.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @cached_property
    def controls(self) -> dict[str, int]:
        """The control tokens by name."""
        added = self.tokenizer.added_tokens_decoder.items()
        found = {t.content: i for i, t in added if t.special or MARKUP.fullmatch(t.content)}
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids))
        return {name: index for name, index in (found | special).items() if name.strip()}

    @cached_property
    def pattern(self) -> re.Pattern:
        """Finds the names of control tokens, the longest first; nothing where there are none."""
        names = sorted(self.controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) if names else "(?!)")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, of which none is a control token.

        Raises:
            ValueError: the tokenizer has no way to write such a text.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not self._holds_control(ids, text):
            return ids
        if getattr(self.tokenizer, "backend_tokenizer", None) is not None:
            ids = self._plain_backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if self.tokenizer.unk_token is None and self._holds_control(ids, text):
            raise ValueError(
                f"text {text!r:.80} spells a control token of {self.tokenizer.name_or_path}, but this tokenizer cannot "
                f"write it letter by letter; change the text."
            )
        return ids

    def _holds_control(self, ids: list[int], text: str) -> bool:
        unknown = self.tokenizer.unk_token
        legal = {self.controls[unknown]} if unknown in self.controls and unknown not in text else set()
        return not set(ids).isdisjoint(set(self.controls.values()) - legal)

    @cached_property
    def _plain_backend(self):
        """The same tokenizer whose control tokens have names that no text holds; their ids stay theirs."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state |= {"post_processor": None, "truncation": None, "padding": None}
        for token in state["added_tokens"]:
            token["content"] = self._hide(token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._hide(piece): index for piece, index in model["vocab"].items()}
        else:  # a unigram model's pieces and scores
            model["vocab"] = [[self._hide(piece), score] for piece, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._hide(model["unk_token"])
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if self._is_free(pair)]
        return Tokenizer.from_str(json.dumps(state))

    def _hide(self, piece: str) -> str:
        return UNREACHABLE + piece if piece in self.controls else piece

    def _is_free(self, pair: list[str] | str) -> bool:
        parts = pair.split(" ") if isinstance(pair, str) else pair
        return not any(piece in self.controls for piece in (*parts, "".join(parts)))
