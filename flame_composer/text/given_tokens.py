"""Tokens that others have made: what they must be, and the documents that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError
from flame_composer.text.sources import Slice
from flame_composer.text.tokenizer import vocab_size_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DTYPES = {"uint8": "<u1", "uint16": "<u2", "int32": "<i4", "uint32": "<u4"}


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


def whole(
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


def changed(part: Slice) -> DataError:
    """Return the error for a file that is no longer what it was when it was sliced."""
    return DataError(f"{part.path}: was changed while it was read; start again")
