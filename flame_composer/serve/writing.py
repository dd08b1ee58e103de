"""The text of one answer as its tokens come: what may be shown, and where it ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from flame_composer.use.generate import Pieces

Finish = Literal["stop", "length", "content_filter"]
LONGEST_RUN = 32  # characters that a `*` in a blocked text stands for at most


class TokenScore(NamedTuple):
    """A token with its log probability, and the likeliest tokens in its place with theirs."""

    id: int
    start: int  # where its text begins in the answer, in characters
    logprob: float | None  # None for a first token, which nothing predicts
    top: list[tuple[int, float]]


class Written(NamedTuple):
    """The part of an answer that may be shown now."""

    text: str
    scores: list[TokenScore]
    finish: Finish | None = None


class BlockedTexts:
    """A list of texts that an answer must not hold, in upper or lower case.

    A text that begins or ends with an ASCII letter or digit is found only as a whole word. A `*` in
    a text stands for up to LONGEST_RUN letters and digits: `secret*` is every word that begins so.
    This is a list of words and no more: it knows nothing of meaning, spelling or other alphabets.
    """

    def __init__(self, texts: Sequence[str]):
        self.longest = 0  # characters that have to be known before the first of them is shown
        parts = []
        for text in texts:
            before = r"(?<![0-9A-Za-z_])" if re.match(r"\w", text, re.ASCII) else ""
            after = r"(?![0-9A-Za-z_])" if re.match(r"\w", text[-1], re.ASCII) else ""
            first, star, last = text.partition("*")
            run, length = "", len(first) + len(last)
            if star and last:  # what follows a text need not be known
                run, length = f"[^\\W_]{{0,{LONGEST_RUN}}}", length + LONGEST_RUN
            self.longest = max(self.longest, length)
            parts.append(f"{before}{re.escape(first)}{run}{re.escape(last)}{after}")
        self.pattern = re.compile("|".join(parts), re.IGNORECASE) if parts else None

    def find(self, text: str, start: int = 0) -> tuple[int, int] | None:
        """Return the first and the last place of the first blocked text from `start` on."""
        found = None if self.pattern is None else self.pattern.search(text, start)
        return None if found is None else found.span()


class Answer:
    """The text of an answer, token by token.

    It ends before the first of its stop texts, of which nothing is shown, not even its beginning
    while it may still become one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: list[int],
        stop: Sequence[str],
        blocked: BlockedTexts,
    ):
        """Begin after the tokens of the `prompt`."""
        self.pieces = Pieces(tokenizer, prompt)
        self.stop = stop
        self.blocked = blocked
        self.text = ""
        self.shown = 0  # characters
        self.held: list[TokenScore] = []

    def add(self, token: int, score: TokenScore | None) -> Written:
        """Return what may be shown after another token; `finish` is set if the answer ends."""
        before = len(self.text)
        if score is not None:
            self.held.append(score._replace(start=before))
        self.text += self.pieces.add(token)
        cuts = []
        for text in self.stop:
            place = self.text.find(text, max(0, before - len(text) + 1))
            if place >= 0:
                cuts.append(place)
        if cuts:
            self._cut(min(cuts))
            return self.end("stop")
        found = self._find_blocked()
        if found is not None and found[1] < len(self.text):  # else the word may go on
            return self.end("content_filter")
        return self._show(max(self.shown, len(self.text) - self._unsure()))

    def end(self, finish: Finish) -> Written:
        """Return what remains to be shown of an answer that ends for another reason."""
        found = self._find_blocked()
        if found is not None:
            self._cut(found[0])
            finish = "content_filter"
        shown = self._show(len(self.text))
        # A last character that is not whole is shown by none of its tokens.
        scores, self.held = [*shown.scores, *self.held], []
        return Written(shown.text, scores, finish)

    def _find_blocked(self) -> tuple[int, int] | None:
        return self.blocked.find(self.text, self.shown)

    def _unsure(self) -> int:
        """Return how many characters at the end may be the beginning of what is not shown."""
        least = self.blocked.longest + 1 if self.blocked.longest else 0
        hidden = len(self.text) - self.shown
        longest = min(max((len(text) - 1 for text in self.stop), default=0), hidden)
        for size in range(longest, least, -1):
            if any(text.startswith(self.text[-size:]) for text in self.stop):
                return size
        return least

    def _cut(self, place: int) -> None:
        self.text = self.text[:place]
        self.held = [score for score in self.held if score.start < place]

    def _show(self, end: int) -> Written:
        text, self.shown = self.text[self.shown : end], end
        scores = [score for score in self.held if score.start < end]
        self.held = self.held[len(scores) :]
        return Written(text, scores)
