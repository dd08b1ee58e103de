"""A run's training rows, in an order that can be resumed anywhere by any number of processes."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

from composer.utils import dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flame_composer.loader.ahead import Ahead, Wanted
from flame_composer.loader.fetch import Shards
from flame_composer.loader.footprint import PREDOWNLOAD, batches_of_a_window
from flame_composer.loader.layout import Order
from flame_composer.loader.machine import this_machine
from flame_composer.loader.room import Room


class Rows(IterableDataset):
    """The rows of this rank's share of every global batch, of one epoch at a time.

    Of the loader processes of a rank, each has every num_workers-th batch.
    """

    def __init__(
        self,
        order: Order,
        shards: Shards,
        *,
        predownload: int | None,
        state: dict[str, Any],
        together: int = 1,
    ):
        """Fetch shards `predownload` rows ahead; `state` is kept in checkpoints with the place.

        `together` consecutive ranks have the same rows.
        """
        self.order, self.shards, self.state = order, shards, state
        self._machine, self._local_rank = this_machine(together), dist.get_local_rank()
        self.batch_size = order.size // self._machine.places
        self.batches_per_epoch = order.num_batches
        self.batches_ahead = math.ceil(
            (predownload or PREDOWNLOAD * self.batch_size) / self.batch_size
        )
        self.next_epoch, self.next_batch, self.has_begun = 0, 0, False

    def __len__(self) -> int:
        """Return the number of this rank's rows of an epoch."""
        return self.batches_per_epoch * self.batch_size

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the place after `num_samples` rows of all ranks in the epoch begun last.

        Composer calls it.
        """
        assert from_beginning
        epoch = self.next_epoch - self.has_begun
        return {"epoch": epoch, "sample_in_epoch": num_samples, **self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a place that `state_dict` returned, in this run's order.

        If the data has changed, the epoch may have fewer batches than were taken already. It is
        over then.
        """
        self.next_epoch, self.has_begun = state["epoch"], False
        self.next_batch = math.ceil(state["sample_in_epoch"] / self.order.size)

    def begin(self) -> tuple[int, int]:
        """Begin an epoch, and return its number and its first batch."""
        found = self.next_epoch, self.next_batch
        self.next_epoch, self.next_batch, self.has_begun = self.next_epoch + 1, 0, True
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Begin an epoch, and yield its rows; with several streams they say which they are of."""
        return self._read(*self.begin())

    def _read(self, epoch: int, first: int) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        room, slot = self.shards.room, self._local_rank * workers + number
        batches = self._wanted(epoch, first, number, workers)
        if room is not None:
            batches = self._noted(batches, room)
        self.shards.opened.close()  # so that every epoch looks again at which files are there
        ahead = Ahead(batches, self.shards, batches_ahead=self.batches_ahead)
        try:
            for batch in ahead:
                if room is not None:
                    room.at[slot] = batch.number
                shards = self.shards.shards_of(batch.ids).tolist()
                for row, shard in zip(batch.ids.tolist(), shards, strict=True):
                    yield ahead.row(row, shard)
            if room is not None:
                room.at[slot] = (epoch + 1) * self.batches_per_epoch + 1
        finally:
            ahead.close()

    def _wanted(self, epoch: int, first: int, worker: int, workers: int) -> Iterator[Wanted]:
        """Yield a loader process's batches of an epoch, from its batch `first` on."""
        place, places = self._machine.place_of(self._local_rank), self._machine.places
        batches = self.order.batches(epoch, first, place=place, places=places)
        numbered = enumerate(batches, epoch * self.batches_per_epoch + first + 1)
        return itertools.starmap(Wanted, itertools.islice(numbered, worker, None, workers))

    def _noted(self, wanted: Iterator[Wanted], room: Room) -> Iterator[Wanted]:
        """Yield the batches, each once it is noted what those need that come after it."""
        far = batches_of_a_window(self.order)
        waiting: deque[Wanted] = deque()
        for batch in wanted:
            room.note(self.shards.shards_of(batch.ids), batch.number)
            waiting.append(batch)
            while waiting[0].number + far <= batch.number:
                yield waiting.popleft()
        yield from waiting


class Loader(DataLoader):
    """A DataLoader of `Rows` that counts epochs where its processes do the reading."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        if self.num_workers:  # they have counted this epoch each for itself
            cast(Rows, self.dataset).begin()
        return batches
