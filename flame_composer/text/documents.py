"""Documents out of input files, one after another, always in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple

import numpy as np

from flame_composer.errors import DataError
from flame_composer.text import hub, parquet
from flame_composer.text.formats import UTF8_BOM, other_kind
from flame_composer.text.jsonl import InvalidRecord, columns, kind_of, text_of
from flame_composer.text.sources import Slice, slice_files
from flame_composer.text.unpacking import BLOCK, Compression, line_at, open_input, skip_line

# More than any text that is met. Encoders take up to 180 bytes of memory for each byte of a text
# that cannot be cut.
MAX_DOCUMENT_BYTES = 64 << 20


class Document(NamedTuple):
    """One document and where it starts: the byte in a JSONL file once it is unpacked (`line_at`
    gives the line), the row in a Parquet file or a dataset's shard, counted from 1; a plain-text
    file is one document, at 0.
    """

    text: str
    path: str
    position: int


class DamagedRecord(DataError):
    """What is wrong with the JSONL record at byte `position`. Only when it is shown is the
    line's number looked for, since that means reading the file up to it.
    """

    def __init__(self, path: str, position: int, compression: Compression | None, reason: str):
        super().__init__(path, position, compression, reason)

    def __str__(self) -> str:
        path, position, compression, reason = self.args
        return f"{path}:{line_at(path, position, compression)}: {reason}"


def _raise(error: DataError) -> None:
    raise error


def read_documents(
    part: Slice,
    text_column: str,
    on_damage: Callable[[DataError], None] = _raise,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Document]:
    """The documents of `part` in order.

    A document that cannot be read (a malformed line, text that is missing, not a string or not
    valid UTF-8, a text or a line of JSON of more than `max_document_bytes`) is given to `on_damage`
    as a DataError that names its place, and left out if that returns. Other damage is raised.
    """
    if part.format == "text":
        return _read_text(part, on_damage, max_document_bytes)
    if part.format == "jsonl":
        return _read_jsonl(part, text_column, on_damage, max_document_bytes)
    read = {"parquet": _read_parquet, "dataset": _read_dataset}[part.format]
    return _short_enough(read(part, text_column, on_damage), on_damage, max_document_bytes)


def sample_texts(
    files: Sequence[str],
    text_column: str,
    max_bytes: int | None,
    on_damage: Callable[[DataError], None] = _raise,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[str]:
    """The texts of the files in order; with `max_bytes`, of parts drawn from all over them until
    they hold that much.

    Always the same sample for the same files.
    """
    parts = slice_files(files, 1 << 20)
    if max_bytes is not None:
        parts = [parts[i] for i in np.random.default_rng(0).permutation(len(parts))]
    num_bytes = 0
    for part in parts:
        for document in read_documents(part, text_column, on_damage, max_document_bytes):
            if max_bytes is not None and num_bytes >= max_bytes:
                return
            num_bytes += len(document.text.encode())
            yield document.text


def _open_part(part: Slice) -> AbstractContextManager[BinaryIO]:
    # A small part is no reason to fetch the many bytes behind it.
    block_size = min(8 << 20, part.num_bytes + 65536)
    return open_input(part.path, part.compression, part.version, block_size)


def _read_text(
    part: Slice, on_damage: Callable[[DataError], None], max_bytes: int
) -> Iterator[Document]:
    with _open_part(part) as file:
        data = bytearray()
        while len(data) <= max_bytes and (block := file.read(BLOCK)):
            data += block
    if len(data) > max_bytes:
        on_damage(DataError(f"{part.path}: {_too_long(max_bytes, 'split the file')}"))
        return
    try:
        yield Document(data.removeprefix(UTF8_BOM).decode(), part.path, 0)
    except UnicodeDecodeError as error:
        # The offset the decoder gives counts from after the byte-order mark.
        offset = error.start + (len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0)
        problem = f"{part.path}: not valid UTF-8 at byte {offset}{other_kind(bytes(data[:512]))}"
        on_damage(DataError(f"{problem}; convert the file to UTF-8 or remove it"))


def _read_jsonl(
    part: Slice, text_column: str, on_damage: Callable[[DataError], None], max_bytes: int
) -> Iterator[Document]:
    end = None if part.compression is not None else part.end
    with _open_part(part) as file:
        position = part.start
        if position > 0:
            file.seek(position - 1)
            # The rest of a record that started in the slice before.
            position += skip_line(file, part.end - position + 1) - 1
        while end is None or position < end:
            line = _read_line(file, max_bytes)
            if not line:
                return
            start, length = position, len(line)
            if length > max_bytes and not line.endswith(b"\n"):
                del line
                length += skip_line(file, None if end is None else end - start - length)
                reason = _too_long(max_bytes, "mend or remove the line")
                on_damage(DamagedRecord(part.path, start, part.compression, reason))
                position += length
                continue
            if start == 0:
                line = line.removeprefix(UTF8_BOM)
            if line and not line.isspace():
                try:
                    text = text_of(line, text_column)
                except InvalidRecord as error:
                    on_damage(DamagedRecord(part.path, start, part.compression, str(error)))
                else:
                    del line
                    yield Document(text, part.path, start)
            position += length


def _read_line(file: BinaryIO, max_bytes: int) -> bytes | bytearray:
    """Return the next line with its end, or its first `max_bytes` and one more if it is longer.

    Of a long one only this much is in memory, once.
    """
    line = file.readline(min(BLOCK, max_bytes + 1))
    if len(line) < BLOCK or line.endswith(b"\n"):
        return line
    pieces = bytearray(line)
    while len(pieces) <= max_bytes and not pieces.endswith(b"\n"):
        piece = file.readline(min(BLOCK, max_bytes + 1 - len(pieces)))
        if not piece:
            break
        pieces += piece
    return pieces


def _short_enough(
    documents: Iterator[Document], on_damage: Callable[[DataError], None], max_bytes: int
) -> Iterator[Document]:
    for document in documents:
        # A character takes four bytes at most.
        if len(document.text) * 4 > max_bytes and len(document.text.encode()) > max_bytes:
            problem = _too_long(max_bytes, "remove the row")
            on_damage(DataError(f"{document.path}: row {document.position}: {problem}"))
        else:
            yield document


def _too_long(max_bytes: int, remedy: str) -> str:
    return f"longer than max_document_bytes={max_bytes}; {remedy}, or raise max_document_bytes"


def _read_parquet(
    part: Slice, text_column: str, on_damage: Callable[[DataError], None]
) -> Iterator[Document]:
    groups = range(part.start, part.end)
    for row, text in parquet.read_texts(part.path, part.version, groups, text_column, on_damage):
        yield Document(text, part.path, row)


def _read_dataset(
    part: Slice, text_column: str, on_damage: Callable[[DataError], None]
) -> Iterator[Document]:
    for row, values in enumerate(hub.read_shard(part.path, part.start), 1):
        if text_column not in values:
            raise DataError(f"{part.path}: no column '{text_column}'; {columns(list(values))}")
        text = values[text_column]
        if isinstance(text, str):
            yield Document(text, part.path, row)
        else:
            place = f"{part.path}: shard {part.start}, row {row}: column '{text_column}'"
            on_damage(
                DataError(
                    f"{place} must be a string, not {kind_of(text)}; name another with"
                    " text_column=..."
                )
            )
