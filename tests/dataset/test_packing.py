"""Packing: no token lost, moved or repeated, boundaries exact, whatever the batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flame_composer.dataset.packing import Pieces, cut, no_pieces, pack, shuffled

CONTEXT_LENGTHS = st.integers(1, 9)
DOC_LENGTHS = st.lists(st.integers(0, 30), max_size=25)


def pack_in_batches(doc_lengths: list[int], context_length: int, batch_sizes: list[int]):
    """Pack documents whose tokens are 0, 1, 2, ... in calls of `batch_sizes` documents each (the
    last takes the rest).
    """
    tokens = np.arange(sum(doc_lengths), dtype=np.uint16)
    lengths = np.array(doc_lengths, np.int64)
    tail = no_pieces(np.uint16)
    rows: list[tuple[list[int], list[int]]] = []
    for size in [*batch_sizes, len(doc_lengths)]:
        num_tokens = lengths[:size].sum()
        packed, tail = pack(tokens[:num_tokens], lengths[:size], context_length, tail)
        rows += [(row.tolist(), pieces.tolist()) for row, pieces in packed]
        tokens, lengths = tokens[num_tokens:], lengths[size:]
    return rows, tail


def pieces_by_hand(doc_lengths: list[int], context_length: int) -> list[list[int]]:
    """The document pieces of every row, the unfinished last one included, one token at a time."""
    rows: list[list[int]] = [[]]
    for length in doc_lengths:
        new_piece = True
        for _ in range(length):
            if sum(rows[-1]) == context_length:
                rows.append([])
                new_piece = True
            if new_piece:
                rows[-1].append(0)
                new_piece = False
            rows[-1][-1] += 1
    return rows


@given(DOC_LENGTHS, CONTEXT_LENGTHS, st.lists(st.integers(0, 8), max_size=8))
@example([], 4, [])
@example([0, 0, 0], 4, [1])
@example([4, 4], 4, [1])
@example([1] * 9, 4, [])
@example([9], 4, [])
@example([3, 0, 1, 0, 8, 0], 4, [2, 2])
@settings(max_examples=400, deadline=None)
def test_rows_hold_the_stream_and_its_boundaries(doc_lengths, context_length, batch_sizes):
    rows, tail = pack_in_batches(doc_lengths, context_length, batch_sizes)

    assert [token for row, _ in rows for token in row] + tail.tokens.tolist() == list(
        range(sum(doc_lengths))
    )
    assert all(len(row) == context_length for row, _ in rows)
    assert len(tail.tokens) < context_length

    by_hand = pieces_by_hand(doc_lengths, context_length)
    got = [pieces for _, pieces in rows] + ([tail.doc_lengths.tolist()] if len(tail.tokens) else [])
    assert got == [row for row in by_hand if row]
    assert all(length > 0 for row in got for length in row)


def test_types_and_independence_of_the_tail():
    tokens = np.array([7, 8, 9, 65535, 70000], np.uint32)
    rows, tail = pack(tokens, np.array([5]), 4, no_pieces(np.uint32))
    assert rows.input_ids.dtype == np.uint32
    assert rows.input_ids.tolist() == [[7, 8, 9, 65535]]
    tokens[:] = 0
    assert tail.tokens.tolist() == [70000], "the tail must not be a view of the batch"


def test_lengths_that_do_not_cover_the_tokens_are_refused():
    with pytest.raises(AssertionError):
        pack(np.zeros(5, np.uint16), np.array([2, 2]), 4, no_pieces(np.uint16))


@given(lengths=st.lists(st.integers(0, 40), max_size=20), longest=st.integers(1, 12))
def test_cut_documents_are_whole_but_for_their_borders(lengths, longest):
    pieces = cut(np.array(lengths, np.int64), longest).tolist()
    expected = [
        min(longest, length - start) for length in lengths for start in range(0, length, longest)
    ]
    assert pieces == expected


@given(
    lengths=st.lists(st.integers(0, 6), max_size=20),
    borders=st.lists(st.integers(0, 20), max_size=3),
    seed=st.integers(0, 99),
)
def test_shuffled_documents_are_all_there_in_an_order_of_their_own(lengths, borders, seed):
    documents = [[i] * length for i, length in enumerate(lengths)]
    borders = [0, *sorted(min(border, len(lengths)) for border in borders), len(lengths)]
    parts = [
        Pieces(
            np.array([*itertools.chain.from_iterable(documents[a:b])], np.uint16),
            np.array(lengths[a:b], np.int64),
        )
        for a, b in itertools.pairwise(borders)
    ]
    result = shuffled(parts, [seed, 1])
    found = (
        [part.tolist() for part in np.split(result.tokens, np.cumsum(result.doc_lengths)[:-1])]
        if lengths
        else []
    )
    assert sorted(found) == sorted(documents)
    assert result.tokens.dtype == np.uint16
    order = np.random.default_rng([seed, 1]).permutation(len(lengths))
    assert result.doc_lengths.tolist() == [lengths[i] for i in order], (
        "by the seed and the number of documents alone"
    )
