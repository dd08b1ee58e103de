"""The shards of a dataset: fetched into its cache folder if missing, and checked before use."""

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

CHECKS = 3  # number of attempts to check a shard that is being written to

log = logging.getLogger(__name__)


class Shards(Stream):
    """A dataset's shards in the form that StreamingDataset reads.

    A shard that is not in the folder is fetched, checked, and only then put there.

    Upstream: mosaicml-streaming 0.13.0, `Stream.get_shards`, `_download_file`.
    Mends: upstream checks a shard in its final place, so that the next job takes a damaged one for
    whole. And if it is given a `remote` (here it is not), it refuses the folders of other jobs,
    even of dead ones.
    """

    def __init__(self, dataset: Dataset, *, retries: int = 3, timeout: float = 60.0, **weight: Any):
        """Fetch a shard in up to `retries` + 1 tries of `timeout` seconds each.

        `weight` is at most one of proportion, repeat and choose.
        """
        super().__init__(local=dataset.folder, validate_hash=None, keep_zip=False, **weight)
        self.dataset = dataset
        self.files = {file.basename: file for file in dataset.files}
        self.numbers = {file.basename: number for number, file in enumerate(dataset.files)}
        # By shard, the identity (see `identify`) of the file that was found whole. `Rows` replaces
        # this array by one in memory that processes share.
        self.whole: NDArray[np.uint64] = np.zeros((len(dataset.files), FIELDS), np.uint64)
        self.retries = retries
        self.timeout = timeout
        self.stop = threading.Event()

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:  # noqa: ARG002
        """Return the shards' readers, made from the index that `read_index` has checked.

        Upstream would read index.json once more.
        """
        manifest = self.dataset.manifest
        form = column_form(
            manifest.token_dtype, manifest.context_length, has_loss_mask=manifest.has_loss_mask
        )
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
        """Fetch a shard that is not there, as upstream asks for it, and return its path.

        Raises DataError if it cannot be fetched.
        """
        assert to_basename is None, "only the index has two names, and it is there"
        self.fetch(self.files[from_basename])
        return str(Path(self.local, from_basename))

    def fetch(self, file: ShardFile) -> None:
        """Fetch a shard anew, check it, and put it in its place.

        Raises DataError if every try fails, saying what was wrong with the last one.
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
                    "run the same command again when it can be",
                )
            finally:
                if arrived is not None:
                    arrived.unlink(missing_ok=True)
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise DataError(f"{source}: {what} (tried {times}); {remedy}")

    def _wait_for(self, download: Callable[[], None]) -> None:
        """Run `download`, or raise TimeoutError after `timeout` seconds or when the run ends.

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
        while not self.stop.is_set() and (left := give_up - time.monotonic()) > 0:
            concurrent.futures.wait([result], timeout=min(left, 1.0))
            if result.done():
                return result.result()
        raise TimeoutError(
            f"not there after {self.timeout:g} seconds (train_data.download_timeout)"
        )

    def check(self, file: ShardFile) -> None:
        """Make sure that a shard in the folder is whole, fetching a bad one again.

        Raises DataError if it is bad and cannot be fetched.
        """
        path = Path(self.local, file.basename)
        try:
            self._note(file, path)
        except BadShard as problem:
            if self.dataset.remote is None:
                raise DataError(
                    f"{path}: damaged shard: {problem}; restore it from a copy, or convert again"
                ) from None
            # If it is not there, it was just deleted to make room for another shard, and will be
            # fetched when a row of it is read
            if path.exists():
                self.fetch(file)

    def _check_rows(self, path: Path, file: ShardFile) -> None:
        """Raise BadShard if the rows do not have the layout of this dataset's rows.

        A right hash does not rule that out, since the index may be anybody's.
        """
        manifest = self.dataset.manifest
        ShardView(
            path,
            num_rows=file.rows,
            context_length=manifest.context_length,
            token_dtype=manifest.token_dtype,
            has_loss_mask=manifest.has_loss_mask,
        ).count()

    def _note(self, file: ShardFile, path: Path, moved_to: Path | None = None) -> None:
        """Check a shard's file, move it to `moved_to` if given, and remember which file it was.

        Raises BadShard if it is damaged, or written to during each of `CHECKS` checks.
        """
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
                self._check_rows(path, file)
                after = os.fstat(opened.fileno())
                if identify(after) != identify(before):
                    continue  # written to meanwhile
                if moved_to is not None:
                    # Downloads are readable by this user alone, but a cache may be for several
                    path.chmod(0o644)
                    path.replace(moved_to)
                    after = os.fstat(opened.fileno())  # the move changes one of the file's times
                self.whole[self.numbers[file.basename]] = identify(after)
                return
        raise BadShard("is written to while it is read")
