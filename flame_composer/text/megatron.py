"""Megatron's files of tokens: a .bin with the tokens, and an .idx that says where documents are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.text.given_tokens import (
    DTYPES,
    TokenDocument,
    Vocabulary,
    changed,
    require_known,
    whole,
)
from flame_composer.text.sources import Slice
from flame_composer.text.unpacking import BLOCK, open_input, reading

INDEX = b"MMIDIDX\x00\x00"
HEADER = 34  # bytes of an index before its numbers
MOST_SEQUENCES = 1 << 48  # beyond which there are no positions in a file
# The numbers that Megatron's index has for types (megatron/core/datasets/indexed_dataset.py, DType)
INDEX_DTYPES = {1: "uint8", 4: "int32", 8: "uint16"}


class Header(NamedTuple):
    """What an index begins with: the numbers of its sequences and of the borders of documents."""

    sequences: int
    borders: int

    @property
    def size(self) -> int:
        """Return the bytes of the index; some writers add one for each sequence, its modality."""
        return HEADER + 12 * self.sequences + 8 * self.borders


def _index_of(path: str) -> str:
    return f"{path.removesuffix('.bin')}.idx"


def _read_header(path: str, start: bytes, vocabulary: Vocabulary) -> Header:
    """Return what the index of `path` begins with; raise an error if it is none of its tokens."""
    if not start.startswith(INDEX) or len(start) < HEADER:
        raise DataError(
            f"{_index_of(path)}: damaged: it is no index of Megatron's; fetch the file again"
        )
    number, sequences, borders = (
        int(np.frombuffer(start, kind, 1, at)[0])
        for kind, at in (("u1", 17), ("<u8", 18), ("<u8", 26))
    )
    dtype = INDEX_DTYPES.get(number)
    if dtype != vocabulary.dtype:
        raise ConfigError(
            f"token_dtype: {path}: is of {dtype or f'type {number}'} by its index, and not of"
            f" {vocabulary.dtype}"
        )
    return Header(sequences, borders)


def _lengths_of(path: str, size: int, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Return the number of tokens of each document in a .bin file of `size` bytes.

    Raise DataError if its index does not say where each of its tokens belongs.
    """
    name = _index_of(path)
    if files.stat(name) is None:
        raise ConfigError(
            f"source: {path}: there is no {name}, which says where documents begin; a raw file"
            " whose documents end with eos must be named .npy"
        )
    with open_input(name, None) as file:
        data = file.read()
    header = _read_header(path, data, vocabulary)
    damage = f"{name}: damaged: %s; fetch the file again"
    sequences = header.sequences
    if len(data) not in (header.size, header.size + sequences):
        raise DataError(damage % f"it has {len(data):,} bytes, and must have {header.size:,}")
    sizes = np.frombuffer(data, "<i4", sequences, HEADER).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, HEADER + 4 * sequences)
    borders = np.frombuffer(data, "<i8", header.borders, HEADER + 12 * sequences)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    if (
        (sizes < 0).any()
        or not np.array_equal(pointers, ends[:-1] * vocabulary.item)
        or ends[-1] * vocabulary.item != size
        or len(borders) == 0
        or borders[0] != 0
        or borders[-1] != sequences
        or (np.diff(borders) < 0).any()
    ):
        raise DataError(damage % f"its documents are not the {size:,} bytes of {path}")
    return np.diff(ends[borders])


def slice_index(path: str, stat: files.Stat, vocabulary: Vocabulary, max_bytes: int) -> list[Slice]:
    lengths = _lengths_of(path, stat.size, vocabulary)
    start = reading(path, lambda path: files.read_start(path, BLOCK))
    usable = len(start) // vocabulary.item
    tokens = np.frombuffer(start, DTYPES[vocabulary.dtype], usable)
    require_known(path, tokens, 0, vocabulary)
    found: list[Slice] = []
    ends = np.cumsum(lengths) * vocabulary.item
    first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + max_bytes, side="right")))
        num_bytes = int(ends[last - 1]) - begin
        found.append(Slice(path, "megatron", first, last, num_bytes, stat.version))
        first = last
    return found


def _read_part(part: Slice, vocabulary: Vocabulary) -> tuple[int, NDArray[np.int64]]:
    """Return the byte at which a slice begins, and the tokens of each of its documents.

    Only the slice's share of the index is read.
    """
    count = part.end - part.start
    with open_input(_index_of(part.path), None, block_size=BLOCK) as file:

        def numbers(kind: str, how_many: int, at: int) -> NDArray[np.int64]:
            file.seek(at)
            data = file.read(how_many * np.dtype(kind).itemsize)
            if len(data) != how_many * np.dtype(kind).itemsize:
                raise changed(part)
            return np.frombuffer(data, kind).astype(np.int64)

        header = _read_header(part.path, file.read(HEADER), vocabulary)
        if part.end >= header.borders or header.sequences > MOST_SEQUENCES:
            raise changed(part)
        borders = numbers("<i8", count + 1, HEADER + 12 * header.sequences + 8 * part.start)
        first, last = int(borders[0]), int(borders[-1])
        if (np.diff(borders) < 0).any() or first < 0 or last > header.sequences:
            raise changed(part)
        if first == last:
            return 0, np.zeros(count, np.int64)
        sizes = numbers("<i4", last - first, HEADER + 4 * first)
        (begin,) = numbers("<i8", 1, HEADER + 4 * header.sequences + 8 * first).tolist()
    ends = np.concatenate([[0], np.cumsum(sizes)])
    if (sizes < 0).any() or int(ends[-1]) * vocabulary.item != part.num_bytes or begin < 0:
        raise changed(part)
    return begin, np.diff(ends[borders - first])


def read_index(
    part: Slice,
    vocabulary: Vocabulary,
    on_damage: Callable[[DataError], None],
    max_bytes: int,
) -> Iterator[TokenDocument]:
    """Yield the documents of a slice, as `token_files.read_tokens` does."""
    item = vocabulary.item
    position, lengths = _read_part(part, vocabulary)
    with open_input(part.path, None, part.version, min(8 << 20, part.num_bytes + BLOCK)) as file:
        for length in lengths.tolist():
            first = position // item
            pieces: list[NDArray[Any]] = []
            if length * item <= max_bytes:
                file.seek(position)
                data = file.read(length * item)
                if len(data) != length * item:
                    raise changed(part)
                tokens = np.frombuffer(data, DTYPES[vocabulary.dtype])
                require_known(part.path, tokens, first, vocabulary)
                ends_with_eos = len(tokens) and tokens[-1] == vocabulary.eos
                pieces.append(tokens[:-1] if ends_with_eos else tokens)
            yield from whole(part.path, pieces, first, length, item, max_bytes, on_damage)
            position += length * item
