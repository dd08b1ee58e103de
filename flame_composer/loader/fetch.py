"""Fetching a remote dataset into a cache folder: its index, then its shards, none of it trusted
before it is checked.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format.base.reader import FileInfo
from streaming.base.world import World

from flame_composer.dataset.mds import (
    HASH,
    BadShard,
    ShardFile,
    ShardView,
    check_hash,
    check_size,
    column_form,
)
from flame_composer.dataset.open import Dataset, download
from flame_composer.errors import DataError, one_line
from flame_composer.loader.cache import UNITS, incoming_folder, make_own
from flame_composer.loader.reader import FIELDS, ShardReader, identify

CHECKS = 3  # of a shard that somebody writes to while it is read

log = logging.getLogger(__name__)


class Shards(Stream):
    """A dataset's shards as StreamingDataset reads them. One that is not in the folder is fetched,
    checked, then put there.

    Upstream a shard is checked where it lies, so that a damaged one is taken for whole the next
    time, and `remote` makes StreamingDataset refuse the folders of other jobs, dead ones included:
    it is not told of one.
    """

    def __init__(self, dataset: Dataset, *, retries: int = 3, timeout: float = 60.0, **weight: Any):
        """`timeout` in seconds for each try; `weight` is at most one of proportion, repeat and
        choose.
        """
        super().__init__(local=dataset.folder, validate_hash=None, keep_zip=False, **weight)
        self.dataset = dataset
        self.files = {file.basename: file for file in dataset.files}
        self.numbers = {file.basename: number for number, file in enumerate(dataset.files)}
        # Which file was found whole under each shard's name, as `identify` has it; `Rows` shares it
        # among processes.
        self.whole: NDArray[np.uint64] = np.zeros((len(dataset.files), FIELDS), np.uint64)
        self.retries = retries
        self.timeout = timeout
        self.stop = threading.Event()

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:  # noqa: ARG002
        """Return the shards' readers. They are made of what `read_index` has checked, not of
        index.json read once more.
        """
        form = column_form(self.dataset.manifest.token_dtype, self.dataset.manifest.context_length)
        return [
            ShardReader(
                self.local,
                self.split,
                form["column_encodings"],
                form["column_names"],
                form["column_sizes"],
                None,
                [HASH],
                FileInfo(file.basename, file.bytes, {HASH: file.hash}),
                file.rows,
                None,
                None,
            )
            for file in self.dataset.files
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stop": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "stop": threading.Event()}

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Called for a shard that is not there; returns its path. Raises DataError."""
        assert to_basename is None, "only the index has two names, and it is there"
        self.fetch(self.files[from_basename])
        return str(Path(self.local, from_basename))

    def fetch(self, file: ShardFile) -> None:
        """Put a whole shard, fetched anew, in its place. Raises DataError that says what was
        wrong the last time.
        """
        path = Path(self.local, file.basename)
        if self.dataset.remote is None:
            raise DataError(f"{path}: shard is missing; restore it from a copy, or convert again")
        source = f"{self.dataset.remote.rstrip('/')}/{file.basename}"
        for attempt in range(self.retries + 1):
            if attempt and self.stop.wait(min(2 ** (attempt - 1), 30)):
                break
            arrived = None
            try:
                arrived = incoming_folder(self.local) / uuid.uuid4().hex
                self._wait_for(functools.partial(download, source, arrived, at_most=file.bytes))
                make_own(self.local, UNITS, str(path.parent.relative_to(self.local)))
                self._note(file, arrived, moved_to=path)
                return
            except BadShard as problem:
                what, remedy = (
                    f"damaged shard: {problem}",
                    "put a good copy there, or convert again",
                )
            except Exception as error:  # every store's client has exceptions of its own
                what, remedy = (
                    f"shard cannot be fetched: {one_line(error)}",
                    "the same command goes on when it can be",
                )
            finally:
                if arrived is not None:
                    arrived.unlink(missing_ok=True)
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise DataError(f"{source}: {what} (tried {times}); {remedy}")

    def _wait_for(self, download: Callable[[], None]) -> None:
        """Give up `download`, whatever its client thinks, when the time is over or the run ends."""
        result: concurrent.futures.Future[None] = concurrent.futures.Future()

        def work() -> None:
            try:
                download()
                result.set_result(None)
            except Exception as error:  # raised again in the thread that waits
                result.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        give_up = time.monotonic() + self.timeout
        while not self.stop.is_set() and (left := give_up - time.monotonic()) > 0:
            concurrent.futures.wait([result], timeout=min(left, 1.0))
            if result.done():
                return result.result()
        raise TimeoutError(
            f"not there after {self.timeout:g} seconds (train_data.download_timeout)"
        )

    def check(self, file: ShardFile) -> None:
        """Make sure that a shard in the folder is whole; a bad one is fetched again if it can
        be. Raises DataError.
        """
        path = Path(self.local, file.basename)
        try:
            self._note(file, path)
        except BadShard as problem:
            if self.dataset.remote is None:
                raise DataError(
                    f"{path}: damaged shard: {problem}; restore it from a copy, or convert again"
                ) from None
            # Else it has just made room for another, and is fetched when a row of it is read
            if path.exists():
                self.fetch(file)

    def _check_rows(self, path: Path, file: ShardFile) -> None:
        """Raise BadShard for rows that are not of the form. The hash does not rule it out: the
        index may be anybody's.
        """
        manifest = self.dataset.manifest
        ShardView(
            path,
            num_rows=file.rows,
            context_length=manifest.context_length,
            token_dtype=manifest.token_dtype,
        ).count()

    def _note(self, file: ShardFile, path: Path, moved_to: Path | None = None) -> None:
        """Check a file and remember which one it was, after moving it to its place if that is
        another. Raises BadShard.
        """
        for _ in range(CHECKS):
            check_size(path, file)
            try:
                # A fifo would be waited for
                number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                opened = os.fdopen(number, "rb", buffering=0)
            except OSError as error:
                raise BadShard(f"cannot be read: {error.strerror}") from None
            with opened:
                before = os.fstat(opened.fileno())
                check_hash(path, file)
                self._check_rows(path, file)
                after = os.fstat(opened.fileno())
                if identify(after) != identify(before):
                    continue  # written to meanwhile
                if moved_to is not None:
                    # What is downloaded is for this user alone, and a cache may be for several
                    path.chmod(0o644)
                    path.replace(moved_to)
                    after = os.fstat(opened.fileno())  # a new name changes one of the times
                self.whole[self.numbers[file.basename]] = identify(after)
                return
        raise BadShard("is written to while it is read")
