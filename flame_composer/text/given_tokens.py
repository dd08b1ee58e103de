"""Tokens that others have made: what they must be, and the documents that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError
from flame_composer.text.sources import Slice
from flame_composer.text.tokenizer import vocab_size_of
from flame_composer.text.unpacking import BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Borders = Literal["eos", "csv"]
DTYPES = {"uint8": "<u1", "uint16": "<u2", "int32": "<i4", "uint32": "<u4"}


class TokenDocument(NamedTuple):
    """A document's tokens without bos and eos, and the number of its first token in its file."""

    tokens: NDArray[np.integer]
    path: str
    position: int


class Vocabulary(NamedTuple):
    """What tokens in a file must be: the name of their type, those that exist, eos and bos.

    `bos` is None where documents cannot be told to begin with it.
    """

    dtype: str
    size: int
    eos: int
    bos: int | None = None

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
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    return Vocabulary(dtype, vocab_size_of(tokenizer), eos, bos_of(bos, eos))


def bos_of(bos: int | None, eos: int) -> int | None:
    """Return the bos by which a document's beginning is known; None if it may be another's eos."""
    return None if bos == eos else bos


def require_known(path: str, tokens: NDArray[Any], first: int, vocabulary: Vocabulary) -> None:
    """Raise ConfigError if a token is not in the vocabulary; `first` is the first one's number."""
    is_unknown = (tokens < 0) | (tokens >= vocabulary.size)
    if not is_unknown.any():
        return
    at = int(is_unknown.argmax())
    raise ConfigError(
        f"tokenizer: {path}: token {first + at:,} is {int(tokens[at])}, and the tokenizer has"
        f" {vocabulary.size:,}; give the tokenizer and the token_dtype that it was made with"
    )


def beside(part: Slice) -> str | None:
    """Return the file that says where a slice's documents are, if there is one beside it."""
    endings = {"megatron": (".bin", ".idx"), "bordered": (".npy", ".csv.gz")}
    if part.format not in endings:
        return None
    ending, other = endings[part.format]
    return f"{part.path.removesuffix(ending)}{other}"


@dataclass
class Ranges:
    """Documents in order, put into ranges of at most `most` bytes; a longer one is alone in its.

    The first document of the range that is open is number `first`, at byte `begin`. `seen`
    documents are known, up to byte `last`.
    """

    most: int
    first: int = 0
    begin: int = 0
    seen: int = 0
    last: int = 0

    def closed(self, ends: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Take the ends of the next documents, and yield the ranges that they close.

        Each is the number of its first document, that of the next range's, and its size in bytes.
        """
        at = 0
        while True:
            next_one = int(np.searchsorted(ends, self.begin + self.most, side="right"))
            if next_one == len(ends):
                break
            if self.seen + next_one == self.first:
                next_one += 1
            end = int(ends[next_one - 1]) if next_one else self.last
            yield self.first, self.seen + next_one, end - self.begin
            self.first, self.begin, at = self.seen + next_one, end, next_one
            if at == len(ends):
                break
        self.seen += len(ends)
        if len(ends):
            self.last = int(ends[-1])

    def rest(self) -> Iterator[tuple[int, int, int]]:
        """Yield the range that is still open, if it has documents."""
        if self.first < self.seen:
            yield self.first, self.seen, self.last - self.begin


def read_bordered(
    file: BinaryIO,
    part: Slice,
    header: int,
    first: int,
    lengths: Iterable[int],
    vocabulary: Vocabulary,
    on_damage: Callable[[DataError], None],
    max_bytes: int,
) -> Iterator[TokenDocument]:
    """Yield the documents of a slice whose lengths are known, as `token_files.read_tokens` does.

    `file` has the tokens behind `header` bytes, of which those of the slice begin with number
    `first`. An eos at a document's end is left out.
    """
    item = vocabulary.item
    file.seek(header + first * item)
    left = part.num_bytes
    tokens = np.zeros(0, DTYPES[vocabulary.dtype])  # those read, from number `first` on
    for length in lengths:
        if length * item > max_bytes:
            yield from whole(part.path, (), first, length, vocabulary, max_bytes, on_damage)
            left -= max(0, length - len(tokens)) * item
            file.seek(header + (first + max(length, len(tokens))) * item)
        elif length > len(tokens):
            missing = (length - len(tokens)) * item
            if missing > left:
                raise changed(part)
            size = min(max(BLOCK // item * item, missing), left)
            data = file.read(size)
            if len(data) != size:
                raise changed(part)
            left -= size
            more = np.frombuffer(data, DTYPES[vocabulary.dtype])
            require_known(part.path, more, first + len(tokens), vocabulary)
            tokens = np.concatenate([tokens, more])
        if length * item <= max_bytes:
            document = tokens[:length]
            if length and document[-1] == vocabulary.eos:
                document = document[:-1]
            yield from whole(
                part.path, (document,), first, length, vocabulary, max_bytes, on_damage
            )
        tokens = tokens[length:]
        first += length
    if left or len(tokens):
        raise changed(part)


def whole(
    path: str,
    pieces: Sequence[NDArray[Any]],
    first: int,
    held: int,
    vocabulary: Vocabulary,
    max_bytes: int,
    on_damage: Callable[[DataError], None],
) -> Iterator[TokenDocument]:
    """Yield a document made of its pieces, without bos, unless it is too long to be kept."""
    if held * vocabulary.item > max_bytes:
        on_damage(
            DataError(
                f"{path}: the document from token {first:,} on has {held:,} tokens, which are more"
                f" than max_document_bytes={max_bytes}; raise it, or see that the tokenizer's eos"
                " ends documents"
            )
        )
        return
    tokens = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if vocabulary.bos is not None and len(tokens) and tokens[0] == vocabulary.bos:
        tokens = tokens[1:]
    yield TokenDocument(tokens, path, first)


def changed(part: Slice) -> DataError:
    """Return the error for a file that is no longer what it was when it was sliced."""
    return DataError(f"{part.path}: was changed while it was read; start again")
