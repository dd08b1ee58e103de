"""torch 2.7.0: its reader of untrusted pickles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import _weights_only_unpickler

MOST_IN_KEY = 10_000  # the most parts of a dict's key; a text or a number has none


class CheckedKeys(_weights_only_unpickler.Unpickler):
    """A reader of pickles that refuses keys which are endlessly nested tuples."""

    def __init__(self, file: Any, *args: Any, **options: Any):
        super().__init__(file, *args, **options)
        unchecked = self.read

        def read(number: int) -> bytes:
            data = unchecked(number)
            # This opcode sets one item of a dict. Other data may contain the same byte, which is
            # harmless.
            if data == b"s":
                self._require_light(self.stack[-2:-1])
            elif data in (b"u", b"R"):  # several items; a function's result, maybe a dict
                self._require_light(self.stack[-1:] if data == b"R" else self.stack[::2])
            return data

        self.read = read

    def _require_light(self, keys: list[Any]) -> None:
        for key in keys:
            nested, number = [key], 0
            while nested:
                each = nested.pop()
                if isinstance(each, tuple | list):
                    number += len(each)
                    nested += each
                if number > MOST_IN_KEY:
                    raise ValueError("a key of a dict in it has no end")


@contextlib.contextmanager
def checked_keys() -> Iterator[None]:
    """Make torch read pickles without keys that are endlessly nested tuples.

    A pickle with such a key raises ValueError.

    Upstream: torch 2.7.0, `torch._weights_only_unpickler.Unpickler`.
    Mends: to put a key in a dict, Python hashes all of it. That takes forever if each tuple holds
    the one before it twice, and exhausts the stack, which ends the process, if the tuples are
    deeply nested.
    """
    before = _weights_only_unpickler.Unpickler
    _weights_only_unpickler.Unpickler = CheckedKeys  # type: ignore[misc]
    try:
        yield
    finally:
        _weights_only_unpickler.Unpickler = before  # type: ignore[misc]
