"""Special tokens that are written out in the text of a message."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from flame_composer.text.tokenizer import BareTokenizer


class SpecialTexts:
    """A search for special tokens, and those that end answers, written out in a text.

    The tokenizer would take them for the tokens themselves: an answer could end in its middle.
    """

    def __init__(self, tokenizer: BareTokenizer, normalizer: Any, stop: int):
        """Look for texts as they are, and for those that `normalizer` turns them into.

        Some tokenizers look for added tokens in the text that their normalizer has made, and would
        find one in other letters: wide or large ones, for example.
        """
        ends = stop, tokenizer.bos_token_id, tokenizer.eos_token_id
        found = [
            token
            for token in json.loads(tokenizer.serialized)["added_tokens"]
            if token["content"]
            and (not tokenizer.split_special_tokens if token["special"] else token["id"] in ends)
        ]
        self.pattern = _any_of([token["content"] for token in found])
        later = [token["content"] for token in found if token["normalized"]]
        self.normalizer = normalizer if later else None
        if self.normalizer is not None:
            self.normalized = _any_of([self.normalizer.normalize_str(text) for text in later])

    def search(self, text: str) -> re.Match[str] | None:
        """Return the match of the first special token in a text, or None if there is none."""
        found = self.pattern.search(text)
        if found is None and self.normalizer is not None:
            found = self.normalized.search(self.normalizer.normalize_str(text))
        return found


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
