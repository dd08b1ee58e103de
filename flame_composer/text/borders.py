"""Borders of documents as Dolma's tokenizer writes them: a .csv.gz beside an array of tokens.

Each row is a document, and begins with the numbers of its first token and of the one after its last
(allenai/dolma, tokenizer/memmap_writer.py; allenai/OLMo-core, data/utils.py, writes these two
alone). There is no header. Rows are parsed in blocks, as a file may have many millions.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.text.given_tokens import Ranges, Vocabulary, beside, changed
from flame_composer.text.sources import Slice
from flame_composer.text.unpacking import BLOCK, open_input, reason, stat_of

PACKED_BLOCK = 1 << 17  # bytes of the packed file read at a time
MOST_ROW = 1 << 16  # bytes: a row has two numbers, an id and a path
TOO_LONG = f"is longer than {MOST_ROW:,} bytes"
DIGITS = 18  # more do not fit into 64 bits
GZIP = 31  # zlib's number for a gzip stream
COMMA, BREAK, RETURN, QUOTE = b',\n\r"'


class Place(NamedTuple):
    """A place from which a gzip file can be unpacked: bytes before it, and what unpacks the rest.

    `is_open` says whether the place is within a stream, of which a file may have several.
    """

    packed: int
    unpacked: int
    unpacker: Any
    is_open: bool


class Rows(NamedTuple):
    """Rows that follow one another: where each begins in the unpacked file, and its tokens.

    `places` has one number more than there are rows, where the last one ends.
    """

    places: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class WrongRow(Exception):
    """A row that is none; `number` counts those of its file, or of what is read of it, from 1."""

    def __init__(self, number: int, problem: str):
        super().__init__(problem)
        self.number = number


def slice_borders(
    path: str,
    stat: files.Stat,
    header: int,
    vocabulary: Vocabulary,
    max_bytes: int,
) -> list[Slice]:
    """Return an array of tokens in slices, each with the rows of its documents.

    Raise ConfigError if there is no .csv.gz beside it, and DataError, which names the row, if its
    rows are not all of the array's tokens in order.
    """
    whole = Slice(path, "bordered", 0, 0, stat.size - header, stat.version)
    name = _name_of(whole)
    found = files.stat(name)
    if found is None:
        raise ConfigError(
            f"token_borders=csv: {path}: there is no {name}, which says where documents begin; with"
            " token_borders=eos, they end where an eos is"
        )
    total = whole.num_bytes // vocabulary.item
    parts: list[Slice] = []
    place = end = 0
    ranges = Ranges(max_bytes)

    def add(next_place: int, size: int) -> None:
        nonlocal place
        parts.append(
            Slice(path, "bordered", place, next_place, size, stat.version, beside=found.version)
        )
        place = next_place

    try:
        with _unpacked(whole, found.version) as blocks:
            for rows in _parse(blocks, 0):
                _check(rows, ranges.seen, end, total)
                seen, end = ranges.seen, int(rows.ends[-1])
                for _, next_row, size in ranges.closed(rows.ends * vocabulary.item):
                    add(int(rows.places[next_row - seen]), size)
                last_place = int(rows.places[-1])
        for _, _, size in ranges.rest():
            add(last_place, size)
    except WrongRow as row:
        raise DataError(
            f"{name}: row {row.number:,}: {row}; fetch it and {path} again, or give"
            " token_borders=eos"
        ) from None
    if end != total:
        last = f"row {ranges.seen:,}: is the last one and ends at token {end:,}"
        raise DataError(
            f"{name}: {last if ranges.seen else 'has no rows'}, but"
            f" {path} has {total:,} tokens of {vocabulary.dtype}; fetch both again, give the"
            " token_dtype that it was made with, or token_borders=eos"
        )
    return parts


def read_borders(part: Slice) -> Iterator[int]:
    """Yield the number of a slice's first token, and then the length of each of its documents.

    Raise DataError if they are no longer what they were.
    """
    end = None
    try:
        with _unpacked(part, part.beside) as blocks:
            for rows in _parse(blocks, part.start):
                if end is None:
                    end = int(rows.starts[0])
                    yield end
                _check(rows, 0, end, None)
                end = int(rows.ends[-1])
                yield from (rows.ends - rows.starts).tolist()
                if rows.places[-1] > part.end:
                    raise changed(part)
    except WrongRow:
        raise changed(part) from None
    if end is None:
        raise changed(part)


def _name_of(part: Slice) -> str:
    name = beside(part)
    assert name is not None
    return name


# Unpacking


@functools.lru_cache(maxsize=8)
def _reached(file: tuple[str, str | None, int, float]) -> list[Place]:  # noqa: ARG001 - the key
    """Return the list that keeps where a file's unpacking stopped last in this process.

    The units of a file come one after another, and each would unpack it from its beginning. `file`
    is its name, version, size and time.
    """
    return []


@contextmanager
def _unpacked(part: Slice, version: str | None) -> Iterator[Iterator[bytes]]:
    """Open a slice's rows, packed, and yield blocks of their unpacked bytes.

    With `end` 0, these are all rows. Raise DataError if the file is damaged.
    """
    name = _name_of(part)
    stat = stat_of(name)
    reached = _reached((name, version, stat.size, stat.modified))
    place = next(iter(reached), None)
    if place is None or place.unpacked > part.start:
        place = Place(0, 0, zlib.decompressobj(GZIP), False)
    with open_input(name, None, version, BLOCK) as file:
        try:
            yield _blocks(file, place, part.start, part.end or None, reached)
        except (EOFError, zlib.error) as error:
            raise DataError(f"{name}: damaged: {reason(error)}; fetch the file again") from None


def _blocks(
    file: BinaryIO, place: Place, start: int, end: int | None, reached: list[Place]
) -> Iterator[bytes]:
    for before, block in _unpack(file, place):
        reached[:] = [before]
        first, last = before.unpacked, before.unpacked + len(block)
        if last > start:
            yield block[max(0, start - first) : None if end is None else max(0, end - first)]
        if end is not None and last >= end:
            return


def _unpack(file: BinaryIO, place: Place) -> Iterator[tuple[Place, bytes]]:
    """Yield the unpacked content of a gzip file in blocks, each with the place where it begins."""
    packed, unpacked, unpacker, is_open = place
    unpacker = unpacker.copy()
    file.seek(packed)
    data = b""
    while True:
        if not data:
            data = file.read(PACKED_BLOCK)
            packed += len(data)
            at_end = not data
        if not is_open:
            data = data.lstrip(b"\0")  # padding, as some writers leave it behind a stream
        if at_end:
            if is_open or not packed:
                raise EOFError("it ends in the middle of a stream" if packed else "it is empty")
            return
        if not data:
            continue
        before = Place(packed - len(data), unpacked, unpacker.copy(), is_open)
        block = unpacker.decompress(data, BLOCK)
        is_open = not unpacker.eof
        if is_open:
            data = unpacker.unconsumed_tail
        else:
            data, unpacker = unpacker.unused_data, zlib.decompressobj(GZIP)
        if block:
            yield before, block
            unpacked += len(block)


# Rows


def _parse(blocks: Iterator[bytes], place: int) -> Iterator[Rows]:
    """Yield the rows in blocks of bytes that begin at byte `place`; raise WrongRow for others."""
    rest = b""
    number = 0
    for block in itertools.chain(blocks, (b"",)):
        data = rest + block
        if not block and data and not data.endswith(b"\n"):
            data += b"\n"
        bytes_ = np.frombuffer(data, np.uint8)
        breaks = np.flatnonzero(bytes_ == BREAK)
        if b'"' in data:  # an id may hold line breaks, and is then between quotes
            quotes = np.cumsum(bytes_ == QUOTE, dtype=np.int32)
            breaks = breaks[quotes[breaks] % 2 == 0]
        end = int(breaks[-1]) + 1 if len(breaks) else 0
        rest = data[end:]
        if len(rest) > MOST_ROW:
            raise WrongRow(number + len(breaks) + 1, TOO_LONG)
        if rest and not block:
            raise WrongRow(number + len(breaks) + 1, "has a quote that is not closed")
        if end:
            yield _rows_of(bytes_, breaks, place, number)
            place += end
            number += len(breaks)


def _rows_of(data: NDArray[np.uint8], breaks: NDArray[np.int64], place: int, number: int) -> Rows:
    places = np.concatenate([np.zeros(1, np.int64), breaks + 1])
    too_long = np.diff(places) > MOST_ROW
    if too_long.any():
        raise WrongRow(number + int(too_long.argmax()) + 1, TOO_LONG)
    begins = places[:-1]
    starts, after = _numbers(data, begins)
    is_right = (after > begins) & (after - begins <= DIGITS) & (data[after] == COMMA)
    if is_right.all():
        begins = after + 1
        ends, after = _numbers(data, begins)
        follows = (data[after] == COMMA) | (data[after] == BREAK) | (data[after] == RETURN)
        is_right = (after > begins) & (after - begins <= DIGITS) & follows
    if not is_right.all():
        at = int(np.argmin(is_right))
        row = data[places[at] : min(places[at + 1], places[at] + 40)].tobytes()
        raise WrongRow(
            number + at + 1,
            f"begins with {row.decode('latin-1').rstrip()!a}, and must with the numbers of a first"
            " token and of the one after the last, and a comma between them",
        )
    return Rows(places + place, starts, ends)


def _numbers(
    data: NDArray[np.uint8], at: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the decimal numbers that begin at these places, and where each ends.

    One of more than `DIGITS` digits ends behind the first of those that are too many.
    """
    values = np.zeros(len(at), np.int64)
    for _ in range(DIGITS + 1):
        digits = data[at] - np.uint8(ord("0"))
        is_digit = digits < 10
        if not is_digit.any():
            break
        values = np.where(is_digit, values * 10 + digits, values)
        at = at + is_digit
    return values, at


def _check(rows: Rows, seen: int, end: int, total: int | None) -> None:
    """Raise WrongRow unless rows go on at token `end`, each where the one before it ends.

    `seen` rows come before them, and `total` is the number of tokens that there are.
    """
    before = np.concatenate([[end], rows.ends[:-1]])
    is_right = (rows.starts == before) & (rows.ends >= rows.starts)
    if total is not None:
        is_right &= rows.ends <= total
    if is_right.all():
        if total is not None and seen + len(rows.starts) > total:
            raise WrongRow(total + 1, f"is one more than there are tokens, {total:,}")
        return
    at = int(np.argmin(is_right))
    first, last = int(rows.starts[at]), int(rows.ends[at])
    if first != before[at]:
        problem = (
            f"begins at token {first:,}, and must where the one before it ends, {before[at]:,}"
        )
    elif last < first:
        problem = f"begins at token {first:,} and ends before it, at {last:,}"
    else:
        problem = f"ends at token {last:,}, and there are {total:,}"
    raise WrongRow(seen + at + 1, problem)
