"""Reading ahead: shards are fetched before their rows are asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.loader.fetch import Shards

FETCHES = 4  # shards that a process fetches, or checks, at once


class Wanted(NamedTuple):
    """A batch that a process is to read: its number over all epochs, and its rows' ids [N]."""

    number: int
    ids: NDArray[np.int64]


class Ahead:
    """The batches of an epoch, whose shards are asked for some batches ahead.

    A shard that cannot be had ends the run when a row of it is read, not before. The threads end
    with the process, or after `close`.
    """

    def __init__(self, batches: Iterator[Wanted], shards: Shards, *, batches_ahead: int):
        self.shards = shards
        self.stop = threading.Event()
        self._batches = batches
        self._made: queue.Queue[Wanted | BaseException | None] = queue.Queue(batches_ahead)
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._coming: dict[int, Future[None]] = {}  # those that failed stay here
        for work in (self._look_ahead, *[self._fetch] * FETCHES):
            threading.Thread(target=work, daemon=True).start()

    def __iter__(self) -> Iterator[Wanted]:
        """Yield the batches, in order."""
        while (made := self._made.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            yield made

    def row(self, number: int, shard: int) -> dict[str, Any]:
        """Return a row, once its shard is there. Raises DataError if it cannot be read."""
        if (coming := self._coming.get(shard)) is not None:
            coming.result()
        return self.shards.row(number, shard)

    def close(self) -> None:
        """End the threads, without waiting for them."""
        self.stop.set()
        for _ in range(FETCHES):
            self._asked.put(None)

    def _look_ahead(self) -> None:
        try:
            for batch in self._batches:
                shards = self.shards.shards_of(batch.ids)
                for shard in dict.fromkeys(shards.tolist()):
                    if shard not in self._coming and not self.shards.is_ready(shard):
                        self._coming[shard] = Future()
                        self._asked.put(shard)
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # raised again where rows are read
            self._put(error)

    def _put(self, made: Wanted | BaseException | None) -> bool:
        while not self.stop.is_set():
            try:
                self._made.put(made, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def _fetch(self) -> None:
        while not self.stop.is_set() and (shard := self._asked.get()) is not None:
            coming = self._coming[shard]
            try:
                self.shards.prepare(shard, self.stop)
            except BaseException as error:  # raised again where a row of it is read
                coming.set_exception(error)
            else:
                coming.set_result(None)
                del self._coming[shard]
