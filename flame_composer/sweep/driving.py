"""The course of a sweep: trials claimed, trained and recorded, by any number of processes.

All that a sweep knows is in its folder: a result for each trial that has ended, checkpoints of the
others. A trial is claimed by a lock on a file in its folder, which a process loses when it ends,
however it ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flame_composer.config.sweep import SweepConfig
from flame_composer.errors import ConfigError, TrainingError
from flame_composer.lines import visible
from flame_composer.quantities import format_seconds, plural
from flame_composer.storage.folders import file_lock, require_safe
from flame_composer.sweep import record, search, trials
from flame_composer.sweep.checking import check_trials
from flame_composer.sweep.results import Outcome, summarize
from flame_composer.sweep.trials import Result, Trial, folder_of
from flame_composer.sweep.watching import run_trial

LOCK, CLAIM = ".lock", ".sweep.lock"
WAIT_SECONDS = 1.0


class Sweep:
    """A sweep in its folder: the trials that are known, and their results."""

    def __init__(self, config: SweepConfig, script: Path):
        """Enter the sweep's folder; `script` is recipes/train.py."""
        self.config = config
        self.script = script
        self.folder = Path(config.sweep_folder)
        self.count = search.count(config)
        self.trials: dict[int, Trial] = {}
        self.results: dict[int, Result] = {}
        self.evaluations: dict[int, dict[int, float]] = {}
        self.content = record.describe(config)

    def enter(self) -> None:
        """Begin the sweep, or make sure that it is this one that was begun.

        All trials are checked first, unless they were when the sweep began. If one is wrong, no
        folder is left behind.
        """
        is_new = not self.folder.exists()
        with locked(self.folder):
            before = record.read(str(self.folder))
            if before is not None:
                self.content = record.describe(self.config, before["environment"]["salt"])
                record.require_same(str(self.folder), before, self.content)
            if before != self.content:
                print(f"checking {plural(len(self.config.to_check), 'configuration')}", flush=True)
                try:
                    check_trials(self.config.to_check)
                except BaseException:
                    if is_new:
                        self._remove_folder()
                    raise
                record.write(str(self.folder), self.content)
            if self.config.retry_failed:
                self._forget_failed()

    def _remove_folder(self) -> None:
        """Remove the sweep's folder while it holds nothing but the lock, which is held."""
        with suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == [LOCK]:
                (self.folder / LOCK).unlink()
                self.folder.rmdir()

    def _forget_failed(self) -> None:
        for number in range(self.count):
            result = trials.read_result(folder_of(self.config, self.trial(number)))
            if result is not None and result.state == "failed":
                path = folder_of(self.config, self.trial(number)) / trials.RESULT
                with trials.explained(path, "removed"):
                    path.unlink()

    def trial(self, number: int) -> Trial:
        """Return a trial; the results that its values depend on must be known."""
        if number not in self.trials:
            values = search.choose(self.config, number, self._seen_by(number))
            self.trials[number] = Trial.of(self.config, number, values)
        return self.trials[number]

    def _seen_by(self, number: int) -> list[tuple[Trial, Result]]:
        """Return the trials whose results trial `number` may see, in order."""
        if not self.config.is_ordered():
            return []
        last = max(number - self.config.parallel + 1, 0)
        return [(self.trials[each], self.results[each]) for each in range(last)]

    def refresh(self) -> None:
        """Read the results that other processes have written, as far as trials are known."""
        for number in range(self.count):
            if number in self.results:
                continue
            waits = range(number - self.config.parallel + 1) if self.config.is_ordered() else ()
            if not all(each in self.results for each in waits):
                break
            found = trials.read_result(folder_of(self.config, self.trial(number)))
            if found is not None:
                self.results[number] = found

    def claim(self) -> tuple[Trial, FileLock] | None:
        """Return a trial that nobody runs, with its lock, or None if there is none at present."""
        for number, trial in sorted(self.trials.items()):
            twin = self._twin(trial)
            if number in self.results or (twin is not None and twin not in self.results):
                continue
            folder = folder_of(self.config, trial)
            with trials.explained(folder / CLAIM, "locked"):
                folder.mkdir(parents=True, exist_ok=True)
                lock = file_lock(folder / CLAIM)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
            if (found := trials.read_result(folder)) is None:
                return trial, lock
            lock.release()
            self.results[number] = found
        return None

    def _twin(self, trial: Trial) -> int | None:
        """Return the first of the earlier trials with the same values, or None."""
        return next(
            (each for each in range(trial.number) if self.trials[each].values == trial.values),
            None,
        )

    def train(self, trial: Trial) -> Result:
        """Return the result of a trial, after training it, unless an earlier one is the same."""
        if (twin := self._twin(trial)) is not None:
            same = self.results[twin]
            name = same.same_as or self.trials[twin].name
            return Result(same.state, same.metric, same.step, same.reason, name)
        return run_trial(self.config, trial, self.script, self._compared_with(trial))

    def _compared_with(self, trial: Trial) -> list[dict[int, float]]:
        """Return the evaluations of the trials that a trial is compared with, if it can be pruned.

        Those of a pruned trial end where it was pruned, even if it trained a little further.
        """
        if self.config.prune is None:
            return []
        for number, (each, result) in enumerate(self._seen_by(trial.number)):
            if number in self.evaluations:
                continue
            counts = result.state != "failed" and result.same_as is None
            rows = trials.rows_of(folder_of(self.config, each)) if counts else []
            last = result.step if result.state == "pruned" else None
            self.evaluations[number] = {
                step: loss
                for step, loss in trials.evaluations(rows).items()
                if last is None or step <= last
            }
        known = range(len(self._seen_by(trial.number)))
        return [self.evaluations[number] for number in known]

    def finish(self, trial: Trial, result: Result) -> None:
        """Record the result of a trial, for all processes."""
        trials.write_result(folder_of(self.config, trial), result)
        self.results[trial.number] = result
        with locked(self.folder):
            self.refresh()
            self.write_results()

    def write_results(self) -> None:
        """Write what is known, unless another process has enlarged the sweep meanwhile."""
        if record.read(str(self.folder)) == self.content:
            known = [(self.trials[number], self.results[number]) for number in sorted(self.results)]
            trials.write_whole(self.folder / "results.json", summarize(self.config, known).content)
            if self.config.search == "tpe":
                with trials.explained(self.folder / search.JOURNAL, "written"):
                    search.write_journal(self.config, known)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a sweep's own lock: for moments, but for the check of its trials."""
    try:
        lock = _take(folder, seconds=0)
        if lock is None:
            _say(
                f"{folder}: waiting for another process, which checks the trials or writes results"
            )
        while lock is None:
            # The process that holds the lock removes the folder if its trials are refused.
            with suppress(FileNotFoundError):
                lock = _take(folder, seconds=-1)
    except OSError as error:
        raise ConfigError(
            f"sweep_folder={folder}: cannot be written to: {error.strerror}; give another"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _take(folder: Path, seconds: float) -> FileLock | None:
    """Return the lock of a sweep's folder, which is made if need be, or None if it is not free.

    Wait so long for it, or without end if `seconds` is negative.
    """
    folder.mkdir(parents=True, exist_ok=True)
    require_safe(folder, "sweep_folder")
    lock = file_lock(folder / LOCK)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    return lock


def run_sweep(config: SweepConfig, script: Path) -> Outcome:
    """Run the trials of a sweep that nobody has run or runs, wait for all, and return the outcome.

    `script` is recipes/train.py. Raise ConfigError if the sweep's folder is that of another one,
    and TrainingError if a trial fails with on_failure=stop.
    """
    search.require_optuna(config.search)
    sweep = Sweep(config, script)
    sweep.enter()
    sweep.refresh()
    _say(f"{config.sweep_folder}: {plural(sweep.count, 'trial')}, {len(sweep.results)} done")
    for key in config.incomparable():
        remedy = "" if config.result() == "eval_loss" else "; metric=eval_loss is for that"
        _say(
            f"warning: {key}: trials with other values of it cannot be compared by"
            f" {config.result()}, as it changes what the loss is of{remedy}"
        )
    waiting = False
    while len(sweep.results) < sweep.count:
        claimed = sweep.claim()
        if claimed is None:
            if not waiting:
                _say("waiting for trials that other processes run")
            waiting = True
            time.sleep(WAIT_SECONDS)
            sweep.refresh()
            continue
        waiting, (trial, lock) = False, claimed
        try:
            _say(f"trial {trial.number + 1} of {sweep.count}: {trial.name}")
            start = time.monotonic()
            result = sweep.train(trial)
            seconds = time.monotonic() - start
            sweep.finish(trial, result)
        finally:
            lock.release()
        _say(f"  {describe(result, config.result(), seconds)}")
        if result.state == "failed" and config.on_failure == "stop":
            raise TrainingError(
                f"trial {trial.name} failed: {result.reason}; the sweep stops here, as"
                " on_failure=stop; the same command goes on with the other trials"
            )
    with locked(sweep.folder):
        sweep.write_results()
    return summarize(config, [(sweep.trials[n], sweep.results[n]) for n in range(sweep.count)])


def _say(line: str) -> None:
    print(visible(line), flush=True)


def describe(result: Result, metric: str, seconds: float) -> str:
    """Return a line on the result of a trial, which took this process `seconds`."""
    how = f"as trial {result.same_as}, which has the same values" if result.same_as else None
    if result.state == "failed":
        return f"failed: {result.reason}" + (f" ({how})" if how else "")
    if result.state == "pruned":
        metric = "eval_loss"
    loss = f"{metric.replace('_', ' ')} {result.metric:.4f}"
    return f"{result.state} at step {result.step:,}, {loss} ({how or format_seconds(seconds)})"
