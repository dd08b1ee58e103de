"""Ending a run at a signal without losing anything, and keeping a run from being started twice."""

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

import torch
from composer import Trainer
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from filelock import FileLock, Timeout

from flame_composer import processes
from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.config.train import TRAIN_LOG
from flame_composer.errors import ConfigError
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.folders import file_lock, require_safe
from flame_composer.train.announce import STARTS

# What a rank may be asked, by what counts for more
WEIGHTS = (0, 128 + signal.SIGTERM, 128 + signal.SIGINT)
LOCK_SECONDS = 60  # how long a run waits for its predecessor, which may still be saving


class Preempted(SystemExit):
    """Raised on every rank when a run has stopped at a signal. Its code is 143 for SIGTERM, 130
    for Ctrl-C.
    """


class Preemption(Callback):
    """At SIGTERM or Ctrl-C: the batch in hand finishes, a checkpoint of it is saved, evaluation is
    left for the restart.

    The signal may come to one rank only, and to each several times; what comes first decides the
    status. A second Ctrl-C ends the process at once. Composer's own handler exits where it stands,
    with all that was computed since the last checkpoint.
    """

    def __init__(self, saver: SaveCheckpoints | None):
        """Listens from now until the process ends, where more signals may come. `saver` is None
        for a run that saves none.
        """
        self.saver = saver
        self.asked = 0  # by a signal to this process: the exit status to end with
        self.status = 0  # the same, agreed on by all ranks
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
            # Not print: the signal may have come in the middle of one.
            with suppress(OSError):  # nobody reads it any more
                os.write(
                    2,
                    f"{signal.Signals(number).name}: finishing the batch in hand and saving"
                    f" it{again}\n".encode(),
                )
        # Of an evaluation that ends before its first batch.
        warnings.filterwarnings("ignore", "No batches were evaluated", UserWarning)
        warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
        self.asked = 128 + number
        processes.outlive_launcher()

    @contextmanager
    def running(self, trainer: Trainer) -> Iterator[None]:
        """In the body of this context a signal is an order to stop; after it the process is ending
        anyway. Closes `trainer`.

        After an error, which the other ranks may not share, the trainer does not wait for them, as
        it would otherwise.
        """
        close = trainer.close
        try:
            yield
        except Exception:
            close = trainer.engine.close
            raise
        finally:
            self._over = True
            close()

    def agree(self, state: State) -> None:
        """Every rank comes to know what any of them was asked. Ctrl-C counts for more: the
        launcher sends SIGTERM after it.
        """
        if dist.get_world_size() == 1:
            self.status = self.asked
            return
        weight = state.device.tensor_to_device(torch.tensor([WEIGHTS.index(self.asked)]))
        dist.all_reduce(weight, reduce_operation="MAX")
        self.status = WEIGHTS[int(weight.item())]

    def until_asked(self, batches: Any) -> UntilAsked:
        return UntilAsked(self, batches)

    def unless_stopping(
        self, due: Callable[[State, Event], bool]
    ) -> Callable[[State, Event], bool]:
        return lambda state, event: not self.status and due(state, event)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.agree(state)  # before Composer evaluates

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.agree(state)  # an evaluation may have been cut short
        if self.status:
            processes.outlive_launcher()  # it may be another rank that heard the signal
            if self.saver is not None:
                self.saver.save(state)
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
    """An evaluation's batches, up to the signal. Composer stops all ranks where the first of
    them has no more batches.
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
    """Keep both folders of a run for this process, as `lock_run` does: another run may save in the
    same one.

    Those that are `held` already stay so. What is in an object store cannot be kept.
    """
    places = [
        log_folder,
        *([save_folder] if save_folder and not is_url(save_folder) else []),
    ]
    folders = {os.path.realpath(place): Path(place) for place in places}.values()
    return {folder: held.get(folder) or lock_run(folder, seconds) for folder in folders}


def lock_run(folder: Path, seconds: float = LOCK_SECONDS) -> FileLock | None:
    """Keeps `folder`, which a run writes to, for this process until it ends.

    None if there is no such folder yet, and on every rank but the first.

    Waits for another process that has it, which may be saving its last checkpoint. Raises
    ConfigError after `seconds`.
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
            f"{folder}: another process is training this run; wait until it has ended, or give this"
            " one another run_name (and other folders)"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder / '.lock'}: cannot be locked: {error.strerror}; remove what lies there, or"
            " give this run another run_name"
        ) from None
    return lock


def _require_own(folder: Path) -> None:
    """Raises ConfigError for a run that another user began, whose files this one cannot write."""
    names = ("", ".lock", TRAIN_LOG, STARTS, "config.yaml")
    for path in (folder / name for name in names):
        is_log = path.name in (TRAIN_LOG, STARTS)
        if is_log and os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise ConfigError(
                f"{path}: is a link, or no file, and a run writes to files of its own; remove it,"
                " or give this run another run_name"
            )
        if path.exists() and not os.access(path, os.W_OK, effective_ids=True):
            whose = (
                ""
                if path.stat().st_uid == os.geteuid()
                else f": it is user {path.stat().st_uid}'s, this is {os.geteuid()}"
            )
            raise ConfigError(
                f"{path}: this run has files that cannot be written to{whose}; give this one"
                " another run_name, or set log_folder"
            )
