"""A trial on disk: its folder, the evaluations in its log, and its result."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flame_composer.config.axes import arguments_of, name_of
from flame_composer.config.sweep import SweepConfig, run_name
from flame_composer.config.train import TRAIN_LOG
from flame_composer.errors import DataError
from flame_composer.storage.files import dump_json
from flame_composer.storage.local import appearing, open_own

RESULT, OUTPUT, ERRORS = "result.json", "output.txt", "errors.txt"
TAIL = 1 << 16  # bytes at the end of a log, in which its last rows are
STATES = ("finished", "pruned", "failed")


@dataclass(frozen=True)
class Result:
    """What came of a trial: a state of STATES, the metric and its step, or why it failed.

    Of a pruned trial, the metric is the loss of the evaluation at which it was pruned. `same_as`
    names an earlier trial with the same values, whose result this is.
    """

    state: str
    metric: float | None = None
    step: int | None = None
    reason: str | None = None
    same_as: str | None = None


@dataclass(frozen=True)
class Trial:
    """A trial: its number, its values as texts in the order of the axes, and its name."""

    number: int
    values: tuple[str, ...]
    name: str

    @classmethod
    def of(cls, config: SweepConfig, number: int, values: tuple[str, ...]) -> Trial:
        """Return a trial. Its name has its number unless it is one of a grid, which may grow."""
        name = name_of(config.axes, values)
        return cls(number, values, name if config.search == "grid" else f"{number:03d}-{name}")


def folder_of(config: SweepConfig, trial: Trial) -> Path:
    return Path(config.sweep_folder, trial.name)


def arguments(config: SweepConfig, trial: Trial) -> list[str]:
    """Return what recipes/train.py is started with for a trial."""
    folder = folder_of(config, trial)
    if config.save_folder is None:
        saved = "null"
    elif "://" in config.save_folder:
        saved = f"{config.save_folder.rstrip('/')}/{run_name(config, trial.name)}"
    else:
        saved = str(folder / "checkpoints")
    return [
        *config.shared,
        *arguments_of(config.axes, trial.values),
        f"run_name={run_name(config, trial.name)}",
        f"log_folder={folder}",
        f"save_folder={saved}",
        "progress_bar=false",
    ]


def read_result(folder: Path) -> Result | None:
    """Return the result of the trial in `folder`, or None if it has none yet."""
    try:
        content = read_own(folder / RESULT)
        if content is None:
            return None
        result = Result(**json.loads(content))
        if _is_whole(result):
            return result
    except DataError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    raise DataError(
        f"{folder / RESULT}: damaged: not the result of a trial; remove it, and the trial goes"
        " on from its checkpoint"
    )


def _is_whole(result: Result) -> bool:
    """Return whether a result that was read is one that `write_result` writes."""
    texts = (result.reason, result.same_as)
    if result.state not in STATES or not all(isinstance(each, str | None) for each in texts):
        return False
    numbers = result.metric, result.step
    is_failed = result.state == "failed"
    if is_failed and (result.reason is None or result.metric is not None):
        return False
    # A bool is an int to Python.
    is_metric = type(result.metric) in (int, float) and math.isfinite(result.metric or 0)
    is_step = type(result.step) is int and result.step >= 0
    return all(
        is_right or (is_failed and number is None)
        for number, is_right in zip(numbers, (is_metric, is_step), strict=True)
    )


def write_result(folder: Path, result: Result) -> None:
    """Write the result of the trial in `folder`, whole or not at all."""
    content = {key: value for key, value in asdict(result).items() if value is not None}
    write_whole(folder / RESULT, content)


def write_whole(path: Path, content: Any) -> None:
    """Write JSON to a file, which appears whole or stays as it was."""
    with explained(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with appearing(str(path)) as file:
                file.write(dump_json(content))
        except OSError:
            path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
            raise


@contextmanager
def explained(path: Path, done: str) -> Iterator[None]:
    """Raise DataError, which names the file, for an OSError in the body.

    `done` is what cannot be done with the file.
    """
    try:
        yield
    except OSError as error:
        # A file in place of a folder is what has to be removed.
        above = next((each for each in path.parents if each.exists()), path)
        place = path if above.is_dir() else above
        why = error.strerror if place is path else "is a file, and must be a folder"
        raise DataError(
            f"{place}: cannot be {done}: {why}; mend or remove what lies there, or give another"
            " sweep_folder"
        ) from None


def read_own(path: Path) -> bytes | None:
    """Return the content of a file of a sweep, or None if there is none.

    Raise DataError for what cannot be read, and for a link or a pipe, which are not waited for.
    """
    with explained(path, "read"):
        try:
            with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a trial's log; a row that is being written is left out."""
    return list(_rows((read_own(folder / TRAIN_LOG) or b"").splitlines(keepends=True)))


def last_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the last rows of a trial's log: those that are in its last TAIL bytes."""
    try:
        with (folder / TRAIN_LOG).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL, 0))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return list(_rows(lines if size <= TAIL else lines[1:]))


def _rows(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            continue  # train.py says so, and mends it
        if isinstance(row, dict) and isinstance(row.get("current_steps"), int):
            yield row


def evaluations(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Return the losses of the evaluations by step; one that is no number is infinite."""
    return {row["current_steps"]: number_of(row["eval_loss"]) for row in rows if "eval_loss" in row}


def number_of(value: Any) -> float:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else math.inf


def outcome(rows: list[dict[str, Any]], metric: str, metric_steps: int) -> Result:
    """Return the result of a trial that has ended by itself, with these rows in its log."""
    if metric == "eval_loss":
        evaluated = evaluations(rows)
        if not evaluated:
            return Result("failed", reason="its log holds no evaluation")
        step, value = max(evaluated.items())
    else:
        losses = [number_of(row.get("loss")) for row in rows[-metric_steps:]]
        if not losses:
            return Result("failed", reason="its log holds no step")
        step, value = rows[-1]["current_steps"], math.fsum(losses) / len(losses)
    if value == math.inf:
        return Result("failed", step=step, reason=f"its {metric} is not a finite number")
    return Result("finished", value, step)
