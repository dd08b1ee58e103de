"""One trial's process: started, watched, pruned by its evaluations, stopped when the sweep is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import Timeout

from flame_composer import processes
from flame_composer.config.cli import DISK_ERRORS
from flame_composer.config.sweep import SweepConfig
from flame_composer.errors import GOES_ON, IN_USE, TrainingError
from flame_composer.storage.folders import file_lock
from flame_composer.storage.local import open_own
from flame_composer.sweep import trials
from flame_composer.sweep.search import pruned_at
from flame_composer.sweep.trials import Result, Trial, folder_of

POLL_SECONDS = 0.25
LINE_SECONDS = 30.0  # between two lines of progress where stdout is no terminal
MOST_STARTS = 3  # of a trial that gets no further between two of them


def command_of(config: SweepConfig, trial: Trial, script: Path) -> list[str]:
    """Return the command that trains a trial: by python, or by the launcher for several devices."""
    launcher = ["-m", "composer.cli.launcher", "-n", str(config.devices)]
    first = [sys.executable, *([] if config.devices is None else launcher)]
    return [*first, str(script), *trials.arguments(config, trial)]


def run_trial(
    config: SweepConfig, trial: Trial, script: Path, others: Sequence[dict[int, float]]
) -> Result:
    """Train a trial until it ends or is pruned, and return its result.

    `others` holds the evaluations of the trials that it is compared with. A process that a signal
    ended is started again, as long as it gets further. Raise TrainingError if a disk or store
    failed and later trials would depend on that.
    """
    folder, tries = folder_of(config, trial), 0
    while True:
        _wait_for_orphan(folder)
        rows = trials.rows_of(folder)
        if (result := _pruned(config, rows, others)) is not None:
            return result
        said_before = _size(folder / trials.ERRORS)
        with _appending(folder / trials.OUTPUT) as out, _appending(folder / trials.ERRORS) as err:
            process = processes.start_child(command_of(config, trial, script), out, err)
        status = _watch(config, folder, process, others, Progress(rows))
        after = trials.rows_of(folder)
        if (result := _pruned(config, after, others)) is not None:
            return result
        if status == 0:
            return trials.outcome(after, config.result(), config.metric_steps)
        if status > 0 and status - 128 not in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            reason = _reason(folder / trials.ERRORS, said_before, status)
            if IN_USE in reason:
                continue
            if config.is_ordered() and _is_of_machine(reason):
                goes_on = "" if GOES_ON in reason else f"; {GOES_ON}"
                raise TrainingError(f"trial {trial.name}: {reason}{goes_on}")
            return Result("failed", reason=reason)
        tries = tries + 1 if len(after) <= len(rows) else 1
        if tries == MOST_STARTS:
            how = f"its process was ended by a signal (status {status})"
            return Result("failed", reason=f"{how} {tries} times without a further step")


def _wait_for_orphan(folder: Path) -> None:
    """Wait while a process trains the trial in `folder`, which outlived the sweep that started it.

    It may be saving a large checkpoint, for longer than recipes/train.py waits.
    """
    for place in (folder, folder / "checkpoints"):
        path = place / ".lock"
        # What cannot be locked is left to recipes/train.py to report.
        with suppress(OSError):
            if not path.is_file():
                continue
            lock = file_lock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"  waiting: {IN_USE}, and may be saving", flush=True)
                lock.acquire()
            lock.release()


def _is_of_machine(reason: str) -> bool:
    """Return whether a disk or store failed, which would have failed any other trial, too."""
    disk = any(os.strerror(number) in reason for number in DISK_ERRORS)
    return disk or GOES_ON in reason or re.match(r"\w+://", reason) is not None


def _pruned(
    config: SweepConfig, rows: list[dict[str, Any]], others: Sequence[dict[int, float]]
) -> Result | None:
    """Return the result of a trial if it is pruned, or None; at its last step it never is."""
    if config.prune is None or not rows:
        return None
    own = trials.evaluations(rows)
    own.pop(rows[-1].get("total_steps", -1), None)
    step = pruned_at(own, others, warmup=config.prune_warmup, needed=config.prune_trials)
    if step is None:
        return None
    reason = None if own[step] < float("inf") else "its eval_loss is not a finite number"
    if reason is not None:
        return Result("failed", step=step, reason=reason)
    return Result("pruned", own[step], step)


def _watch(
    config: SweepConfig,
    folder: Path,
    process: subprocess.Popen[bytes],
    others: Sequence[dict[int, float]],
    progress: Progress,
) -> int:
    """Wait for a trial's process, showing how far it is, and return its exit status.

    It gets SIGTERM, and time to save, when the trial is pruned or this process is stopped.
    """
    size, judged, told, has_ended = -1, 0, False, False
    try:
        while not has_ended:
            time.sleep(POLL_SECONDS)
            has_ended = process.poll() is not None  # before its last rows are read
            if (now := _size(folder / trials.TRAIN_LOG)) == size:
                continue
            size = now
            if not (last := trials.last_rows(folder)):
                continue
            progress.show(last)
            newest = max(trials.evaluations(last), default=0)
            if config.prune is None or newest <= judged or told or has_ended:
                continue
            judged = newest
            if _pruned(config, trials.rows_of(folder), others) is not None:
                process.terminate()
                told = True
    except BaseException as error:
        if process.poll() is None:
            process.terminate()
            progress.end()
            doing = "ends" if config.save_folder is None else "saves and ends"
            # A terminal sends it to the trial, too.
            again = "; Ctrl-C again ends it at once" if isinstance(error, KeyboardInterrupt) else ""
            print(f"  stopping: the trial {doing}{again}", flush=True)
        process.wait()
        raise
    finally:
        progress.end()
    return process.returncode


def _appending(path: Path) -> BinaryIO:
    """Open a file for what a trial says, but no link and no pipe."""
    with trials.explained(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _reason(errors: Path, start: int, status: int) -> str:
    """Return the last line that a process wrote to `errors`, from byte `start` on."""
    with errors.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    its_own = [line for line in said if line.startswith("error: ")]
    last = (its_own or said)[-1:]
    return last[0].removeprefix("error: ") if last else f"it ended with status {status}"


class Progress:
    """How far a trial is: on a terminal in a line that is overwritten.

    Elsewhere it is a line for each evaluation but that of the last step, which is in the trial's
    result, and one now and then.
    """

    def __init__(self, before: list[dict[str, Any]]):
        """Begin with the rows that are in the log already, of which nothing is shown."""
        self.on_terminal = sys.stdout.isatty()
        self.width = 0
        self.shown = time.monotonic()
        self.evaluated = max(trials.evaluations(before), default=0)

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Show the step and losses of the last row, and of evaluations since the last call."""
        evaluated = trials.evaluations(rows)
        if self.on_terminal:
            newest = max(evaluated, default=None)
            line = _line(rows[-1])
            if newest is not None and newest != rows[-1]["current_steps"]:
                line += f"  eval loss {evaluated[newest]:.4f} (step {newest:,})"
            print(f"\r{line.ljust(self.width)}", end="", flush=True)
            self.width = len(line)
            return
        new = [
            row
            for row in rows
            if row["current_steps"] in evaluated
            and self.evaluated < row["current_steps"] != row.get("total_steps")
        ]
        if not new and time.monotonic() - self.shown >= LINE_SECONDS:
            new = rows[-1:]
        for row in new:
            print(_line(row), flush=True)
            self.shown = time.monotonic()
        self.evaluated = max([self.evaluated, *evaluated])

    def end(self) -> None:
        """Clear the line."""
        if self.width:
            print(f"\r{' ' * self.width}\r", end="", flush=True)
            self.width = 0


def _line(row: dict[str, Any]) -> str:
    """Return a row of a trial's log as a line."""
    line = f"  step {row['current_steps']:,} of {row.get('total_steps', 0):,}"
    line += f"  loss {trials.number_of(row.get('loss')):.4f}"
    if "eval_loss" in row:
        line += f"  eval loss {trials.number_of(row['eval_loss']):.4f}"
    return line
