"""Files of tokens that others have made: raw arrays as OLMo's, and Megatron's .bin with its .idx.

A raw file (.npy) holds tokens end to end, little-endian, with NumPy's header or without, and every
document ends with eos, or where a .csv.gz beside it says. In Megatron's files, the .idx says where
documents begin. Documents are read without their bos and eos, as text is, so that the conversion
alone decides what is put around them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.storage.many import each
from flame_composer.text.borders import read_borders, slice_borders
from flame_composer.text.formats import LFS_POINTER
from flame_composer.text.given_tokens import (
    DTYPES,
    Borders,
    TokenDocument,
    Vocabulary,
    changed,
    read_bordered,
    require_known,
    whole,
)
from flame_composer.text.megatron import read_index, slice_index
from flame_composer.text.sources import Slice, of_each
from flame_composer.text.unpacking import BLOCK, open_input, reading, stat_of

FOUND = (".npy", ".bin")
NUMPY = b"\x93NUMPY"
# What NumPy writes into headers of arrays of numbers: their type, Fortran's order or not, the shape
HEADER = re.compile(
    r"\s*\{\s*'descr'\s*:\s*'([<>|=][a-zA-Z][0-9]{1,2})'\s*,\s*'fortran_order'\s*:\s*(?:True|False)"
    r"\s*,\s*'shape'\s*:\s*\(([0-9, ]*)\)\s*,?\s*\}\s*"
)
MOST_HEADER = 4096  # bytes
LOOKED_AT = 1 << 20  # tokens at the beginning of a file, by which it is judged before anything runs
MOST_EOS = 0.25  # of those tokens: documents of three tokens are no documents


def slice_tokens(
    paths: Sequence[str], vocabulary: Vocabulary, max_bytes: int, borders: Borders = "eos"
) -> list[Slice]:
    """Return the files in slices of about `max_bytes`, after a look at how each begins.

    A slice of a raw file is a range of bytes, of which it has the documents that begin there; one
    of Megatron's, or of a raw file with `borders` "csv", is a range of documents. Raise ConfigError
    for a file whose tokens cannot be those of the vocabulary, and DataError for one that is
    damaged.
    """
    for path in paths:
        if not path.endswith(FOUND):
            raise ConfigError(
                f"source: {path}: with token_dtype, names must end in {' or '.join(FOUND)}; unpack"
                " it first if it is packed"
            )
        if borders == "csv" and path.endswith(".bin"):
            raise ConfigError(
                f"token_borders=csv: {path}: the borders of a .bin are in its .idx; convert arrays"
                " and Megatron's files one after the other"
            )

    def slices(path: str) -> list[Slice]:
        stat = stat_of(path)
        if stat.size == 0:
            raise DataError(f"{path}: damaged: it is empty; fetch the file again, or remove it")
        if path.endswith(".bin"):
            return slice_index(path, stat, vocabulary, max_bytes)
        header, tokens = _begin(path, stat, vocabulary)
        if borders == "csv":
            return slice_borders(path, stat, header, vocabulary, max_bytes)
        _require_eos(path, tokens, vocabulary)
        return _slices_of_array(path, stat, header, vocabulary.item, max_bytes)

    # Tables are unpacked, which other threads can do at the same time, on a disk as in a store
    found = each(slices, paths) if borders == "csv" else of_each(paths, slices)
    return list(itertools.chain.from_iterable(found))


def read_tokens(
    part: Slice,
    vocabulary: Vocabulary,
    on_damage: Callable[[DataError], None],
    max_bytes: int,
) -> Iterator[TokenDocument]:
    """Yield the documents of a slice in order.

    `on_damage` is called for a document of more than `max_bytes`, which is left out if that call
    returns. Raise ConfigError for a token that is not in the vocabulary, and DataError for a file
    that is no longer what it was.
    """
    if part.format == "megatron":
        return read_index(part, vocabulary, on_damage, max_bytes)
    if part.format == "bordered":
        return _read_bordered_array(part, vocabulary, on_damage, max_bytes)
    return _read_array(part, vocabulary, on_damage, max_bytes)


# Raw arrays


def _begin(path: str, stat: files.Stat, vocabulary: Vocabulary) -> tuple[int, NDArray[np.integer]]:
    """Return the size of a raw file's header in bytes, and its first tokens, after a look at them.

    Raise ConfigError if they cannot be those of the vocabulary.
    """
    length = LOOKED_AT * vocabulary.item
    start = reading(path, lambda path: files.read_start(path, length + BLOCK))
    header = _header(path, start, stat.size, vocabulary)
    if (stat.size - header) % vocabulary.item:
        raise ConfigError(
            f"token_dtype: {path}: its {stat.size - header:,} bytes are no whole number of"
            f" {vocabulary.dtype} tokens; name the type that its tokens have"
        )
    if start.startswith(LFS_POINTER):
        raise DataError(
            f"{path}: damaged: it is a pointer that git-lfs left (git lfs pull gets the file);"
            " fetch the file again"
        )
    _require_type(path, start[header:], vocabulary)
    usable = (len(start) - header) // vocabulary.item
    tokens = np.frombuffer(start, DTYPES[vocabulary.dtype], min(usable, LOOKED_AT), header)
    require_known(path, tokens, 0, vocabulary)
    return header, tokens


def _require_type(path: str, data: bytes, vocabulary: Vocabulary) -> None:
    """Raise ConfigError if tokens seem to be of another type than the vocabulary's.

    Read as a type that is too narrow, they are all known, and every second one is 0 or so.
    """
    for name in ("uint32", "uint16"):
        item = np.dtype(DTYPES[name]).itemsize
        wide = np.frombuffer(data, DTYPES[name], min(len(data) // item, LOOKED_AT))
        most = (vocabulary.size - 1) >> 8 * vocabulary.item  # of the upper half
        is_wider = item > vocabulary.item and most < 8 and len(wide) >= 16
        if is_wider and (wide < vocabulary.size).all():
            bound = f"at most {most}" if most else "0"
            raise ConfigError(
                f"token_dtype: {path}: its first {len(wide):,} tokens are {name} and not"
                f" {vocabulary.dtype}: read as that, every second one would be {bound}; set"
                f" token_dtype={name}"
            )
    dtype = np.dtype(DTYPES[vocabulary.dtype])
    tokens = np.frombuffer(data, dtype, min(len(data) // dtype.itemsize, LOOKED_AT))
    is_wrong = (tokens >= vocabulary.size).any()
    if is_wrong and (tokens.byteswap() < vocabulary.size).all():
        raise ConfigError(
            f"token_dtype: {path}: its tokens are big-endian, and must be little-endian; write it"
            f" again, as numpy.fromfile(..., '>{dtype.str[1:]}').astype('{dtype.str}').tofile(...)"
        )


def _slices_of_array(
    path: str, stat: files.Stat, header: int, item: int, max_bytes: int
) -> list[Slice]:
    step = max(1, max_bytes // item) * item
    begins = range(header, stat.size, step)
    return [
        Slice(
            path,
            "tokens",
            begin,
            min(begin + step, stat.size),
            min(step, stat.size - begin),
            stat.version,
        )
        for begin in begins
    ]


def _header(path: str, start: bytes, size: int, vocabulary: Vocabulary) -> int:
    """Return the number of bytes before the first token: 0 for a file without NumPy's header.

    The header is not given to NumPy, which evaluates it as Python: that takes any depth of brackets
    to a crash.
    """
    if not start.startswith(NUMPY):
        return 0
    length = _header_size(start[:12])
    content = start[: min(length, MOST_HEADER)]
    match = HEADER.fullmatch(content[10 if start[6:7] == b"\1" else 12 :].decode("latin-1"))
    if match is None or not b"\1" <= start[6:7] <= b"\3":
        raise DataError(
            f"{path}: damaged: its NumPy header cannot be read, or is not that of numbers:"
            f" {content[10:60]!a}; fetch the file again"
        )
    dtype, shape = match.groups()
    wanted = DTYPES[vocabulary.dtype]
    count = re.fullmatch(r"([0-9]{1,15}),?", shape)
    if dtype not in (wanted, wanted.replace("<u1", "|u1")) or count is None:
        name = next((name for name, spelt in DTYPES.items() if spelt == dtype), dtype)
        raise ConfigError(
            f"token_dtype: {path}: is an array of {name} with shape ({shape[:40]}) by its header,"
            f" and must be one of {vocabulary.dtype} with one dimension"
        )
    expected = length + int(count[1]) * vocabulary.item
    if size != expected:
        raise DataError(
            f"{path}: damaged: it has {size:,} bytes, and must have {expected:,} by its header;"
            " fetch the file again"
        )
    return length


def _require_eos(path: str, tokens: NDArray[Any], vocabulary: Vocabulary) -> None:
    """Raise ConfigError unless a plausible share of a file's first tokens is eos."""
    share = float((tokens == vocabulary.eos).mean()) if len(tokens) else 0.0
    if share == 0:
        raise ConfigError(
            f"tokenizer: {path}: none of its first {len(tokens):,} tokens is eos"
            f" ({vocabulary.eos}), which ends documents; give the tokenizer and the token_dtype"
            " that it was made with"
        )
    if share > MOST_EOS and len(tokens) > 1000:
        raise ConfigError(
            f"token_dtype: {path}: {share:.0%} of its first {len(tokens):,} tokens are eos"
            f" ({vocabulary.eos}); give the token_dtype and the tokenizer that it was made with"
        )


def _read_array(
    part: Slice,
    vocabulary: Vocabulary,
    on_damage: Callable[[DataError], None],
    max_bytes: int,
) -> Iterator[TokenDocument]:
    item = vocabulary.item
    with open_input(part.path, None, part.version, min(8 << 20, part.num_bytes + BLOCK)) as file:
        header = _header_size(file.read(12))
        # Where the current document begins; None until the first one of this slice does
        start = part.start if part.start == header else None
        position = part.start if start is not None else part.start - item
        file.seek(position)
        pieces: list[NDArray[Any]] = []
        held = 0  # tokens of the current document
        while data := file.read(BLOCK // item * item):
            if len(data) % item:
                raise changed(part)
            tokens = np.frombuffer(data, DTYPES[vocabulary.dtype])
            require_known(part.path, tokens, (position - header) // item, vocabulary)
            begin = 0
            for end in np.flatnonzero(tokens == vocabulary.eos).tolist():
                if start is not None:
                    pieces.append(tokens[begin:end])
                    first, length = (start - header) // item, held + end - begin
                    yield from whole(
                        part.path, pieces, first, length, vocabulary, max_bytes, on_damage
                    )
                pieces, held, begin = [], 0, end + 1
                start = position + begin * item
                if start >= part.end:
                    return
            position += len(data)
            if start is None and position >= part.end:
                return  # no document begins here
            held += len(tokens) - begin
            if start is not None and held * item <= max_bytes:
                pieces.append(tokens[begin:])
            elif held * item > max_bytes:
                pieces = []  # it is too long, and not kept
        if position < part.end:
            raise changed(part)
        if start is not None and held:
            first = (start - header) // item
            yield from whole(part.path, pieces, first, held, vocabulary, max_bytes, on_damage)


def _read_bordered_array(
    part: Slice,
    vocabulary: Vocabulary,
    on_damage: Callable[[DataError], None],
    max_bytes: int,
) -> Iterator[TokenDocument]:
    numbers = read_borders(part)
    first = next(numbers)
    with open_input(part.path, None, part.version, min(8 << 20, part.num_bytes + BLOCK)) as file:
        header = _header_size(file.read(12))
        yield from read_bordered(
            file, part, header, first, numbers, vocabulary, on_damage, max_bytes
        )


def _header_size(start: bytes) -> int:
    """Return the size of NumPy's header, from the first 12 bytes of a file that may have one."""
    if not start.startswith(NUMPY):
        return 0
    if start[6:7] == b"\1":
        return 10 + int.from_bytes(start[8:10], "little")
    return 12 + int.from_bytes(start[8:12], "little")
