"""Marks that a template puts around what an assistant generates, and that are taken out again."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple


class Rendered(NamedTuple):
    """A conversation as text, and the parts of it within generation marks.

    `spans` holds the first character of each part and the one after its last.
    """

    text: str
    spans: list[tuple[int, int]]


class TemplateRefuses(Exception):
    """The error for a conversation that a template does not render; the message says why."""


BEGIN, END = "\ue000", "\ue001"  # a mark begins with; its hash and its part's number follow


MARK = re.compile(rf"([{BEGIN}{END}])([0-9a-f]{{32}})\.([0-9]+);")


class Marks:
    """The marks around the generated parts of a text, and how many parts have got them."""

    def __init__(self) -> None:
        self.digest, self.count = "", 0

    def renew(self, conversation: str) -> None:
        """Take marks that the conversation cannot hold, as they are made of its hash.

        They are the same whenever the conversation is rendered. A template that prints a piece of a
        mark would otherwise make another text each time.
        """
        self.digest = hashlib.blake2b(
            conversation.encode(errors="surrogatepass"), digest_size=16
        ).hexdigest()
        self.count = 0

    def put(self, part: str) -> str:
        """Return the part with marks around it."""
        around = f"{self.digest}.{self.count};"
        self.count += 1
        return f"{BEGIN}{around}{part}{END}{around}"

    def taken_out(self, text: str) -> Rendered:
        """Return the text without marks, and where the marked parts are.

        Raise TemplateRefuses unless all of them are there in their order, each once and whole.
        """
        if not self.count:
            return Rendered(text, [])
        places = [each for each in MARK.finditer(text) if each[2] == self.digest]
        found = [(each[1], each[3]) for each in places]
        if found != [(mark, str(part)) for part in range(self.count) for mark in (BEGIN, END)]:
            raise TemplateRefuses(
                "a part within {% generation %} is changed, moved, left out, written twice or"
                " within another"
            )
        texts: list[str] = []
        ends: list[int] = []
        start = length = 0
        for each in places:
            texts.append(text[start : each.start()])
            length += len(texts[-1])
            ends.append(length)
            start = each.end()
        spans = list(zip(ends[0::2], ends[1::2], strict=True))
        return Rendered("".join((*texts, text[start:])), spans)
