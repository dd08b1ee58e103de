"""Bytes, seconds and tables as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """Return a number of bytes with three significant digits and a decimal unit: "4.02 GB"."""
    if count < 999.5:
        return f"{count:.0f} bytes"
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if count < 999.5 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e12:,.0f} TB"


def format_seconds(seconds: float) -> str:
    """Return a time in hours, minutes or seconds: the largest unit that it has at least one of."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} s"


def align(rows: Sequence[Sequence[str]], *, left: int = 0, gap: str = "  ") -> list[str]:
    """Return the rows of a table as lines, with columns as wide as their widest cells.

    The first `left` columns are aligned to the left, the others to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plural(count: int, name: str) -> str:
    """Return a count with its name, which gets an "s" unless the count is 1."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"
