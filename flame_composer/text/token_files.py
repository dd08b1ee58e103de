"""Files of tokens that others have made: raw arrays as OLMo's, and Megatron's .bin with its .idx.

A raw file (.npy) holds tokens end to end, little-endian, with NumPy's header or without, and every
document ends with eos. In Megatron's files, the .idx says where documents begin. Documents are read
without their eos, as text is, so that the conversion alone decides what is put around them.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.text.sources import Slice
from flame_composer.text.tokenizer import vocab_size_of
from flame_composer.text.unpacking import BLOCK, open_input, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOUND = (".npy", ".bin")
DTYPES = {"uint8": "<u1", "uint16": "<u2", "int32": "<i4", "uint32": "<u4"}
NUMPY = b"\x93NUMPY"
INDEX = b"MMIDIDX\x00\x00"
# The numbers that Megatron's index has for types (megatron/core/datasets/indexed_dataset.py, DType)
INDEX_DTYPES = {1: "uint8", 4: "int32", 8: "uint16"}
LOOKED_AT = 1 << 20  # tokens at the beginning of a file, by which it is judged before anything runs
MOST_EOS = 0.25  # of those tokens: documents of three tokens are no documents


class TokenDocument(NamedTuple):
    """A document's tokens without eos, and the number of its first token in its file."""

    tokens: NDArray[np.integer]
    path: str
    position: int


class Vocabulary(NamedTuple):
    """What tokens in a file must be: the name of their type, those that exist, and eos."""

    dtype: str
    size: int
    eos: int

    @property
    def item(self) -> int:
        """Return the number of bytes of a token."""
        return np.dtype(DTYPES[self.dtype]).itemsize


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, dtype: str) -> Vocabulary:
    """Return what tokens of a tokenizer are; raise ConfigError if it has no eos.

    Text cannot be told from tokens of another tokenizer: whose they are is the user's word.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "tokenizer: it has no eos token, by which documents end in files of tokens; give it one"
        )
    return Vocabulary(dtype, vocab_size_of(tokenizer), tokenizer.eos_token_id)


def slice_tokens(paths: Sequence[str], vocabulary: Vocabulary, max_bytes: int) -> list[Slice]:
    """Return the files in slices of about `max_bytes`, after a look at how each begins.

    A slice of a raw file is a range of bytes, of which it has the documents that begin there; one
    of Megatron's is a range of documents. Raise ConfigError for a file whose tokens cannot be those
    of the vocabulary, and DataError for one that is damaged.
    """
    found: list[Slice] = []
    for path in paths:
        if path.endswith(".bin"):
            found += _slices_of_index(path, vocabulary, max_bytes)
        else:
            found += _slices_of_array(path, vocabulary, max_bytes)
    return found


def read_tokens(
    part: Slice,
    vocabulary: Vocabulary,
    on_damage: Callable[[DataError], None],
    max_bytes: int,
) -> Iterator[TokenDocument]:
    """Yield the documents of a slice in order.

    `on_damage` is called for a document of more than `max_bytes`, which is left out if that call
    returns. Raise DataError for a token that is not in the vocabulary.
    """
    if part.format == "megatron":
        return _read_index(part, vocabulary, on_damage, max_bytes)
    return _read_array(part, vocabulary, on_damage, max_bytes)


# Raw arrays


def _slices_of_array(path: str, vocabulary: Vocabulary, max_bytes: int) -> list[Slice]:
    stat = reading(path, files.stat)
    if stat is None:
        raise DataError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
    if stat.size == 0:
        raise DataError(f"{path}: damaged: it is empty; fetch the file again")
    length = LOOKED_AT * vocabulary.item
    start = reading(path, lambda path: files.read_start(path, length + BLOCK))
    header = _header(path, start, stat.size, vocabulary)
    if (stat.size - header) % vocabulary.item:
        raise ConfigError(
            f"token_dtype: {path}: its {stat.size - header:,} bytes are no whole number of"
            f" {vocabulary.dtype} tokens; name the type that its tokens have"
        )
    usable = (len(start) - header) // vocabulary.item
    tokens = np.frombuffer(start, DTYPES[vocabulary.dtype], min(usable, LOOKED_AT), header)
    _look_at(path, tokens, vocabulary)
    step = max(1, max_bytes // vocabulary.item) * vocabulary.item
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
    """Return the number of bytes before the first token: 0 for a file without NumPy's header."""
    if not start.startswith(NUMPY):
        return 0
    file = io.BytesIO(start)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    except ValueError as error:
        raise DataError(f"{path}: damaged: its NumPy header cannot be read: {error}") from None
    if len(shape) != 1 or dtype != np.dtype(DTYPES[vocabulary.dtype]):
        raise ConfigError(
            f"token_dtype: {path}: is an array of {dtype} with shape {shape} by its header, and"
            f" must be one of {vocabulary.dtype} with one dimension"
        )
    expected = file.tell() + shape[0] * vocabulary.item
    if size != expected:
        raise DataError(
            f"{path}: damaged: it has {size:,} bytes, and must have {expected:,} by its header;"
            " fetch the file again"
        )
    return file.tell()


def _look_at(path: str, tokens: NDArray[Any], vocabulary: Vocabulary) -> None:
    """Raise ConfigError if the first tokens of a file cannot be those of the vocabulary."""
    _require_known(path, tokens, 0, vocabulary)
    share = float((tokens == vocabulary.eos).mean()) if len(tokens) else 0.0
    if share == 0 and len(tokens) == LOOKED_AT:
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


def _require_known(path: str, tokens: NDArray[Any], first: int, vocabulary: Vocabulary) -> None:
    is_unknown = (tokens < 0) | (tokens >= vocabulary.size)
    if not is_unknown.any():
        return
    at = int(is_unknown.argmax())
    raise ConfigError(
        f"tokenizer: {path}: token {first + at:,} is {int(tokens[at])}, and the tokenizer has"
        f" {vocabulary.size:,}; give the tokenizer and the token_dtype that it was made with"
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
                raise DataError(f"{part.path}: was changed while it was read; start again")
            tokens = np.frombuffer(data, DTYPES[vocabulary.dtype])
            _require_known(part.path, tokens, (position - header) // item, vocabulary)
            begin = 0
            for end in np.flatnonzero(tokens == vocabulary.eos).tolist():
                if start is not None:
                    pieces.append(tokens[begin:end])
                    first, length = (start - header) // item, held + end - begin
                    yield from _whole(part.path, pieces, first, length, item, max_bytes, on_damage)
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
            raise DataError(f"{part.path}: was changed while it was read; start again")
        if start is not None and held:
            first = (start - header) // item
            yield from _whole(part.path, pieces, first, held, item, max_bytes, on_damage)


def _header_size(start: bytes) -> int:
    """Return the size of NumPy's header, from the first 12 bytes of a file that may have one."""
    if not start.startswith(NUMPY):
        return 0
    if start[6] == 1:
        return 10 + int.from_bytes(start[8:10], "little")
    return 12 + int.from_bytes(start[8:12], "little")


def _whole(
    path: str,
    pieces: Sequence[NDArray[Any]],
    first: int,
    held: int,
    item: int,
    max_bytes: int,
    on_damage: Callable[[DataError], None],
) -> Iterator[TokenDocument]:
    """Yield a document made of its pieces, unless it is too long to be kept."""
    if held * item > max_bytes:
        on_damage(
            DataError(
                f"{path}: the document from token {first:,} on has {held:,} tokens, which are more"
                f" than max_document_bytes={max_bytes}; raise it, or see that the tokenizer's eos"
                " ends documents"
            )
        )
        return
    yield TokenDocument(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), path, first)


# Megatron's files


class Index(NamedTuple):
    """Where the documents of a .bin file are: the byte that each begins with, and its tokens."""

    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]


def _read_whole(path: str) -> bytes:
    with files.open_file(path) as file:
        return file.read()


def _index_of(path: str, size: int, vocabulary: Vocabulary) -> Index:
    """Return what the .idx beside a .bin file of `size` bytes says; raise DataError if damaged."""
    name = f"{path.removesuffix('.bin')}.idx"
    if files.stat(name) is None:
        raise ConfigError(
            f"source: {path}: there is no {name}, which says where documents begin; a raw file"
            " whose documents end with eos must be named .npy"
        )
    data = reading(name, _read_whole)
    damage = f"{name}: damaged: %s; fetch the file again"
    if not data.startswith(INDEX) or len(data) < 34:
        raise DataError(damage % "it is no index of Megatron's")
    number, sequences, documents = (
        int(np.frombuffer(data, kind, 1, at)[0])
        for kind, at in (("u1", 17), ("<u8", 18), ("<u8", 26))
    )
    dtype = INDEX_DTYPES.get(number)
    if dtype != vocabulary.dtype:
        raise ConfigError(
            f"token_dtype: {path}: is of {dtype or f'type {number}'} by its index, and not of"
            f" {vocabulary.dtype}"
        )
    # Some writers add a byte for each sequence, which says of which modality it is.
    expected = 34 + 12 * sequences + 8 * documents
    if len(data) not in (expected, expected + sequences):
        raise DataError(damage % f"it has {len(data):,} bytes, and must have {expected:,}")
    sizes = np.frombuffer(data, "<i4", sequences, 34).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)
    borders = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    if (
        (sizes < 0).any()
        or not np.array_equal(pointers, ends[:-1] * vocabulary.item)
        or ends[-1] * vocabulary.item != size
        or documents == 0
        or borders[0] != 0
        or borders[-1] != sequences
        or (np.diff(borders) < 0).any()
    ):
        raise DataError(damage % f"its documents are not the {size:,} bytes of {path}")
    return Index(ends[borders[:-1]] * vocabulary.item, np.diff(ends[borders]))


def _slices_of_index(path: str, vocabulary: Vocabulary, max_bytes: int) -> list[Slice]:
    stat = reading(path, files.stat)
    if stat is None:
        raise DataError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
    index = _index_of(path, stat.size, vocabulary)
    start = reading(path, lambda path: files.read_start(path, BLOCK)) if stat.size else b""
    usable = len(start) // vocabulary.item
    tokens = np.frombuffer(start, DTYPES[vocabulary.dtype], usable)
    _require_known(path, tokens, 0, vocabulary)
    found: list[Slice] = []
    ends = np.cumsum(index.lengths) * vocabulary.item
    first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + max_bytes, side="right")))
        num_bytes = int(ends[last - 1]) - begin
        found.append(Slice(path, "megatron", first, last, num_bytes, stat.version))
        first = last
    return found


def _read_index(
    part: Slice,
    vocabulary: Vocabulary,
    on_damage: Callable[[DataError], None],
    max_bytes: int,
) -> Iterator[TokenDocument]:
    stat = reading(part.path, files.stat)
    if stat is None:
        raise DataError(f"{part.path}: cannot be read: {os.strerror(errno.ENOENT)}")
    index = _index_of(part.path, stat.size, vocabulary)
    item = vocabulary.item
    with open_input(part.path, None, part.version, min(8 << 20, part.num_bytes + BLOCK)) as file:
        for begin, length in zip(
            index.begins[part.start : part.end].tolist(),
            index.lengths[part.start : part.end].tolist(),
            strict=True,
        ):
            first = begin // item
            pieces: list[NDArray[Any]] = []
            if length * item <= max_bytes:
                file.seek(begin)
                tokens = np.frombuffer(file.read(length * item), DTYPES[vocabulary.dtype])
                _require_known(part.path, tokens, first, vocabulary)
                ends_with_eos = len(tokens) and tokens[-1] == vocabulary.eos
                pieces.append(tokens[:-1] if ends_with_eos else tokens)
            yield from _whole(part.path, pieces, first, length, item, max_bytes, on_damage)
