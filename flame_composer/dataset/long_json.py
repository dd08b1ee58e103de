"""A JSON object with one list that may be too long to be in memory at once."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

BLOCK = 1 << 20  # bytes that are read at a time

_decode = json.JSONDecoder().raw_decode
_SPACE = " \t\n\r"
_ENDS = (*_SPACE, ",", ":", "]", "}")  # what comes after a value


class Readable(Protocol):
    """What bytes can be read from, of which there are none at its end."""

    def read(self, size: int, /) -> bytes: ...


class LongJson:
    """A reader of a JSON object whose list under one key is given item by item."""

    def __init__(self, file: Readable, key: str, take: Callable[[Any], None]):
        """Read from `file`, and give each item of the list under `key` to `take`.

        `rest` then holds the other keys and their values, and None under `key` if it was there and
        no list. Raises ValueError or RecursionError for what is not JSON, no object, or has `key`
        twice, after some items may have been given.
        """
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._is_over = "", 0, False
        self.rest: dict[str, Any] = {}
        self._read(key, take)

    def _read(self, key: str, take: Callable[[Any], None]) -> None:
        self._expect("{")
        if self._skip() == "}":
            self._at += 1
        else:
            while True:
                name = self._value()
                if not isinstance(name, str):
                    raise ValueError("a key is not a text")
                self._expect(":")
                if name == key and name in self.rest:
                    raise ValueError(f"{key!r} is there twice")
                if name == key and self._skip() == "[":
                    self.rest[name] = []
                    for item in self._items():
                        take(item)
                else:
                    self.rest[name] = self._value()
                if self._skip() != ",":
                    break
                self._at += 1
                self._skip()
            self._expect("}")
        if self._skip():
            raise ValueError("more follows its end")

    def _items(self) -> Iterator[Any]:
        self._at += 1
        if self._skip() == "]":
            self._at += 1
            return
        while True:
            yield self._value()
            mark = self._skip()
            self._at += 1
            if mark == "]":
                return
            if mark != ",":
                raise ValueError("a list has neither a comma nor its end")

    def _value(self) -> Any:
        self._skip()
        while True:
            try:
                value, end = _decode(self._text, self._at)
                # A number may go on in the next block, also after a part that is a number.
                if self._is_over or self._text[end : end + 1] in _ENDS:
                    self._at = end
                    return value
            except ValueError:
                if self._is_over:
                    raise
            self._more()

    def _skip(self) -> str:
        """Go to the next character that is no space, and return it; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._is_over:
                return ""
            self._more()

    def _expect(self, mark: str) -> None:
        if (found := self._skip()) != mark:
            raise ValueError(f"expected {mark!r}, found {found or 'the end'!r}")
        self._at += 1

    def _more(self) -> None:
        """Read on, at least as much as is there, so that a long value is not tried too often."""
        block = self._file.read(max(BLOCK, len(self._text) - self._at))
        self._is_over = not block
        self._text = self._text[self._at :] + self._decoder.decode(block, final=self._is_over)
        self._at = 0
