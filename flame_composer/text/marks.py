"""Marks that a template puts around what an assistant generates, and that are taken out again."""

from __future__ import annotations

import hashlib
import itertools
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
        # Between the hashes, each piece but the first begins with the rest of a mark (".0;"), and
        # each but the last ends with the beginning of one.
        piece, *others = text.split(self.digest)
        texts: list[str] = []
        found: list[tuple[str, str]] = []
        for other in others:
            number, _, after = other.partition(";")
            found.append((piece[-1:], number))
            texts.append(piece[:-1])
            piece = after
        if found != [(mark, f".{part}") for part in range(self.count) for mark in (BEGIN, END)]:
            raise TemplateRefuses(
                "a part within {% generation %} is changed, moved, left out, written twice or"
                " within another"
            )
        ends = list(itertools.accumulate(map(len, texts)))
        spans = list(zip(ends[0::2], ends[1::2], strict=True))
        return Rendered("".join((*texts, piece)), spans)
