"""The rows of a log: kept to a step, mended where a kill cut one short, and written at its end."""

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
    """Raise TrainingError, with the file's name, if it cannot be written. The next start drops a
    row that was cut short.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written: {error.strerror}; when that is mended, {GOES_ON}"
        ) from None


def appending(path: Path) -> TextIO:
    """Open a log to be written to at its end, made if need be. Raise OSError for what is no
    file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.fdopen(open_own(path, flags), "a", encoding="utf-8")


def is_cut_short(path: Path) -> bool:
    """Whether the last line has no end, as a kill or a full disk leaves it: what is written next
    would be part of it.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def keep_rows(
    path: Path, *, last_step: int, evaluation: dict[str, Any] | None = None, several: bool = False
) -> list[range]:
    """Drop the rows after `last_step`, and what is no row, such as one that a kill cut short.

    Replaces the file in one step. `evaluation` goes into the row of `last_step`, where it would
    have been. What is dropped from the middle is named in a warning. Of several rows of a step the
    last stays, and rows are put in order; a file that has `several` rows a step keeps them all.
    Returns which of the steps up to `last_step` have no row.
    """
    kept: dict[int, bytes] = {}
    moved: set[int] = set()  # steps with several rows, or rows that come after one of a later step
    max_step = 0
    lines: list[bytes] = []
    if os.path.lexists(path):
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            if number < len(lines):  # the last one has no end: it is empty, or was cut short
                log.warning(
                    "warning: %s: line %d is no row of the log and is left out", path, number
                )
            continue
        if row["current_steps"] > last_step:
            continue
        if evaluation is not None and row["current_steps"] == last_step:
            after = {key: row.pop(key) for key in ("batch_hash", "streams") if key in row}
            line = json.dumps(row | evaluation | after).encode()
        step = row["current_steps"]
        if step < max_step or (step == max_step and not several):
            moved.add(step)
        kept[step] = (kept.get(step, b"") if several else b"") + line + b"\n"
        max_step = max(max_step, step)
    if moved:
        log.warning(
            "warning: %s: several rows, or rows out of order, of %s: put in order, and the last of"
            " each step is kept",
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
    """The row in a line of the log; None if it is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # of damaged UTF-8, too
        return None
    step = row.get("current_steps") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and step > 0 else None


def ranges(missing: list[range]) -> str:
    """For people: `step 3`, `steps 3, 7-9`; of very many gaps the first ten."""
    parts = [str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in missing]
    more = f" and more: {sum(map(len, missing)):,} in all" if len(parts) > 10 else ""
    word = "step" if len(missing) == 1 and len(missing[0]) == 1 else "steps"
    return f"{word} {', '.join(parts[:10])}{more}"
