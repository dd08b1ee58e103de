"""Input files opened and decompressed, so that damage is an error and never a shorter text."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, TypeVar, cast

from flame_composer.errors import DataError
from flame_composer.storage import files

Compression = Literal["gzip", "zstd", "bz2", "xz"]
T = TypeVar("T")

BLOCK = 1 << 20  # bytes read or unpacked at a time
XZ_MEMORY = 1 << 30  # bytes; `xz -9` needs 64 MiB, and a header can ask for 4 GiB


class Streams(io.RawIOBase):
    """The content of a bz2 or xz file, which holds one or several compressed streams in a row.

    Python's own readers of bz2 and xz mistake a stream with a damaged beginning for the end of the
    file. Here it is an error (OSError, LZMAError), and so is a file that ends within a stream or
    holds none (EOFError). In xz files a stream may be followed by zero bytes, a multiple of four.
    """

    def __init__(self, file: BinaryIO, compression: Literal["bz2", "xz"]):
        super().__init__()
        self.file, self.is_xz = file, compression == "xz"
        self.input = b""
        self.num_streams = 0
        self.stream: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.stream is not None or self._begin_stream():
            data = self.stream.decompress(self._input_for_stream(), len(buffer))
            if self.stream.eof:
                self.input, self.stream = self.stream.unused_data, None
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _input_for_stream(self) -> bytes:
        if not self.stream.needs_input:
            return b""
        block, self.input = self.input or self.file.read(BLOCK), b""
        if not block:
            raise EOFError("it ends in the middle of a stream")
        return block

    def _begin_stream(self) -> bool:
        """Prepare to read the next stream. Return False at the end of the file."""
        padding = 0
        self.input = self.input or self.file.read(BLOCK)
        while self.is_xz and self.num_streams and self.input.startswith(b"\0"):
            rest = self.input.lstrip(b"\0")
            padding += len(self.input) - len(rest)
            self.input = rest or self.file.read(BLOCK)
        if padding % 4:
            raise lzma.LZMAError(
                f"{padding} zero bytes after a stream, which must be a multiple of four"
            )
        if not self.input:
            if not self.num_streams:
                raise EOFError("it is empty")
            return False
        if self.is_xz:
            # Old .lzma files are accepted too, but they hold a single stream.
            kind = lzma.FORMAT_XZ if self.num_streams else lzma.FORMAT_AUTO
            self.stream = lzma.LZMADecompressor(kind, memlimit=XZ_MEMORY)
        else:
            self.stream = bz2.BZ2Decompressor()
        self.num_streams += 1
        return True


@contextmanager
def open_input(
    path: str,
    compression: Compression | None,
    version: str | None = None,
    block_size: int = 8 << 20,
) -> Iterator[BinaryIO]:
    """Open a file, local or in an object store, for reading its decompressed content.

    `version` and `block_size` are those of `files.open_file`. Raises DataError, which names
    `path`, if the file cannot be opened or turns out damaged while the body reads it.
    """
    with _explained(path, compression), files.open_file(path, version, block_size) as file:
        if compression is None:
            yield file
            return
        with _unpacked(file, compression) as unpacked:
            yield unpacked


def _unpacked(file: Any, compression: Compression) -> BinaryIO:
    if not file.peek(1):
        raise EOFError("it is empty")
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(file))
    if compression == "zstd":
        from pyarrow import input_stream

        return cast(BinaryIO, io.BufferedReader(input_stream(file, compression="zstd"), BLOCK))
    return cast(BinaryIO, io.BufferedReader(Streams(file, compression), BLOCK))


@contextmanager
def _explained(path: str, compression: Compression | None) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if compression is None or getattr(error, "errno", None) is not None:
            raise DataError(f"{path}: cannot be read: {reason(error)}") from None
        if "Memory usage limit" in str(error) or "too much memory" in str(error):
            raise DataError(
                f"{path}: needs too much memory to be unpacked (a dictionary of more than 1 GiB in"
                " xz, or a window of more than 128 MiB in zstd, as --long makes it); compress it"
                " again with a smaller one"
            ) from None
        raise DataError(f"{path}: damaged: {reason(error)}; fetch the file again") from None
    except ValueError as error:
        if "support range requests" not in str(error):  # fsspec's words, of a web server
            raise
        raise DataError(
            f"{path}: cannot be read: its server ignores ranges; copy the file to this machine"
        ) from None


def reading(path: str, read: Callable[[str], T]) -> T:
    """Return `read(path)`, with an OSError turned into a DataError that names the path."""
    try:
        return read(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None


def stat_of(path: str) -> files.Stat:
    """Return a file's size, time and version; raise DataError if it is not there."""
    stat = reading(path, files.stat)
    if stat is None:
        raise DataError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
    return stat


def reason(error: Exception) -> str:
    """Return the first line of an exception's message, for exceptions of other packages."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def skip_line(file: BinaryIO, most: int | None = None) -> int:
    """Read to the end of the line in pieces, and return the number of bytes read.

    With `most`, reading stops once at least that many bytes are read, even if the line goes on.
    """
    length = 0
    while most is None or length < most:
        piece = file.readline(BLOCK)
        length += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return length


def line_at(path: str, position: int, compression: Compression | None = None) -> int:
    """Return the number of the line that starts at byte `position` of the decompressed file.

    Lines are counted from 1.
    """
    line = 1
    with open_input(path, compression) as file:
        while position > 0:
            block = file.read(min(position, BLOCK))
            line += block.count(b"\n")
            position -= len(block)
    return line
