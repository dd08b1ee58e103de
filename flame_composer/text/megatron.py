"""Megatron's files of tokens: a .bin with the tokens, and an .idx that says where documents are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.text.given_tokens import (
    DTYPES,
    Ranges,
    TokenDocument,
    Vocabulary,
    changed,
    read_bordered,
    require_known,
)
from flame_composer.text.sources import Slice
from flame_composer.text.unpacking import BLOCK, open_input, reading

INDEX = b"MMIDIDX\x00\x00"
HEADER = 34  # bytes of an index before its numbers
AT_A_TIME = 1 << 17  # numbers of an index
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


def slice_index(path: str, stat: files.Stat, vocabulary: Vocabulary, max_bytes: int) -> list[Slice]:
    """Return a .bin file in slices of its documents.

    Raise ConfigError if it has no index, or one of another type, and DataError if the index does
    not say where each of its tokens belongs. The index is read in blocks: it may have gigabytes.
    """
    name = _index_of(path)
    found = files.stat(name)
    if found is None:
        raise ConfigError(
            f"source: {path}: there is no {name}, which says where documents begin; a raw file"
            " whose documents end with eos must be named .npy"
        )
    with open_input(name, None, found.version, BLOCK) as file:
        header = _read_header(path, file.read(HEADER), vocabulary)
    if found.size not in (header.size, header.size + header.sequences):
        raise DataError(
            f"{name}: damaged: it has {found.size:,} bytes, and must have {header.size:,}; fetch"
            " the file again"
        )
    start = reading(path, lambda path: files.read_start(path, BLOCK))
    usable = len(start) // vocabulary.item
    tokens = np.frombuffer(start, DTYPES[vocabulary.dtype], usable)
    require_known(path, tokens, 0, vocabulary)
    ranges = Ranges(max_bytes)
    parts: list[Slice] = []

    def add(first: int, last: int, num_bytes: int) -> None:
        parts.append(
            Slice(path, "megatron", first, last, num_bytes, stat.version, beside=found.version)
        )

    try:
        for ends in _ends(name, found.version, header, vocabulary.item, stat.size):
            for each in ranges.closed(ends):
                add(*each)
    except _WrongIndex:
        raise DataError(
            f"{name}: damaged: its documents are not the {stat.size:,} bytes of {path}; fetch the"
            " file again"
        ) from None
    for each in ranges.rest():
        add(*each)
    return parts


class _WrongIndex(Exception):
    """An index that does not fit its tokens."""


def _ends(
    name: str, version: str | None, header: Header, item: int, size: int
) -> Iterator[NDArray[np.int64]]:
    """Yield where documents end, in bytes, some of them at a time.

    Raise _WrongIndex unless the sequences follow one another up to `size`, and the documents too.
    """
    num_sequences = header.sequences
    with ExitStack() as stack:

        def numbers(kind: str, count: int, at: int) -> Iterator[NDArray[np.int64]]:
            file = stack.enter_context(open_input(name, None, version, BLOCK))
            file.seek(at)
            for first in range(0, count, AT_A_TIME):
                length = min(AT_A_TIME, count - first) * np.dtype(kind).itemsize
                data = file.read(length)
                if len(data) != length:
                    raise _WrongIndex
                yield np.frombuffer(data, kind).astype(np.int64)

        sizes = numbers("<i4", num_sequences, HEADER)
        pointers = numbers("<i8", num_sequences, HEADER + 4 * num_sequences)
        borders = numbers("<i8", header.borders, HEADER + 12 * num_sequences)
        border = seen = end = 0
        waiting = next(borders, np.ones(1, np.int64))
        if waiting[0] != 0:
            raise _WrongIndex
        waiting = waiting[1:]
        for some, starts in zip(sizes, pointers, strict=True):
            ends = np.concatenate([[end], end + np.cumsum(some) * item])
            if (some < 0).any() or not np.array_equal(starts, ends[:-1]):
                raise _WrongIndex
            next_seen = seen + len(some)
            while True:
                if len(waiting) == 0:
                    waiting = next(borders, waiting)
                if (np.diff(waiting, prepend=border) < 0).any():
                    raise _WrongIndex
                num = int(np.searchsorted(waiting, next_seen, side="right"))
                if num == 0:
                    break
                yield ends[waiting[:num] - seen]
                border, waiting = int(waiting[num - 1]), waiting[num:]
            seen, end = next_seen, int(ends[-1])
        if end != size or border != num_sequences or len(waiting):
            raise _WrongIndex


def _read_part(part: Slice, vocabulary: Vocabulary) -> tuple[int, NDArray[np.int64]]:
    """Return the byte at which a slice begins, and the tokens of each of its documents.

    Only the slice's share of the index is read.
    """
    count = part.end - part.start
    with open_input(_index_of(part.path), None, part.beside, BLOCK) as file:

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
    position, lengths = _read_part(part, vocabulary)
    one_by_one = itertools.chain.from_iterable(
        lengths[first : first + AT_A_TIME].tolist() for first in range(0, len(lengths), AT_A_TIME)
    )
    with open_input(part.path, None, part.version, min(8 << 20, part.num_bytes + BLOCK)) as file:
        yield from read_bordered(
            file,
            part,
            0,
            position // vocabulary.item,
            one_by_one,
            vocabulary,
            on_damage,
            max_bytes,
        )
