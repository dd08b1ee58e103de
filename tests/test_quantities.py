"""Bytes and seconds are written with the unit that suits them, and tables in columns."""

from __future__ import annotations

import pytest

from flame_composer.quantities import align, format_bytes, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1234, "1.23 kB"),
        (999_700, "1 MB"),
        (4_023_435_440, "4.02 GB"),
        (999_700_000_000, "1 TB"),
        (1_234_000_000_000_000, "1,234 TB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (90, "1.5 minutes"), (36_000_000, "10,000.0 hours")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_columns_are_as_wide_as_their_widest_cells() -> None:
    rows = [("step", "documents", "left"), ("exact_dedup", "1,000", "7"), ("  short", "3", "")]
    assert align(rows, left=1) == [
        "step         documents  left",
        "exact_dedup      1,000     7",
        "  short              3",
    ]
    assert align(rows[:1], gap=" ") == ["step documents left"]
