"""Documents read from input files, one after another, always in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from flame_composer.errors import DataError
from flame_composer.text import hub, parquet
from flame_composer.text.formats import UTF8_BOM, other_kind
from flame_composer.text.jsonl import InvalidRecord, columns, kind_of, text_of
from flame_composer.text.sources import Slice, slice_files
from flame_composer.text.unpacking import BLOCK, Compression, line_at, open_input, skip_line

T = TypeVar("T")

# Larger than real documents. The limit bounds memory: encoders take up to 180 bytes for each byte
# of a text that cannot be cut.
MAX_DOCUMENT_BYTES = 64 << 20


class Document(NamedTuple):
    """A document and the position in its file where it starts.

    The position is a byte offset in the unpacked JSONL file (`line_at` gives the line), or a row
    of a Parquet file or of a dataset's shard, counted from 1. A plain-text file is one document,
    at position 0.
    """

    text: str
    path: str
    position: int


class DamagedRecord(DataError):
    """An error about the JSONL record at byte `position`.

    The line's number is found only when the error is shown, since that means reading the file up
    to that line.
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
    """Yield the documents of `part` in order.

    A document cannot be read if its line is malformed, if its text is missing, not a string or not
    valid UTF-8, or if its text or its line of JSON has more than `max_document_bytes`. For each
    such document, `on_damage` is called with a DataError that names its place; the document is
    skipped if that call returns. Any other damage is raised at once.
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
    """Yield the texts of the files in order, or a sample of them if `max_bytes` is set.

    The sample is made of parts drawn from all over the files until they hold `max_bytes` of text.
    The same files always give the same sample.
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


def open_part(part: Slice) -> AbstractContextManager[BinaryIO]:
    """Open the file of a slice, for reading its decompressed content."""
    # Reading a small part must not fetch the many bytes after it.
    block_size = min(8 << 20, part.num_bytes + 65536)
    return open_input(part.path, part.compression, part.version, block_size)


def _read_text(
    part: Slice, on_damage: Callable[[DataError], None], max_bytes: int
) -> Iterator[Document]:
    with open_part(part) as file:
        data = bytearray()
        while len(data) <= max_bytes and (block := file.read(BLOCK)):
            data += block
    if len(data) > max_bytes:
        on_damage(DataError(f"{part.path}: {_too_long(max_bytes, 'split the file')}"))
        return
    try:
        yield Document(data.removeprefix(UTF8_BOM).decode(), part.path, 0)
    except UnicodeDecodeError as error:
        # The decoder counts its offset from after the byte-order mark.
        offset = error.start + (len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0)
        problem = f"{part.path}: not valid UTF-8 at byte {offset}{other_kind(bytes(data[:512]))}"
        tokens = "set token_dtype if it holds tokens (docs/corpora.md), or "
        remedy = tokens if part.path.endswith((".npy", ".bin")) else ""
        on_damage(DataError(f"{problem}; {remedy}convert the file to UTF-8 or remove it"))


def _read_jsonl(
    part: Slice, text_column: str, on_damage: Callable[[DataError], None], max_bytes: int
) -> Iterator[Document]:
    for text, position in read_lines(
        part, lambda line: text_of(line, text_column), on_damage, max_bytes
    ):
        yield Document(text, part.path, position)


def read_lines(
    part: Slice,
    parse: Callable[[bytes | bytearray], T],
    on_damage: Callable[[DataError], None],
    max_bytes: int,
) -> Iterator[tuple[T, int]]:
    """Yield what `parse` makes of each line of a slice of JSON lines, and the line's position.

    Empty lines are passed over. `on_damage` is called for a line that is longer than `max_bytes`,
    and for one about which `parse` raises InvalidRecord.
    """
    end = None if part.compression is not None else part.end
    with open_part(part) as file:
        position = part.start
        if position > 0:
            file.seek(position - 1)
            # Skip the rest of a record that started in the slice before this one.
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
                    found = parse(line)
                except InvalidRecord as error:
                    on_damage(DamagedRecord(part.path, start, part.compression, str(error)))
                else:
                    del line
                    yield found, start
            position += length


def _read_line(file: BinaryIO, max_bytes: int) -> bytes | bytearray:
    """Return the next line with its line break, or its first `max_bytes` + 1 bytes if it is longer.

    No more than that is held in memory, and only one copy of it.
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
        # A character takes at most four bytes, so most texts need not be encoded to be measured.
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
