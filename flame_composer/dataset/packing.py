"""Packing documents into rows of exactly `context_length` tokens, with their piece lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pieces:
    """Document pieces: their tokens, end to end, and their lengths in tokens.

    Every length is positive, and they sum to the number of tokens.
    """

    tokens: NDArray[np.unsignedinteger]
    doc_lengths: NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Full rows of tokens, and the lengths of the document pieces in them.

    `input_ids` is [num_rows, context_length]. The piece lengths of row r are
    `doc_lengths[splits[r]:splits[r + 1]]`.
    """

    input_ids: NDArray[np.unsignedinteger]
    doc_lengths: NDArray[np.int64]
    splits: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __iter__(self) -> Iterator[tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]]:
        for r, row in enumerate(self.input_ids):
            yield row, self.doc_lengths[self.splits[r] : self.splits[r + 1]]


def no_pieces(dtype: type[np.unsignedinteger]) -> Pieces:
    """Return an empty tail, the one to start packing with."""
    return Pieces(np.zeros(0, dtype), np.zeros(0, np.int64))


def pack(
    tokens: NDArray[np.unsignedinteger],
    doc_lengths: NDArray[np.int64],
    context_length: int,
    tail: Pieces,
) -> tuple[Rows, Pieces]:
    """Cut `tail` followed by the documents into rows, and return the rows and the new tail.

    The new tail holds the tokens that do not fill a row, for the next call. A document that reaches
    the end of a row continues in the next one as another piece. An empty document leaves no piece.
    The rows depend only on the sequence of documents, not on how it is divided into calls.

    Args:
        tokens: the documents' tokens, end to end, [sum(doc_lengths)].
        doc_lengths: tokens in each document, [num_documents].
        context_length: tokens per row.
        tail: the tail that the previous call returned (`no_pieces(dtype)` at first), of fewer than
            `context_length` tokens.
    """
    assert len(tokens) == doc_lengths.sum(), (len(tokens), doc_lengths.sum())
    assert len(tail.tokens) == tail.doc_lengths.sum() < context_length
    stream = np.concatenate([tail.tokens, tokens])
    num_rows = len(stream) // context_length
    num_packed = num_rows * context_length
    doc_ends = np.cumsum(np.concatenate([tail.doc_lengths, doc_lengths]))
    row_ends = np.arange(1, num_rows + 1, dtype=np.int64) * context_length
    ends = np.union1d(doc_ends, row_ends)
    ends = ends[ends > 0]  # documents before the first token are empty
    lengths = np.diff(ends, prepend=0)
    splits = np.concatenate([[0], np.searchsorted(ends, row_ends, side="right")]).astype(np.int64)
    rows = Rows(
        stream[:num_packed].reshape(num_rows, context_length), lengths[: splits[-1]], splits
    )
    # Copies, so that a short tail does not keep the whole batch in memory.
    return rows, Pieces(stream[num_packed:].copy(), lengths[splits[-1] :].copy())


def cut(doc_lengths: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Return the lengths of the pieces when each document is cut after every `longest` tokens."""
    whole, rest = np.divmod(doc_lengths, longest)
    has_rest = rest > 0
    num_pieces = whole + has_rest
    pieces = np.full(num_pieces.sum(), longest, np.int64)
    pieces[np.cumsum(num_pieces)[has_rest] - 1] = rest[has_rest]
    return pieces


def shuffled(parts: Sequence[Pieces], seed: Sequence[int]) -> Pieces:
    """Return the documents of `parts`, shuffled; only `seed` and their number decide the order."""
    tokens = np.concatenate([part.tokens for part in parts])
    doc_lengths = np.concatenate([part.doc_lengths for part in parts])
    order = np.random.default_rng(seed).permutation(len(doc_lengths))
    starts = np.cumsum(doc_lengths) - doc_lengths
    moved = [tokens[starts[i] : starts[i] + doc_lengths[i]] for i in order]
    return Pieces(np.concatenate([tokens[:0], *moved]), doc_lengths[order])
