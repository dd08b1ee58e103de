"""A dataset's row, shown to people as its document pieces (100 columns)."""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_composer.dataset.survey import Row
from flame_composer.lines import visible
from flame_composer.quantities import plural

WIDTH = 100
PIECES_SHOWN = (4, 2)  # document pieces shown of a row, from its beginning and its end
LINES_SHOWN = (4, 3)  # lines shown of a piece

Decode = Callable[[Sequence[int]], str]


def show_row(row: Row, decode: Decode | None, *, whole: bool) -> list[str]:
    """Return lines that show a row's document pieces, as text or, without `decode`, as token ids.

    Unless `whole`, the middle of long pieces and of long lists of pieces is left out.
    """
    ends = np.cumsum(row.doc_lengths)
    blocks: list[list[str]] = []
    for number, (length, end) in enumerate(
        zip(row.doc_lengths.tolist(), ends.tolist(), strict=True), 1
    ):
        lines = _piece_lines(row, end - length, end, decode)
        # A piece of examples that carries no loss at all is what fills up the row.
        if row.loss_mask is not None and not row.loss_mask[end - length : end].any():
            lines = ["│ padding"]
        elif not whole:
            lines = _shorten(lines, LINES_SHOWN, "lines")
        tokens = f"tokens {end - length + 1:,}-{end:,}" if length > 1 else f"token {end:,}"
        blocks.append([_rule(f"├─ piece {number}: {tokens}"), *lines])
    if not whole and len(blocks) > sum(PIECES_SHOWN) + 1:
        first, last = PIECES_SHOWN
        left_out = row.doc_lengths[first : len(blocks) - last]
        blocks[first : len(blocks) - last] = [
            [_rule(f"├─ {len(left_out):,} pieces of {left_out.sum():,} tokens left out")]
        ]
    lines = [
        f"Row {row.number:,}: {plural(len(row.doc_lengths), 'document piece')}, in"
        f" {visible(row.shard)}"
        + (" (token ids; tokenizer=... shows text)" if decode is None else "")
    ]
    lines += [line for block in blocks for line in block]
    lines[1] = "┌" + lines[1][1:]
    return [*lines, "└" + "─" * (WIDTH - 1)]


def _piece_lines(row: Row, begin: int, end: int, decode: Decode | None) -> list[str]:
    """Return the lines of a document piece; a bold bar stands before what carries loss."""
    has_loss = np.zeros(end - begin, bool) if row.loss_mask is None else row.loss_mask[begin:end]
    borders = [0, *(np.flatnonzero(np.diff(has_loss)) + 1).tolist(), end - begin]
    lines: list[str] = []
    for first, last in itertools.pairwise(borders):
        ids = row.input_ids[begin + first : begin + last]
        found = _id_lines(ids) if decode is None else _text_lines(decode(ids.tolist()))
        lines += [f"{'┃' if has_loss[first] else '│'} {line}" for line in found]
    return lines


def _rule(title: str) -> str:
    return f"{title} ".ljust(WIDTH, "─")


def _shorten(lines: list[str], shown: tuple[int, int], what: str) -> list[str]:
    left_out = len(lines) - sum(shown)
    if left_out <= 1:
        return lines
    note = f"│       ... {left_out:,} {what} left out (whole_rows=true shows them) ..."
    return [*lines[: shown[0]], note, *lines[-shown[1] :]]


def _id_lines(ids: NDArray[Any]) -> list[str]:
    return textwrap.wrap(" ".join(map(str, ids.tolist())), WIDTH - 2)


def _text_lines(text: str) -> list[str]:
    """Return the text as lines that fit the width, with its own line ends made visible."""
    return [
        part for line in text.splitlines(keepends=True) for part in _fold(visible(line), WIDTH - 2)
    ]


def _fold(line: str, width: int) -> Iterator[str]:
    """Yield the parts of a line, each at most `width` columns wide.

    East Asian characters take two columns, combining characters none.
    """
    part, used = "", 0
    for character in line:
        columns = (
            0
            if unicodedata.combining(character)
            else 2
            if unicodedata.east_asian_width(character) in "WF"
            else 1
        )
        if used + columns > width:
            yield part
            part, used = "", 0
        part += character
        used += columns
    yield part
