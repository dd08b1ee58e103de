"""Where documents went in a cleaning, as a table for people."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from flame_composer.cleaning.parts import STEPS, Counts
from flame_composer.quantities import format_seconds


def report(manifest: dict[str, Any], seconds: float | None = None) -> list[str]:
    """One row a step and reason: documents in = documents removed + documents out; the last line
    is JSON.
    """
    counts = Counts.from_json(manifest["counts"])
    rows = [("step", "in", "removed", "changed", "out")]
    left = counts.documents
    steps = [
        ("unreadable", counts.unreadable, Counter[str]()),
        ("empty", counts.empty, Counter[str]()),
    ]
    steps += [
        (step, sum(counts.removed[step].values()), counts.removed[step])
        for step in STEPS
        if step in counts.removed
    ]
    if "pii" in counts.changed:
        steps.append(("pii", 0, Counter()))
    for step, removed, reasons in steps:
        changed = counts.changed[step]
        rows.append(
            (
                step,
                f"{left:,}",
                f"{removed:,}",
                f"{changed:,}" if changed else "",
                f"{left - removed:,}",
            )
        )
        rows += [
            (f"  {reason}", "", f"{number:,}", "", "")
            for reason, number in sorted(reasons.items())
            if reason
        ]
        left -= removed
    assert left == counts.out, counts
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    kept = (
        f"{counts.out:,} of {counts.documents:,} documents are left, "
        f"{counts.characters_out:,} of {counts.characters:,} characters"
    )
    if seconds is not None:
        kept += f", in {format_seconds(seconds)}: {counts.characters / seconds:,.0f} characters/s"
    summary = {
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
    return [*lines, kept, json.dumps(summary)]
