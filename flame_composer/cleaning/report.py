"""The report of a cleaning: a table that shows where its documents went."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from flame_composer.cleaning.parts import STEPS, Counts
from flame_composer.quantities import align, format_seconds

HEAD = ("step", "in", "removed", "changed", "out")

Row = tuple[str, str, str, str, str]


class Step(NamedTuple):
    """The numbers of documents that one step of a cleaning removed and changed."""

    name: str
    removed: int
    reasons: Counter[str]
    """The removed documents by reason; "" is the reason of a step that has only one."""
    changed: int


def report(manifest: dict[str, Any], seconds: float | None = None) -> list[str]:
    """Return the lines of a report: a table, a sentence, and all numbers as one line of JSON.

    The table has a row for each step and reason; documents in = documents removed + documents out.
    `seconds` is the time that the cleaning took, None if that is not known.
    """
    counts = Counts.from_json(manifest["counts"])
    kept = (
        f"{counts.out:,} of {counts.documents:,} documents are left, "
        f"{counts.characters_out:,} of {counts.characters:,} characters"
    )
    if seconds is not None:
        speed = counts.characters / seconds
        kept += f", in {format_seconds(seconds)}: {speed:,.0f} characters/s"
    return [*align([HEAD, *_rows(counts)], left=1), kept, json.dumps(_summary(counts))]


def _steps(counts: Counts) -> Iterator[Step]:
    """Yield the steps in the order in which documents go through them."""
    yield Step("unreadable", counts.unreadable, Counter(), 0)
    yield Step("empty", counts.empty, Counter(), 0)
    for name in STEPS:
        if name in counts.removed:
            reasons = counts.removed[name]
            yield Step(name, sum(reasons.values()), reasons, counts.changed[name])
    if "pii" in counts.changed:
        yield Step("pii", 0, Counter(), counts.changed["pii"])


def _rows(counts: Counts) -> Iterator[Row]:
    left = counts.documents
    for step in _steps(counts):
        came, left = left, left - step.removed
        changed = f"{step.changed:,}" if step.changed else ""
        yield step.name, f"{came:,}", f"{step.removed:,}", changed, f"{left:,}"
        for reason, number in sorted(step.reasons.items()):
            if reason:
                yield f"  {reason}", "", f"{number:,}", "", ""
    assert left == counts.out, counts


def _summary(counts: Counts) -> dict[str, Any]:
    return {
        "documents": counts.documents,
        "unreadable": counts.unreadable,
        "empty": counts.empty,
        "removed": {
            step: sum(counts.removed[step].values()) for step in STEPS if step in counts.removed
        },
        "changed": dict(counts.changed),
        "documents_out": counts.out,
        "characters": counts.characters,
        "characters_out": counts.characters_out,
    }
