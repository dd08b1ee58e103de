"""Clean endings of runs at a signal, without a lost step, and locks against running one twice."""

from __future__ import annotations

import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from composer import Trainer
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from filelock import FileLock, Timeout

from flame_composer import processes
from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.config.train import TRAIN_LOG
from flame_composer.errors import IN_USE, ConfigError
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.folders import file_lock, require_safe
from flame_composer.train.announce import STARTS
from flame_composer.train.sums import StepSums, sum_over_ranks

# The exit statuses that signals may ask for, in order of rising priority.
STATUSES = (128 + signal.SIGTERM, 128 + signal.SIGINT)
LOCK_SECONDS = 60  # how long a run waits for its predecessor, which may still be saving


class Preempted(SystemExit):
    """Raised on every rank when a run stops at a signal: code 143 for SIGTERM, 130 for Ctrl-C."""


class Preemption(Callback):
    """A callback that ends a run cleanly at SIGTERM or Ctrl-C.

    The current batch finishes and a checkpoint of it is saved; evaluation is left to the restart.
    With several ranks, one that comes after the sums of a step lets the next batch finish, too.
    Composer's own handler would exit at once and lose everything since the last checkpoint.

    The signal may reach only one rank, and may come several times: the first one a rank receives
    decides its exit status. A second Ctrl-C ends the process at once.
    """

    def __init__(self, saver: SaveCheckpoints | None, sums: StepSums):
        """Handle signals from now until the process ends, since more may come while it ends.

        `saver` is None for a run that saves no checkpoints. The ranks tell one another by `sums`,
        at every step, which signals they have received.
        """
        self.saver = saver
        self.sums = sums
        sums.add("signals", lambda state: self._known())
        self.asked = 0  # exit status that a signal to this process asks for
        self.status = 0  # the exit status that all ranks have agreed on
        self._cannot_save = False  # on some rank
        # Whether the ranks have done something long, all of them, since they last agreed.
        self.has_paused = False
        self._interrupts = 0
        self._over = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(128 + signal.SIGINT)
        if self.asked or self._over:
            return
        if dist.get_global_rank() == 0:
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            # os.write, because the signal may have interrupted a print.
            with suppress(OSError):  # nobody may be reading stderr any more
                os.write(
                    2,
                    f"{signal.Signals(number).name}: finishing the current batch and saving"
                    f" it{again}\n".encode(),
                )
        # Metrics warn of an evaluation that a signal ends before its first batch.
        warnings.filterwarnings("ignore", "No batches were evaluated", UserWarning)
        warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
        self.asked = 128 + number
        processes.outlive_launcher()

    @contextmanager
    def running(self, trainer: Trainer) -> Iterator[None]:
        """Heed signals in the body of this context, then ignore them and close `trainer`.

        A checkpoint that is being saved becomes whole before the trainer is closed, also after an
        error. After an error the trainer does not wait for the other ranks, as closing it usually
        does: they may not have met the error.
        """
        close = trainer.close
        try:
            yield
        except Exception:
            close = trainer.engine.close
            raise
        finally:
            self._over = True
            if self.saver is not None:
                self.saver.settle()  # while the stall watchdog still watches
            close()

    def agree(self, state: State) -> None:
        """Set `status`, on all ranks, to the exit status that a signal to any of them asked for.

        Ctrl-C outranks SIGTERM, because the launcher sends SIGTERM after a Ctrl-C. The ranks also
        learn whether one of them knows of a checkpoint that could not be saved.
        """
        self._heed(sum_over_ranks(self._known(), state.device))

    def _known(self) -> list[int]:
        """Return, as 0 or 1, which of STATUSES was asked for, and whether a save has failed."""
        cannot_save = self.saver is not None and self.saver.has_failed()
        return [*(int(self.asked == status) for status in STATUSES), int(cannot_save)]

    def _heed(self, sums: list[int]) -> None:
        """Take note of the sums of what the ranks have `_known`."""
        *asked, failed = sums
        wanted = [status for status, number in zip(STATUSES, asked, strict=True) if number]
        self.status, self._cannot_save = max(wanted, default=0), bool(failed)
        self.has_paused = False

    def until_asked(self, batches: Any) -> UntilAsked:
        """Return an evaluation's `batches`, cut off when a signal comes."""
        return UntilAsked(self, batches)

    def unless_stopping(
        self, due: Callable[[State, Event], bool]
    ) -> Callable[[State, Event], bool]:
        """Return a version of `due` that is never true once the run is about to stop."""
        return lambda state, event: not self.status and due(state, event)

    def batch_end(self, state: State, logger: Logger) -> None:
        # Before Composer evaluates. A single rank need not agree with any other, and may already
        # know more than when the sums were taken.
        self._heed(self._known() if dist.get_world_size() == 1 else self.sums["signals"])

    def eval_end(self, state: State, logger: Logger) -> None:
        self.has_paused = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        # Usually a signal that came after the sums were taken waits for those of the next step.
        # But an evaluation may have been cut short by it, and after a long save there may be no
        # time left for another step.
        has_saved = self.saver is not None and self.saver.has_saved(state)
        if self.has_paused or has_saved or dist.get_world_size() == 1:
            self.agree(state)
        if self._cannot_save and self.saver is not None:
            self.saver.wait()  # raises the same error on all ranks
        if self.status:
            processes.outlive_launcher()  # the signal may have reached another rank only
            if self.saver is not None:
                self.saver.save(state)
                self.saver.wait()
            self._stop(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        self.agree(state)
        if self.status:
            self._stop(state)

    def _stop(self, state: State) -> None:
        if dist.get_global_rank() == 0:
            step, goes_on = state.timestamp.batch.value, "the same command goes on from there"
            if self.saver is None:
                saved, goes_on = (
                    "nothing was saved (save_folder=null)",
                    "the same command starts over",
                )
            else:
                saved = (
                    "nothing new to save"
                    if self.saver.saved is None
                    else f"saved {self.saver.saved}"
                )
            print(f"stopped after step {step}; {saved}; {goes_on}", file=sys.stderr, flush=True)
        raise Preempted(self.status)


class UntilAsked:
    """The batches of an evaluation, cut off when a signal comes to this process.

    Composer ends an evaluation on all ranks when the first of them has no more batches.
    """

    def __init__(self, preemption: Preemption, batches: Any):
        self.preemption = preemption
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.preemption.asked:
                return
            yield batch


def lock_folders(
    log_folder: str,
    save_folder: str | None,
    held: Mapping[Path, FileLock | None] = MappingProxyType({}),
    seconds: float = LOCK_SECONDS,
) -> dict[Path, FileLock | None]:
    """Lock both folders of a run with `lock_run`; return the locks by folder.

    Both are locked, because another run may save to the same folder. Locks in `held` are kept. A
    save_folder in an object store cannot be locked.
    """
    places = [
        log_folder,
        *([save_folder] if save_folder and not is_url(save_folder) else []),
    ]
    folders = {os.path.realpath(place): Path(place) for place in places}.values()
    return {folder: held.get(folder) or lock_run(folder, seconds) for folder in folders}


def lock_run(folder: Path, seconds: float = LOCK_SECONDS) -> FileLock | None:
    """Lock a folder that the run writes to until this process ends, and return the lock.

    Return None if there is no such folder yet, and on every rank but the first.

    If another process holds the lock, wait up to `seconds` for it, as it may be saving its last
    checkpoint; then raise ConfigError.
    """
    if not folder.is_dir() or dist.get_global_rank() != 0:
        return None
    require_safe(folder, "log_folder, save_folder")
    _require_own(folder)
    try:
        lock = file_lock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if seconds:
                print(
                    f"{folder}: waiting for another process that trains this run",
                    file=sys.stderr,
                    flush=True,
                )
            lock.acquire(timeout=seconds)
    except Timeout:
        raise ConfigError(
            f"{folder}: {IN_USE}; wait until it has ended, or give this one another run_name (and"
            " other folders)"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder / '.lock'}: cannot be locked: {error.strerror}; remove what lies there, or"
            " give this run another run_name"
        ) from None
    return lock


def _require_own(folder: Path) -> None:
    """Raise ConfigError if this user cannot write the run's files, e.g. because of their owner."""
    names = ("", ".lock", TRAIN_LOG, STARTS, "config.yaml")
    for path in (folder / name for name in names):
        is_log = path.name in (TRAIN_LOG, STARTS)
        if is_log and os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise ConfigError(
                f"{path}: is a link, or not a regular file, but a run writes only to files of its"
                " own; remove it, or give this run another run_name"
            )
        if path.exists() and not os.access(path, os.W_OK, effective_ids=True):
            whose = (
                ""
                if path.stat().st_uid == os.geteuid()
                else f": it belongs to user {path.stat().st_uid}; this is user {os.geteuid()}"
            )
            raise ConfigError(
                f"{path}: is in use by this run, but cannot be written to{whose}; give this run"
                " another run_name, or set log_folder"
            )
