"""The rows of a JSONL log: appended, cut back to a step, and repaired after a kill."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from flame_composer.errors import GOES_ON, TrainingError
from flame_composer.storage.folders import flush
from flame_composer.storage.local import create, open_own

log = logging.getLogger(__name__)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise TrainingError, naming the file, if the body cannot write it.

    A row that was cut short is dropped by `keep_rows` at the next start.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written: {error.strerror}; when that is mended, {GOES_ON}"
        ) from None


def appending(path: Path) -> TextIO:
    """Open a log for appending, and create it if there is none.

    Raise OSError if the path is a link or not a regular file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.fdopen(open_own(path, flags), "a", encoding="utf-8")


def is_cut_short(path: Path) -> bool:
    """Return whether the last line lacks its newline, as a kill or a full disk leaves it.

    The next row would become part of that line.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def keep_rows(
    path: Path, *, last_step: int, evaluation: dict[str, Any] | None = None, several: bool = False
) -> list[range]:
    """Drop the rows after `last_step`, and lines that are not rows; return the missing steps.

    The missing steps are those up to `last_step` that have no row. The last line is dropped
    silently if a kill cut it short; other damaged lines are named in a warning. Rows are put in
    order, and the last row of each step is kept; `several` keeps all of a step's rows, for files
    that have more than one. `evaluation` is added to the row of `last_step`, at its usual place.
    The file is replaced atomically.
    """
    kept: dict[int, bytes] = {}
    moved: set[int] = set()  # steps with several rows, or out of order
    max_step = 0
    lines: list[bytes] = []
    if os.path.lexists(path):
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            if number < len(lines):  # the last has no newline: it is empty, or was cut short
                log.warning(
                    "warning: %s: line %d is not a row of the log and is left out", path, number
                )
            continue
        if row["current_steps"] > last_step:
            continue
        if evaluation is not None and row["current_steps"] == last_step:
            after = {
                key: row.pop(key) for key in ("batch_hash", "streams", "left_out") if key in row
            }
            line = json.dumps(row | evaluation | after).encode()
        step = row["current_steps"]
        if step < max_step or (step == max_step and not several):
            moved.add(step)
        kept[step] = (kept.get(step, b"") if several else b"") + line + b"\n"
        max_step = max(max_step, step)
    if moved:
        log.warning(
            "warning: %s: has several rows, or rows out of order, for %s; they are put in order,"
            " and the last of each step is kept",
            path,
            ranges([range(step, step + 1) for step in sorted(moved)]),
        )
    if path.exists():
        temporary = path.with_suffix(".tmp")
        with create(temporary) as whole:
            whole.write(b"".join(kept[step] for step in sorted(kept)))
        flush(temporary)
        os.replace(temporary, path)
    borders = [0, *sorted(kept), last_step + 1]
    return [
        range(before + 1, after)
        for before, after in itertools.pairwise(borders)
        if after > before + 1
    ]


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line of the log, or None if the line is not a row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # damaged UTF-8 raises ValueError, too
        return None
    step = row.get("current_steps") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and step > 0 else None


def ranges(missing: list[range]) -> str:
    """Return the steps as text, e.g. `step 3` or `steps 3, 7-9`; only the first ten ranges."""
    parts = [str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in missing]
    more = f" and more: {sum(map(len, missing)):,} in all" if len(parts) > 10 else ""
    word = "step" if len(missing) == 1 and len(missing[0]) == 1 else "steps"
    return f"{word} {', '.join(parts[:10])}{more}"
