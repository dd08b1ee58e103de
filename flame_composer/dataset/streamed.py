"""JSON files of one object with a long list in it, written an element at a time.

plan.json, manifest.json and index.json of a large dataset have hundreds of megabytes, and take
several times that as Python objects. The bytes are those that `dump_json` makes of the whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flame_composer.storage.files import dump_json

AT_ONCE = 1000  # elements that are written together

# As `dump_json` does, which makes a new encoder in every call
element_json = json.JSONEncoder(sort_keys=True).encode


def object_parts(content: dict[str, Any], name: str, elements: Iterable[str]) -> Iterator[bytes]:
    """Yield, in parts, the JSON of `content` with a list under `name`, given as elements of JSON.

    No text in `content` after that key, by the order of the alphabet, may hold the same key.
    """
    before, key, after = dump_json({**content, name: []}).decode().rpartition(f'"{name}": []')
    assert key, name
    yield f'{before}"{name}": ['.encode()
    separator = ""
    elements = iter(elements)
    while some := list(islice(elements, AT_ONCE)):
        yield (separator + ", ".join(some)).encode()
        separator = ", "
    yield f"]{after}".encode()


class Spool:
    """Short pieces of data by number, kept in a new temporary file instead of in memory."""

    def __init__(self, path: Path, count: int):
        self.file = path.open("x+b", buffering=1 << 20)
        self.places = np.zeros((count, 2), np.int64)  # where each begins and ends
        self.size = 0

    def put(self, number: int, data: bytes) -> None:
        """Keep a piece of data; an earlier one of the same number is forgotten."""
        self.file.write(data)
        self.places[number] = self.size, self.size + len(data)
        self.size += len(data)

    def get(self, number: int) -> bytes:
        """Return the piece of this number, or b"" if none was kept."""
        self.file.flush()
        start, end = self.places[number].tolist()
        return os.pread(self.file.fileno(), end - start, start)
