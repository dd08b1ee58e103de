"""A reader of a run's log: the values of each key with their steps, and the run's starts."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError

LOG, STARTS = "train_log.jsonl", "starts.jsonl"

Column = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps, and a value for each


@dataclass(frozen=True)
class Run:
    """The log of a run, with its values as one column per key.

    `columns` holds the values of each key with their steps, in order. `starts` holds the run's
    starts, each with the step it started after: 0 for the first. `last` holds the values of NUMBERS
    in the last of the `num_rows` rows. `notes` tell the user of anything odd in the files.
    """

    name: str
    place: str
    columns: dict[str, Column]
    num_rows: int
    last: dict[str, int]
    starts: list[dict[str, Any]]
    notes: list[str]

    @classmethod
    def of_rows(
        cls,
        name: str,
        place: str,
        rows: Iterable[dict[str, Any]],
        starts: list[dict[str, Any]],
        notes: list[str],
    ) -> Run:
        """Return the run with these rows, keeping only their numbers: there may be millions."""
        found = {key: (array("d"), array("d")) for key in KEYS}
        add = [(key, steps.append, values.append) for key, (steps, values) in found.items()]
        num_rows, row = 0, dict[str, Any]()
        for row in rows:
            num_rows += 1
            step = row["current_steps"]
            for key, add_step, add_value in add:
                if key in row:
                    value = row[key]
                    add_step(step)
                    add_value(math.nan if value is None else value)
        last = {key: row[key] for key in NUMBERS if row}
        columns = {
            key: (np.array(steps), np.array(values)) for key, (steps, values) in found.items()
        }
        steps, losses = columns["loss"]
        columns["perplexity"] = (
            steps,
            np.exp(losses, where=losses <= 700, out=np.full(len(losses), np.nan)),
        )
        return cls(name, place, columns, num_rows, last, starts, notes)

    @property
    def resumed_after(self) -> list[int]:
        """The steps after which the run was resumed, in order and without repetitions."""
        return sorted({start["step"] for start in self.starts if start["step"] > 0})


NUMBERS = ("current_steps", "total_steps", "num_tokens")

MOST = 10**18  # no real log has as many steps or tokens

MOST_IN_LINE = 1 << 24  # characters; the lines that a run writes have a few hundred


def read_run(path: str) -> Run:
    """Return the run whose log folder, or log file, is at `path`.

    A last row that a kill cut short is left out, and noted. Raise ConfigError if there is no log,
    and DataError if it is empty or damaged.
    """
    log = Path(path) / LOG if Path(path).is_dir() else Path(path)
    if not log.is_file():
        what = f"has no {LOG}" if Path(path).is_dir() else "no such folder"
        raise ConfigError(f"runs: {path}: {what}; name the log_folder of a run, e.g. runs/gla_tiny")
    notes: list[str] = []
    starts = log.with_name(STARTS)
    started = (
        [start for _, start in _read_lines(starts, notes, forgiving=True)]
        if starts.is_file()
        else []
    )
    if not started:
        notes.append(f"there is no {STARTS} beside the log, so resumes are not marked")
    run = Run.of_rows(
        log.parent.name if log.name == LOG else log.stem,
        str(log.parent),
        _rows(log, notes),
        [],
        notes,
    )
    if not run.num_rows:
        raise DataError(f"{log}: holds no whole row yet; wait for the run's first step")
    known = (
        start
        for start in started
        if _is_count(start.get("step")) and start["step"] < run.last["current_steps"]
    )
    run.starts.extend(known)
    return run


def _rows(log: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    for number, row in _read_lines(log, notes):
        if not all(_is_count(row.get(key)) for key in NUMBERS) or not _are_numbers(row):
            raise DataError(
                f"{log}:{number}: damaged: not a row of a training log; restore it from a copy, or"
                " delete the line"
            )
        yield row


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _are_numbers(row: dict[str, Any]) -> bool:
    for key in KEYS:
        value = row.get(key)
        if not (
            type(value) is float or value is None or (type(value) is int and abs(value) < 1e300)
        ):
            return False
    return True


def _read_lines(
    path: Path, notes: list[str], *, forgiving: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON Lines file, each with its line number; skip empty lines.

    A last line without a newline that is not an object was cut short: it is left out, and added to
    `notes`. Any other line that is not an object is noted if `forgiving`; otherwise DataError is
    raised.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_IN_LINE), ""), 1):
                if len(line) == MOST_IN_LINE:
                    raise DataError(
                        f"{path}:{number}: damaged: a line of more than {MOST_IN_LINE:,}"
                        " characters; restore it from a copy, or delete the line"
                    )
                try:
                    row = json.loads(line) if line != "\n" else None
                except (ValueError, RecursionError):
                    row = ()
                if isinstance(row, dict):
                    yield number, row
                elif row is not None and not line.endswith("\n"):
                    notes.append(f"the last row of {path.name} was cut short, and is left out")
                elif row is not None and forgiving:
                    notes.append(f"line {number} of {path.name} is damaged, and is left out")
                elif row is not None:
                    raise DataError(
                        f"{path}:{number}: damaged: not a JSON object; restore it from a copy, or"
                        " delete the line"
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not text'}"
        ) from None


class Chart(NamedTuple):
    """A chart of the values of `key` over steps, with the values of `also`, if any, as points."""

    name: str
    title: str
    key: str
    also: str | None = None
    log_scale: bool = False


CHARTS = (
    Chart("loss", "loss", "loss", "eval_loss"),
    Chart("perplexity", "perplexity", "perplexity", "eval_perplexity", log_scale=True),
    Chart("learning_rate", "learning rate", "learning_rate"),
    Chart("grad_norm", "gradient norm", "grad_norm", log_scale=True),
    Chart("throughput", "tokens a second", "throughput"),
)

KEYS = sorted(
    {
        key
        for chart in CHARTS
        for key in (chart.key, chart.also)
        if key is not None and key != "perplexity"
    }
)
