"""Packing documents into rows of exactly `context_length` tokens, with their piece lengths.

Documents of text are laid end to end and cut where rows end (`pack`). Examples for tuning stay
whole, and rows are filled up with padding (`pack_whole`).
"""

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
    `doc_lengths[splits[r]:splits[r + 1]]`. `loss_mask`, of the same shape as `input_ids`, says
    which tokens carry loss; None for all.
    """

    input_ids: NDArray[np.unsignedinteger]
    doc_lengths: NDArray[np.int64]
    splits: NDArray[np.int64]
    loss_mask: NDArray[np.bool_] | None = None

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


def pack_whole(
    examples: Sequence[NDArray[np.unsignedinteger]],
    has_loss: Sequence[NDArray[np.bool_]],
    context_length: int,
    padding: int,
    dtype: type[np.unsignedinteger],
) -> tuple[Rows, int]:
    """Pack whole examples into rows, and return the rows and the number of padding tokens in them.

    The token `padding` fills up a row behind its examples; this is a document of its own, without
    loss. A row's examples are in order, and rows are in the order of their first examples.

    Args:
        examples: the tokens of each example, at least one and at most `context_length`.
        has_loss: for each example, which of its tokens carry loss.
        context_length: tokens per row.
        padding: the token that rows are filled up with.
        dtype: the type of the rows' tokens.
    """
    lengths = np.fromiter(map(len, examples), np.int64, len(examples))
    row_of = best_fit(lengths, context_length)
    num_rows = int(row_of.max(initial=-1)) + 1
    order = np.lexsort((np.arange(len(lengths)), row_of))
    used = np.bincount(row_of, lengths, num_rows).astype(np.int64)
    is_padded = used < context_length
    input_ids = np.full(num_rows * context_length, padding, dtype)
    loss_mask = np.zeros(num_rows * context_length, np.bool_)
    # Where each example begins: after the examples before it, and the padding of the rows before
    spare = np.cumsum(context_length - used) - (context_length - used)
    starts = np.cumsum(lengths[order]) - lengths[order] + spare[row_of[order]]
    for number, start in zip(order.tolist(), starts.tolist(), strict=True):
        end = start + int(lengths[number])
        input_ids[start:end] = examples[number]
        loss_mask[start:end] = has_loss[number]
    # The piece of padding comes behind the last example of its row.
    ends = np.cumsum(np.bincount(row_of, minlength=num_rows))
    doc_lengths = np.insert(lengths[order], ends[is_padded], (context_length - used)[is_padded])
    splits = np.concatenate([[0], ends + np.cumsum(is_padded)]).astype(np.int64)
    shape = num_rows, context_length
    rows = Rows(input_ids.reshape(shape), doc_lengths, splits, loss_mask.reshape(shape))
    return rows, int((context_length - used).sum())


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the number of the row that each document goes into, int64 [num_documents].

    Documents are placed from the longest to the shortest, each into the row with the least space
    that suffices, or into a new one (best-fit decreasing). Rows are numbered by their first
    documents.
    """
    assert lengths.min(initial=1) > 0
    assert lengths.max(initial=0) <= capacity
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # as bits: those for which there is a row
    row_of = np.zeros(len(lengths), np.int64)
    num_rows = 0
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        suffice = spaces >> length
        if suffice:
            space = length + (suffice & -suffice).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, num_rows
            num_rows += 1
        row_of[number] = row
        if space > length:
            by_space[space - length].append(row)
            spaces |= 1 << (space - length)
    first = np.full(num_rows, len(lengths), np.int64)
    np.minimum.at(first, row_of, np.arange(len(lengths)))
    return np.argsort(np.argsort(first))[row_of]
