"""Documents out of JSONL, Parquet and plain-text files, compressed or not, always in the same order."""

from __future__ import annotations

import bz2
import errno
import functools
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from flame_composer import hub, storage
from flame_composer.config import ConfigError, DataError

Format = Literal["jsonl", "parquet", "text", "dataset"]

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json-lines": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # after another suffix; .json before one of these is JSONL, as C4 has it
FOUND = (*FORMATS, *(f"{inner}{outer}" for inner in (*FORMATS, ".json") for outer in COMPRESSED))
UTF8_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One document and where it starts: the byte in a JSONL file once it is unpacked (`line_at` gives the line), the row
    in a Parquet file or a dataset's shard, counted from 1; a plain-text file is one document, at 0."""

    text: str
    path: str
    position: int


@dataclass(frozen=True)
class Slice:
    """Part of one input file.

    `start` and `end` are byte offsets in JSONL (a record belongs to the slice it starts in), row groups in Parquet
    shards in a dataset, and the whole file, 0 and its size, in plain text and where it is compressed. `num_bytes` is its
    share of the file's size. `version` is that of a file in an object store, such as its ETag.
    """

    path: str
    format: Format
    start: int
    end: int
    num_bytes: int
    version: str | None = None


def _raise(error: DataError) -> None:
    raise error


def find_files(sources: Sequence[str], suffixes: Sequence[str] = ()) -> list[str]:
    """The files that `sources` (files, folders, globs, also as URLs) name, each once: in the order of the sources, sorted
    by path within each.

    Folders are searched recursively for files that end in one of `suffixes`, or in a known suffix (`FOUND`) if there
    are none; names that begin with a dot are left out. A file or glob takes what it names, whatever its suffix.

    Raises ConfigError for a source that is missing or in which there is nothing to read.
    """
    wanted = tuple(suffixes) or FOUND
    named = ", ".join(suffixes or FORMATS) + ("" if suffixes else f" (or compressed, {', '.join(COMPRESSED)})")
    files: dict[str, None] = {}
    for source in sources:
        is_folder = os.path.isdir(source)
        if storage.is_url(source):
            found, is_folder = _find_remote(source, wanted)
        elif is_folder:
            found = _walk(source, wanted)
        elif os.path.exists(source):
            found = [source]
        elif glob.has_magic(source):
            found = [path for path in glob.glob(source, recursive=True) if os.path.isfile(path)]
        else:
            found = []
        if not found and is_folder:
            raise ConfigError(
                f"source: {source}: this folder holds no file ending in {named}; name the endings to take with suffixes=[...]"
            )
        if not found and glob.has_magic(source):
            raise ConfigError(f"source: {source}: no file matches this pattern")
        if not found:
            may_be_id = re.fullmatch(r"[\w-]+/[\w.-]+", source)
            hint = "; for a Hugging Face dataset give split=train as well" if may_be_id else ""
            raise ConfigError(f"source: {source}: no such file or folder{hint}")
        files.update(dict.fromkeys(sorted(found if storage.is_url(source) else map(os.path.normpath, found))))
    return list(files)


def _find_remote(source: str, suffixes: tuple[str, ...]) -> tuple[list[str], bool]:
    """The files, and whether `source` is a folder."""
    if storage.stat(source) is not None:
        return [source], False
    if glob.has_magic(source):
        found = storage.glob(source)  # in which `*` stands for a leading dot too
        return [path for path in found if "/." in source or "/." not in path], False
    names = list(storage.find(source))
    taken = [name for name in names if name.endswith(suffixes) and not any(part.startswith(".") for part in name.split("/"))]
    return [storage.join(source, name) for name in taken], bool(names)


def _walk(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    paths: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in names if name.endswith(suffixes) and not name.startswith(".")]
    return paths


def format_of(path: str) -> Format:
    """The format a file is read in, by its suffix; every unknown suffix is plain text."""
    if hub.is_dataset(path):
        return "dataset"
    name = Path(path)
    suffix, inner = name.suffix.lower(), Path(name.stem).suffix.lower()
    if suffix in (".zip", ".tar", ".tgz", ".7z") or (suffix in COMPRESSED and inner in (".tar", ".parquet")):
        raise ConfigError(f"source: {path}: archives and packed Parquet files cannot be read; unpack it first")
    if suffix not in COMPRESSED:
        return FORMATS.get(suffix, "text")
    return "jsonl" if inner == ".json" else FORMATS.get(inner, "text")


def is_compressed(path: str) -> bool:
    return Path(path).suffix.lower() in COMPRESSED


def slice_file(path: str, max_bytes: int) -> list[Slice]:
    """The file in slices of about `max_bytes` each: byte ranges of JSONL, row groups of Parquet; any other file whole.

    Of a dataset (`hub.address`), each shard; their sizes are not known, and taken for `max_bytes`.
    """
    kind = format_of(path)
    if kind == "dataset":
        return [Slice(path, kind, shard, shard + 1, max_bytes) for shard in range(hub.open_dataset(path).num_shards)]
    stat = _reading(path, storage.stat)
    if stat is None:
        raise DataError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
    size, version = stat.size, stat.version
    if kind == "jsonl" and not is_compressed(path):
        starts = range(0, size, max_bytes)
        sizes = [min(max_bytes, size - start) for start in starts]
        return [Slice(path, kind, start, start + n, n, version) for start, n in zip(starts, sizes, strict=True)]
    if kind == "parquet":
        metadata = _open_parquet(path, version).metadata
        parts: list[Slice] = []
        start = num_bytes = 0
        for group in range(metadata.num_row_groups):
            num_bytes += metadata.row_group(group).total_byte_size
            if num_bytes >= max_bytes or group + 1 == metadata.num_row_groups:
                parts.append(Slice(path, kind, start, group + 1, num_bytes, version))
                start, num_bytes = group + 1, 0
        return parts
    return [Slice(path, kind, 0, size, size, version)]


def slice_files(files: Sequence[str], max_bytes: int) -> list[Slice]:
    """The slices of each file in order; many files at a time are looked at if they are in an object store."""
    slices = functools.partial(slice_file, max_bytes=max_bytes)
    each = storage.each(slices, files) if any(map(storage.is_url, files)) else map(slices, files)
    return [part for parts in each for part in parts]


def sample_texts(
    files: Sequence[str], text_column: str, max_bytes: int | None, on_damage: Callable[[DataError], None] = _raise
) -> Iterator[str]:
    """The texts of the files in order; with `max_bytes`, of parts drawn from all over them until they hold that much.

    Always the same sample for the same files.
    """
    parts = slice_files(files, 1 << 20)
    if max_bytes is not None:
        parts = [parts[i] for i in np.random.default_rng(0).permutation(len(parts))]
    num_bytes = 0
    for part in parts:
        for document in read_documents(part, text_column, on_damage):
            if max_bytes is not None and num_bytes >= max_bytes:
                return
            num_bytes += len(document.text.encode())
            yield document.text


def read_documents(part: Slice, text_column: str, on_damage: Callable[[DataError], None] = _raise) -> Iterator[Document]:
    """The documents of `part` in order.

    A document that cannot be read (a malformed line, text that is missing, not a string or not valid UTF-8) is given
    to `on_damage` as a DataError that names its place, and left out if that returns. Other damage is raised.
    """
    if part.format == "text":
        return _read_text(part, on_damage)
    read = {"jsonl": _read_jsonl, "parquet": _read_parquet, "dataset": _read_dataset}[part.format]
    return read(part, text_column, on_damage)


def _read_text(part: Slice, on_damage: Callable[[DataError], None]) -> Iterator[Document]:
    with _open_part(part) as file, _unpacking(part.path):
        data = file.read()
    try:
        yield Document(data.removeprefix(UTF8_BOM).decode(), part.path, 0)
    except UnicodeDecodeError as error:
        # The offset the decoder gives counts from after the byte-order mark.
        offset = error.start + (len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0)
        on_damage(DataError(f"{part.path}: not valid UTF-8 at byte {offset}; convert the file to UTF-8 or remove it"))


def _read_jsonl(part: Slice, text_column: str, on_damage: Callable[[DataError], None]) -> Iterator[Document]:
    with _open_part(part) as file:
        position = part.start
        if position > 0:
            file.seek(position - 1)
            position += len(file.readline()) - 1  # the rest of a record that started in the slice before
        while is_compressed(part.path) or position < part.end:
            with _unpacking(part.path):
                line = file.readline()
            if not line:
                return
            record = line.removeprefix(UTF8_BOM) if position == 0 else line
            if not record.isspace():
                try:
                    yield Document(_jsonl_text(record, text_column), part.path, position)
                except InvalidRecord as error:
                    on_damage(DamagedRecord(part.path, position, str(error)))
            position += len(line)


def _open_part(part: Slice) -> BinaryIO:
    # A small part is no reason to fetch the many bytes behind it.
    return _reading(part.path, functools.partial(_open, version=part.version, block_size=min(8 << 20, part.num_bytes + 65536)))


def _open(path: str, version: str | None = None, block_size: int = 8 << 20) -> BinaryIO:
    """The content of a file, unpacked if it is compressed."""
    suffix = Path(path).suffix.lower()
    file: Any = storage.open_file(path, version, block_size) if storage.is_url(path) else path
    if suffix == ".zst":
        from pyarrow import input_stream

        # Notices a file that was cut short, and reads on where one frame ends and another begins.
        return cast(BinaryIO, io.BufferedReader(input_stream(file, compression="zstd"), 1 << 20))
    openers: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if suffix in openers:
        file = openers[suffix](file)
    return cast(BinaryIO, Path(path).open("rb") if file is path else file)


@contextmanager
def _unpacking(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        what = "damaged" if is_compressed(path) else "cannot be read"
        raise DataError(f"{path}: {what}: {_first_line(error)}; fetch the file again") from None


def line_at(path: str, position: int) -> int:
    """The number, from 1, of the line that starts at byte `position`."""
    line = 1
    with _open(path) as file:
        while position > 0:
            block = file.read(min(position, 1 << 20))
            line += block.count(b"\n")
            position -= len(block)
    return line


class DamagedRecord(DataError):
    """What is wrong with the JSONL record at byte `position`. Only when it is shown is the line's number looked for, since
    that means reading the file up to it."""

    def __init__(self, path: str, position: int, reason: str):
        super().__init__(path, position, reason)

    def __str__(self) -> str:
        path, position, reason = self.args
        return f"{path}:{line_at(path, position)}: {reason}"


class InvalidRecord(Exception):
    """Why a JSONL record has no text."""


def _jsonl_text(line: bytes, text_column: str) -> str:
    try:
        record = json.loads(line.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"not valid UTF-8 at byte {error.start} of the line; mend or remove the line") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"not valid JSON: {error.msg} at column {error.colno}; mend or remove the line") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not valid JSON: {error}; mend or remove the line") from None
    if not isinstance(record, dict):
        raise InvalidRecord(f"must be a JSON object, not {_kind(record)}; mend or remove the line")
    if text_column not in record:
        raise InvalidRecord(f"no column '{text_column}'; {_columns(list(record))}")
    text = record[text_column]
    if not isinstance(text, str):
        raise InvalidRecord(f"column '{text_column}' must be a string, not {_kind(text)}; mend or remove the line")
    # Only an escape can bring a lone surrogate in, which is no text in any encoding.
    if b"\\u" in line and not _encodable(text):
        raise InvalidRecord(f"column '{text_column}' holds half of a surrogate pair; mend or remove the line")
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(part: Slice, text_column: str, on_damage: Callable[[DataError], None]) -> Iterator[Document]:
    import pyarrow as pa

    file = _open_parquet(part.path, part.version)
    names = file.schema_arrow.names
    if text_column not in names:
        raise DataError(f"{part.path}: no column '{text_column}'; {_columns(names)}")
    kind = file.schema_arrow.field(text_column).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind) or pa.types.is_string_view(value_kind)):
        raise DataError(
            f"{part.path}: column '{text_column}' must hold strings, not {kind}; name another column with text_column=..."
        )
    row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
    batches = file.iter_batches(batch_size=256, row_groups=list(range(part.start, part.end)), columns=[text_column])
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{part.path}: damaged after row {row}: {_first_line(error)}; fetch the file again") from None
        if batch is None:
            return
        for value in batch.column(0):
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                on_damage(
                    DataError(
                        f"{part.path}: row {row}: column '{text_column}' is not valid UTF-8 at byte "
                        f"{error.start}; mend or remove the row"
                    )
                )
                continue
            if text is None:
                on_damage(
                    DataError(
                        f"{part.path}: row {row}: column '{text_column}' must be a string, not null; mend or remove the row"
                    )
                )
                continue
            yield Document(text, part.path, row)


def _read_dataset(part: Slice, text_column: str, on_damage: Callable[[DataError], None]) -> Iterator[Document]:
    for row, values in enumerate(hub.read_shard(part.path, part.start), 1):
        if text_column not in values:
            raise DataError(f"{part.path}: no column '{text_column}'; {_columns(list(values))}")
        text = values[text_column]
        if isinstance(text, str):
            yield Document(text, part.path, row)
        else:
            place = f"{part.path}: shard {part.start}, row {row}: column '{text_column}'"
            on_damage(DataError(f"{place} must be a string, not {_kind(text)}; name another with text_column=..."))


def _open_parquet(path: str, version: str | None = None) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = _reading(path, lambda path: storage.open_file(path, version, block_size=0)) if storage.is_url(path) else path
        return _reading(path, lambda _: parquet.ParquetFile(file))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file: {_first_line(error)}; fetch the file again") from None


def _reading(path: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or _first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _columns(names: list[str]) -> str:
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"its columns are: {listed} (name one with text_column=...)" if names else "it has no columns"
