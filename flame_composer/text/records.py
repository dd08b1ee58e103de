"""Whole records read from input files, one after another, always in the same order."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from flame_composer.errors import ConfigError, DataError
from flame_composer.text import hub, parquet
from flame_composer.text.documents import open_part, read_lines
from flame_composer.text.jsonl import InvalidRecord, kind_of, parse
from flame_composer.text.sources import Slice
from flame_composer.text.unpacking import BLOCK

SPACE = " \t\r\n"


class Record(NamedTuple):
    """A record, and the place in its file where it is.

    `position` is a byte offset in the unpacked file for JSON lines; otherwise it is the number of a
    row of a Parquet file, of a dataset's shard or of an element of a JSON array, counted from 1.
    """

    values: dict[str, Any]
    path: str
    position: int


def read_records(
    part: Slice,
    columns: Sequence[str],
    on_damage: Callable[[DataError], None],
    max_record_bytes: int,
) -> Iterator[Record]:
    """Yield the records of `part` in order; of Parquet files, only these columns are read.

    `on_damage` is called for each record that cannot be read, with a DataError that names its
    place; the record is skipped if that call returns. Any other damage is raised at once.
    """
    assert part.format != "text", part.path
    if part.format == "jsonl":
        for values, position in read_lines(part, _object, on_damage, max_record_bytes):
            yield Record(values, part.path, position)
        return
    if part.format == "json":
        yield from _read_array(part, on_damage, max_record_bytes)
        return
    if part.format == "parquet":
        groups = range(part.start, part.end)
        rows = parquet.read_rows(part.path, part.version, groups, columns, on_damage)
    else:
        rows = enumerate(hub.read_shard(part.path, part.start), 1)
    for row, values in rows:
        yield Record(values, part.path, row)


def require_records(part: Slice) -> None:
    """Raise ConfigError if the file is plain text, which holds no records."""
    if part.format == "text":
        raise ConfigError(
            f"source: {part.path}: is plain text, which holds no examples; give JSON lines, a JSON"
            " array (.json) or Parquet"
        )


def _object(line: bytes | bytearray) -> dict[str, Any]:
    values = parse(line)
    if not isinstance(values, dict):
        raise InvalidRecord(
            f"must be a JSON object, not {kind_of(values)}; mend or remove the line"
        )
    return values


def _read_array(
    part: Slice, on_damage: Callable[[DataError], None], max_bytes: int
) -> Iterator[Record]:
    """Yield the objects of a file with one JSON array, of which only a part is in memory."""
    with open_part(part) as file:
        for number, value in enumerate(_elements(file, part.path, max_bytes), 1):
            if isinstance(value, dict):
                yield Record(value, part.path, number)
            else:
                on_damage(
                    DataError(
                        f"{part.path}: element {number}: must be a JSON object, not"
                        f" {kind_of(value)}; mend or remove it"
                    )
                )


def _elements(file: BinaryIO, path: str, max_bytes: int) -> Iterator[Any]:
    """Yield the elements of a JSON array in order. Raises DataError if it is damaged."""
    decode = json.JSONDecoder(parse_int=_whole_number).raw_decode
    text = _Text(file, path)
    text.require("[", "it does not begin with [")
    number = 0
    while text.next() != "]":
        if number:
            text.require(",", f"no comma after element {number}")
        number += 1
        while True:
            try:
                value, length = decode(text.buffer, text.skip())
            except (json.JSONDecodeError, RecursionError) as error:
                # What is cut off at the end of the buffer is no error yet.
                if text.is_whole or isinstance(error, RecursionError):
                    raise text.damaged(f"element {number}: {error}") from None
                if len(text.buffer) - text.at > max_bytes:
                    raise text.damaged(
                        f"element {number}: longer than max_document_bytes={max_bytes}"
                    ) from None
            else:
                # A number may go on beyond the buffer; what follows it shows that it does not.
                if length < len(text.buffer) or text.is_whole:
                    break
            text.fill(2 * (len(text.buffer) - text.at))
        text.at = length
        yield value
    text.at += 1
    text.fill(1)
    if text.skip() < len(text.buffer):
        raise text.damaged("something follows its array")


def _whole_number(digits: str) -> int | float:
    """Return a number; as a float if it has more digits than `int` takes, as `jsonl.parse` does."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


class _Text:
    """The text of a file from a place on, of which `buffer[at:]` has been read."""

    def __init__(self, file: BinaryIO, path: str):
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at, self.is_whole = "", 0, False

    def fill(self, size: int) -> None:
        """Read on until `size` characters are there, or the file ends."""
        self.buffer, self.at = self.buffer[self.at :], 0
        while len(self.buffer) < size and not self.is_whole:
            block = self.file.read(BLOCK)
            self.is_whole = not block
            try:
                self.buffer += self.decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise self.damaged(f"not valid UTF-8 ({error.reason})") from None

    def skip(self) -> int:
        """Pass over white space, and return the place of what follows."""
        while self.at < len(self.buffer) and self.buffer[self.at] in SPACE:
            self.at += 1
        return self.at

    def next(self) -> str:
        """Return the next character that is no white space, or "" at the end of the file."""
        while self.skip() == len(self.buffer) and not self.is_whole:
            self.fill(1)
        return self.buffer[self.at : self.at + 1]

    def require(self, character: str, problem: str) -> None:
        if self.next() != character:
            raise self.damaged(problem)
        self.at += 1

    def damaged(self, problem: str) -> DataError:
        return DataError(f"{self.path}: not valid JSON: {problem}; mend the file")
