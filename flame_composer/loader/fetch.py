"""The shards of a run's datasets: fetched if missing, checked before use, and read row by row."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import itertools
import os
import threading
import time
import uuid
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray

from flame_composer.dataset.mds import (
    BadShard,
    ShardFile,
    ShardView,
    check_hash,
    check_size,
    decode_row,
)
from flame_composer.dataset.open import Dataset, download
from flame_composer.errors import DataError, one_line
from flame_composer.loader.cache import UNITS, incoming_folder, make_own
from flame_composer.loader.machine import enter_job_folder, shared_array
from flame_composer.loader.reader import FIELDS, MAX_OPEN, OpenShards, Unchecked, identify
from flame_composer.loader.room import Room
from flame_composer.storage.locks import allow_files

CHECKS = 3  # number of attempts to check a shard that is being written to
READS = 8  # number of attempts to read a row of a file that is being written to
POLL = 0.02  # seconds between two looks at whether another process is done
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of what a user may have there
GOES_ON = threading.Event()  # is never set, for a caller that waits to the end


class Shards:
    """The shards of a run's datasets, numbered one dataset after the other, as are their rows.

    All processes of the run on this machine share what is known of the files: each is fetched and
    checked once. Every rank must make its own at the same time.
    """

    def __init__(self, datasets: Sequence[Dataset], *, retries: int = 3, timeout: float = 60.0):
        """Fetch a shard in up to `retries` + 1 tries of `timeout` seconds each."""
        self.datasets = list(datasets)
        self.bytes = np.concatenate([each.files.bytes for each in datasets])
        rows = np.concatenate([each.files.rows for each in datasets])
        self.first_rows = np.concatenate([[0], rows.cumsum()])
        # The numbers of shards up to the end of each dataset, beginning with none
        self._ends = [0, *itertools.accumulate(len(dataset.files) for dataset in datasets)]
        # What `decode_row` has to know of each dataset's rows
        self._forms = [
            (
                np.dtype(each.manifest.token_dtype).newbyteorder("<"),
                each.manifest.context_length,
                each.manifest.has_loss_mask,
            )
            for each in datasets
        ]
        self.retries, self.timeout = retries, timeout
        self.opened = OpenShards(min(MAX_OPEN, allow_files() // 4))
        self.room: Room | None = None
        self.folder = enter_job_folder()
        self._open()

    def _open(self) -> None:
        # The identity (see `identify`) of each file that was found whole; zeros for the others
        shape = (len(self.bytes), FIELDS)
        self.whole: NDArray[np.uint64] = shared_array(self.folder.path / "whole", np.uint64, shape)
        # A byte for each shard, and one for all; a process that dies lets go of its locks
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._locks = os.open(self.folder.path / "shards", flags, 0o600)
        weakref.finalize(self, os.close, self._locks)
        self._busy: set[int] = set()  # the shards that threads of this process are at
        self._entry = threading.Lock()
        self._recent = functools.lru_cache(2 * MAX_OPEN)(self.file_of)

    def __getstate__(self) -> dict[str, Any]:
        ours = ("whole", "_locks", "_busy", "_entry", "_recent")
        return {name: value for name, value in self.__dict__.items() if name not in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def num_rows(self) -> int:
        """The number of rows of all datasets."""
        return int(self.first_rows[-1])

    def shards_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the shard that holds each of the rows [N]."""
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def path_of(self, shard: int) -> Path:
        """Return where a shard's file is, or is to be."""
        return Path(self._dataset_of(shard).folder, self.file_of(shard).basename)

    def stream_of(self, shard: int) -> int:
        """Return the number of the dataset that a shard belongs to."""
        return bisect_right(self._ends, shard) - 1

    def file_of(self, shard: int) -> ShardFile:
        """Return what the index says about a shard."""
        stream = self.stream_of(shard)
        return self.datasets[stream].files[shard - self._ends[stream]]

    def _dataset_of(self, shard: int) -> Dataset:
        return self.datasets[self.stream_of(shard)]

    def is_ready(self, shard: int) -> bool:
        """Return whether a shard's file was found whole, or fetched, by any process."""
        return bool(self.whole[shard].any())

    def row(self, number: int, shard: int | None = None) -> dict[str, Any]:
        """Return a row, which is in `shard`, from a file found whole that has not changed since.

        With several datasets, its `stream` is the number of its dataset. Raises DataError if it
        cannot be read.
        """
        if shard is None:
            shard = int(np.searchsorted(self.first_rows, number, side="right")) - 1
        stream = self.stream_of(shard)
        file, form = self._recent(shard), self._forms[stream]
        path = f"{self.datasets[stream].folder}/{file.basename}"
        index = number - int(self.first_rows[shard])
        is_gone = False
        for attempt in range(READS):
            try:
                content = self.opened.read(path, file.rows, index, self.whole[shard])
            except (Unchecked, FileNotFoundError) as problem:
                is_gone = isinstance(problem, FileNotFoundError)
                if attempt and not is_gone:
                    self.whole[shard] = 0  # it is not the file that was found whole, or not now
                self.prepare(shard)
                continue
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be read: {error.strerror}; run the same command again when it"
                    " can be"
                ) from None
            try:
                row = decode_row(content, form[0], form[1], has_loss_mask=form[2])
            except (ValueError, IndexError):
                # The file was checked, so it has been written to without a change of its times,
                # which is possible through a memory map
                self.opened.forget(path)
                self.whole[shard] = 0
                continue
            return row if len(self.datasets) == 1 else {**row, "stream": stream}
        if is_gone:
            what = "it is deleted whenever it has been fetched"
            remedy = "set a larger train_data.cache_limit, or see what deletes it"
        else:
            what, remedy = "another process writes to it while it is read", "end that process"
        raise DataError(f"{path}: {what}; {remedy}, and run the same command again")

    def limit_cache(self, limit: int, *, places: int) -> None:
        """Keep the fetched shards within `limit` bytes, by deleting those no longer needed.

        `places` is the number of processes on this machine that read rows; see `Room`. Every rank
        must call this.
        """
        self.opened.limit = 0  # a file deleted while it is open still takes up space on disk
        is_fetched = np.repeat(
            [each.remote is not None for each in self.datasets],
            [len(each.files) for each in self.datasets],
        )
        self.room = Room(self.folder.path, np.where(is_fetched, self.bytes, 0), limit, places)
        if dist.get_local_rank() == 0:
            for shard in np.flatnonzero(is_fetched).tolist():
                if self.path_of(shard).exists():
                    self.room.there[shard] = 1
        dist.barrier()

    def prepare(self, shard: int, stop: threading.Event = GOES_ON) -> None:
        """Make sure that a shard's file is there and whole, fetching it if need be.

        Raises DataError if it is not and cannot be fetched, or once `stop` is set.
        """
        path = self.path_of(shard)
        with self._alone(shard, stop):
            try:
                is_known = identify(path.stat()) == tuple(self.whole[shard].tolist())
            except FileNotFoundError:
                self._fetch_into_room(shard, stop)
            except OSError:
                self._check(shard, stop)
            else:
                if not is_known:  # otherwise another process was faster
                    self._check(shard, stop)

    @contextlib.contextmanager
    def _alone(self, number: int, stop: threading.Event) -> Iterator[None]:
        """Keep other threads and processes from being at a shard as well, in the body."""
        while not self._enter(number):
            if stop.wait(POLL):
                raise DataError("the run ends")
        try:
            yield
        finally:
            self._leave(number)

    def _enter(self, number: int) -> bool:
        """Be the only one at a shard, and return True; False if another thread or process is."""
        with self._entry:
            if number in self._busy:  # to a process, its own locks are no hindrance
                return False
            self._busy.add(number)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except BaseException as problem:
            self._busy.discard(number)
            if isinstance(problem, BlockingIOError):
                return False
            raise
        return True

    def _leave(self, number: int) -> None:
        """Let others be at a shard."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, number)
        finally:
            self._busy.discard(number)

    def _fetch_into_room(self, shard: int, stop: threading.Event) -> None:
        """Fetch a missing shard, first deleting others if the cache is limited."""
        if self.room is None or self._dataset_of(shard).remote is None:
            self.fetch(shard, stop)
            return
        since = time.monotonic()
        while True:
            with self._alone(len(self.bytes), stop):  # every shard's number is less
                room = self.room.take(shard, self._delete, seconds=time.monotonic() - since)
            if room:
                break
            if stop.wait(POLL):
                raise DataError("the run ends")
        try:
            self.fetch(shard, stop)
        except BaseException:
            self.room.there[shard] = 0
            raise

    def _delete(self, shard: int) -> bool:
        """Delete a shard's file, unless a process is at it; return whether that was done."""
        if not self._enter(shard):
            return False
        try:
            self.whole[shard] = 0
            self.path_of(shard).unlink(missing_ok=True)
        finally:
            self._leave(shard)
        return True

    def fetch(self, shard: int, stop: threading.Event = GOES_ON) -> None:
        """Fetch a shard anew, check it, and only then put it in its place.

        Raises DataError if every try fails, saying what was wrong with the last one.
        """
        dataset, file, path = self._dataset_of(shard), self.file_of(shard), self.path_of(shard)
        if dataset.remote is None:
            raise DataError(f"{path}: shard is missing; restore it from a copy, or convert again")
        source = f"{dataset.remote.rstrip('/')}/{file.basename}"
        for attempt in range(self.retries + 1):
            if attempt and stop.wait(min(2 ** (attempt - 1), 30)):
                break
            arrived = None
            try:
                arrived = incoming_folder(dataset.folder) / uuid.uuid4().hex
                job = functools.partial(download, source, arrived, at_most=file.bytes)
                self._wait_for(job, stop)
                make_own(dataset.folder, UNITS, str(path.parent.relative_to(dataset.folder)))
                self._note(shard, arrived, moved_to=path)
                return
            except BadShard as problem:
                what, remedy = (
                    f"damaged shard: {problem}",
                    "put a good copy there, or convert again",
                )
            except Exception as error:  # every store's client has exceptions of its own
                what = f"shard cannot be fetched: {one_line(error)}"
                is_full = isinstance(error, OSError) and error.errno in FULL
                remedy = (
                    f"free space on the disk of {dataset.folder}, or set train_data.cache_limit"
                    if is_full
                    else "run the same command again when it can be"
                )
            finally:
                if arrived is not None:
                    arrived.unlink(missing_ok=True)
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise DataError(f"{source}: {what} (tried {times}); {remedy}")

    def _wait_for(self, download: Callable[[], None], stop: threading.Event) -> None:
        """Run `download`, or raise TimeoutError after `timeout` seconds or at `stop`.

        The thread that downloads is then abandoned, whatever the store's client is doing in it.
        """
        result: concurrent.futures.Future[None] = concurrent.futures.Future()

        def work() -> None:
            try:
                download()
                result.set_result(None)
            except Exception as error:  # raised again in the thread that waits
                result.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        give_up = time.monotonic() + self.timeout
        while not stop.is_set() and (left := give_up - time.monotonic()) > 0:
            concurrent.futures.wait([result], timeout=min(left, 1.0))
            if result.done():
                return result.result()
        raise TimeoutError(
            f"not there after {self.timeout:g} seconds (train_data.download_timeout)"
        )

    def _check(self, shard: int, stop: threading.Event) -> None:
        """Make sure that a shard in the folder is whole, fetching a bad one again.

        Raises DataError if it is bad and cannot be fetched.
        """
        path = self.path_of(shard)
        try:
            self._note(shard, path)
        except BadShard as problem:
            if self._dataset_of(shard).remote is None:
                raise DataError(
                    f"{path}: damaged shard: {problem}; restore it from a copy, or convert again"
                ) from None
            # If it is not there, it was just deleted to make room for another shard, and will be
            # fetched when a row of it is read
            if path.exists():
                self.fetch(shard, stop)

    def _check_rows(self, path: Path, shard: int) -> None:
        """Raise BadShard if the rows do not have the layout of this dataset's rows.

        A right hash does not rule that out, since the index may be anybody's.
        """
        manifest = self._dataset_of(shard).manifest
        ShardView(
            path,
            num_rows=self.file_of(shard).rows,
            context_length=manifest.context_length,
            token_dtype=manifest.token_dtype,
            has_loss_mask=manifest.has_loss_mask,
        ).count()

    def _note(self, shard: int, path: Path, moved_to: Path | None = None) -> None:
        """Check a shard's file, move it to `moved_to` if given, and remember which file it was.

        Raises BadShard if it is damaged, or written to during each of `CHECKS` checks.
        """
        file = self.file_of(shard)
        for _ in range(CHECKS):
            check_size(path, file)
            try:
                # O_NONBLOCK: the opening of a named pipe would wait for its writer
                number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                opened = os.fdopen(number, "rb", buffering=0)
            except OSError as error:
                raise BadShard(f"cannot be read: {error.strerror}") from None
            with opened:
                before = os.fstat(opened.fileno())
                check_hash(path, file)
                self._check_rows(path, shard)
                after = os.fstat(opened.fileno())
                if identify(after) != identify(before):
                    continue  # written to meanwhile
                if moved_to is not None:
                    # Downloads are readable by this user alone, but a cache may be for several
                    path.chmod(0o644)
                    path.replace(moved_to)
                    after = os.fstat(opened.fileno())  # the move changes one of the file's times
                self.whole[shard] = identify(after)
                return
        raise BadShard("is written to while it is read")
