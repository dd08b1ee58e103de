"""Rows of datasets in a resumable order that does not depend on how many processes read them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.world import World

from flame_composer.errors import DataError, InvalidField, one_line
from flame_composer.loader.fetch import Shards
from flame_composer.loader.reader import FIELDS, MAX_OPEN, OpenShards, ShardReader, Unchecked
from flame_composer.storage.locks import JobFolder, allow_files
from flame_composer.upstream.streaming import (
    Memory,
    own_shared_memory,
    path_in,
)


class Rows(StreamingDataset):
    """A StreamingDataset of checked shards whose global batches do not depend on the process count.

    The order of an epoch is laid out in global batches (`lay_out`), and every process takes its
    part of each. docs/upstream.md lists what this class changes in StreamingDataset.
    """

    def __init__(self, datasets: Sequence[Shards], *, batch_size: int, **options: Any):
        """Open the datasets; `batch_size` is this rank's share of the global batch.

        `options` are those of StreamingDataset.
        """
        most_open = min(MAX_OPEN, allow_files() // 4)
        with own_shared_memory():
            super().__init__(streams=datasets, batch_size=batch_size, **options)
        self.batch_size = self.global_batch_size = batch_size * dist.get_world_size()
        self.files = [file for dataset in datasets for file in dataset.dataset.files]
        # All streams share it, because the limit of open files is one of the process.
        self.opened = OpenShards(most_open)
        # The identities of the files that were found whole, shared by all processes of the machine
        # so that each file is hashed only once
        self._folder = cast(JobFolder, self._locals_shm).path
        self._memory = Memory(
            path_in(str(self._folder), "whole"), size=len(self.files) * FIELDS * 8
        )
        self._whole = np.frombuffer(self._memory.buf, np.uint64, len(self.files) * FIELDS).reshape(
            -1, FIELDS
        )
        for reader, whole in zip(cast(list[ShardReader], self.shards), self._whole, strict=True):
            reader.opened, reader.whole = self.opened, whole
        for dataset, first in zip(datasets, self.shard_offset_per_stream, strict=True):
            dataset.whole = self._whole[first : first + len(dataset.dataset.files)]
        self._failures: dict[int, DataError] = {}
        self._set_shuffle_block_size(World(1, 1, 1, 0))
        self.batches_per_epoch = self.epoch_size // self.global_batch_size
        if self.batching_method != "random" and self.batches_per_epoch:
            try:
                # Each stream has its share of a batch, or batches of its own. Rows that do not
                # fill a whole batch are left out.
                self.batches_per_epoch = min(self.batches_per_epoch, len(self.lay_out(0)))
            except (ValueError, ArithmeticError) as error:
                raise InvalidField(
                    "train_data.batching_method",
                    f"{one_line(error)} (global_batch_size={self.global_batch_size})",
                ) from None
        self.length = self.batches_per_epoch * batch_size

    def lay_out(self, epoch: int, sample_in_epoch: int = 0) -> NDArray[np.int64]:
        """Return the row ids of an epoch's global batches, in order, from `sample_in_epoch` on.

        The shape is [batches, global batch size].

        Upstream: mosaicml-streaming 0.13.0, `StreamingDataset._get_work`, `generate_work`.
        Mends: upstream lays out an epoch for the present number of ranks and workers, and repeats
        rows until the order divides among them. The number of batches, the rows in the last ones
        and, with several streams, everything after them then depend on the number of processes.
        """
        order = generate_work(self.batching_method, self, World(1, 1, 1, 0), epoch, sample_in_epoch)
        order = order.reshape(-1, self.global_batch_size)
        return order[(order >= 0).all(axis=1)]

    @staticmethod
    def _place(worker: World) -> int:
        """Return the place of this rank's first row in a global batch.

        The rank's other rows are every num_ranks-th one after it. Canonical nodes take turns in the
        order, so if there are as many as machines, each machine reads only shards of its own.
        """
        return worker.rank_of_node * worker.num_nodes + worker.node

    def limit_cache(self, limit: int, *, num_workers: int, prefetch_factor: int) -> None:
        """Keep the cache within `limit` bytes by deleting the shards that were used longest ago.

        Raises InvalidField if the limit is so low that shards in use would be deleted and fetched
        again and again.
        """
        minimum = self.smallest_cache(
            self._unique_rank_world, num_workers=num_workers, prefetch_factor=prefetch_factor
        )
        if limit < minimum:
            largest = max(file.bytes for file in self.files)
            raise InvalidField(
                "train_data.cache_limit",
                f"must be at least {minimum} bytes: so much is in use at once with"
                f" shuffle_block_size={self.shuffle_block_size},"
                f" num_canonical_nodes={self.num_canonical_nodes} and shards of up to {largest}"
                " bytes; a smaller train_data.shuffle_block_size needs less",
            )
        self.cache_limit = limit
        self.opened.limit = 0  # a file deleted while it is open still takes up space on disk

    def smallest_cache(self, world: World, *, num_workers: int, prefetch_factor: int) -> int:
        """Return the bytes of cache that a machine of `world` needs to delete no shard in use."""
        indexes = sum(stream.get_index_size() for stream in self.streams)
        largest = max(file.bytes for file in self.files)
        in_use, _ = self.bytes_in_use(
            world, num_workers=num_workers, prefetch_factor=prefetch_factor
        )
        return indexes + max(in_use, 4 * largest)

    def bytes_in_use(
        self, world: World, *, num_workers: int, prefetch_factor: int
    ) -> tuple[int, int]:
        """Return the most bytes of shards in use at once, and the bytes of all shards read.

        Both are for one machine of `world` in the first epoch. A shard is in use from the time at
        which its first row is `predownload` rows ahead until its last row is read. Loader processes
        are assumed to be as far apart as they can be.
        """
        ranks = [
            World(
                world.num_nodes, world.ranks_per_node, 1, world.node * world.ranks_per_node + rank
            )
            for rank in range(world.ranks_per_node)
        ]
        order = self.lay_out(0)[: self.batches_per_epoch]
        order = np.concatenate(
            [order[:, self._place(rank) :: world.num_ranks] for rank in ranks], axis=1
        )
        shards = np.searchsorted(self.sample_offset_per_shard, order.ravel(), side="right") - 1
        batches = np.repeat(np.arange(len(order)), order.shape[1])
        used = np.unique(shards)
        first, last = np.empty(self.num_shards, np.int64), np.empty(self.num_shards, np.int64)
        # Where a shard occurs more than once, the last value assigned stays
        first[shards[::-1]], last[shards] = batches[::-1], batches
        assert self.predownload is not None
        ahead = math.ceil(self.predownload * world.num_ranks / self.global_batch_size)
        apart = max(1, num_workers) * (ahead + prefetch_factor + 1)
        change = np.zeros(len(order) + 1, np.int64)
        sizes = np.array([file.bytes for file in self.files])
        np.add.at(change, np.maximum(first[used] - apart, 0), sizes[used])
        np.add.at(change, last[used] + 1, -sizes[used])
        return int(change.cumsum().max()), int(sizes[used].sum())

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """Return this worker's row ids from `sample_in_epoch` on, in order.

        A worker takes every num_workers-th batch of its rank. As in StreamingDataset, one process
        of a machine lays out the epoch for all of them; here it passes the order on in a file in
        the job's folder.
        """
        worker = self._unique_worker_world
        shared = self._folder / "epoch"
        if worker.is_local_leader:
            batches_left = self.batches_per_epoch - math.ceil(
                sample_in_epoch / self.global_batch_size
            )
            # If the data has changed, the epoch may have fewer batches than were taken already. It
            # is over then.
            order = (
                self.lay_out(epoch, sample_in_epoch)[:batches_left]
                if batches_left > 0
                else np.empty((0, self.global_batch_size), np.int64)
            )
            try:
                order.tofile(shared)
            except OSError as error:
                raise DataError(
                    f"{shared}: cannot be written: {one_line(error)}; set TMPDIR to a folder on a"
                    " disk with space, and run the same command again"
                ) from None
            self._shared_barrier(worker.workers_per_node)
        else:
            self._shared_barrier(worker.workers_per_node)
            is_over = shared.stat().st_size == 0  # an empty file cannot be mapped
            order = np.empty(0, np.int64) if is_over else np.memmap(shared, np.int64, "r")
            order = order.reshape(-1, self.global_batch_size)
        ids = order[
            worker.worker_of_rank :: worker.workers_per_rank,
            self._place(worker) :: worker.num_ranks,
        ].flatten()
        self._shared_barrier(worker.workers_per_node)
        if worker.is_local_leader:
            shared.unlink()
        return ids

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        with own_shared_memory():
            return super()._resume(world, epoch)

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue at the place in `obj`, but in this run's order.

        Upstream: mosaicml-streaming 0.13.0, `StreamingDataset.load_state_dict`, `_resume`.
        Mends: upstream would replace the configured seed and number of canonical nodes by those of
        the checkpoint.
        """
        place = {
            "epoch": obj["epoch"],
            "sample_in_epoch": obj["sample_in_epoch"],
            "initial_physical_nodes": obj.get("initial_physical_nodes"),
            "num_canonical_nodes": self.num_canonical_nodes,
            "shuffle_seed": self.shuffle_seed,
        }
        with own_shared_memory():
            super().load_state_dict(place)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard if it is not there.

        Raises DataError if it cannot be fetched and `blocking`; otherwise, `get_item` raises it
        later.

        Upstream: mosaicml-streaming 0.13.0, `StreamingDataset.prepare_shard`.
        Mends: an error in upstream's method silently ends a background thread. The epoch then ends
        early, or workers wait for one another forever.
        """
        if shard_id in self._failures:
            if blocking:
                raise self._failures[shard_id]
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:  # DataError, or what upstream does not expect
            if self._cache_filelock.is_locked:
                self._cache_filelock.release(force=True)
            self._failures[shard_id] = (
                error if isinstance(error, DataError) else DataError(one_line(error))
            )
            # Mark it as prepared, so that nobody waits for it: others meet the error themselves.
            self._shard_states[shard_id] = _ShardState.LOCAL
            if blocking:
                raise self._failures[shard_id] from None

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return a row; with several streams, its `stream` is the number of the stream it is from.

        Raises DataError if it cannot be read.
        """
        shard_id, _ = self.spanner[sample_id]
        try:
            row = self._checked_item(sample_id, shard_id, retry)
        except (DataError, RuntimeError) as error:
            if hasattr(self, "_event"):
                # End the background threads, or the process would wait for them before it ends
                self._event.set()
            raise error if isinstance(error, DataError) else DataError(one_line(error)) from None
        if self.num_streams > 1:
            row["stream"] = self.stream_per_shard[shard_id]
        return row

    def _checked_item(self, sample_id: int, shard_id: int, retry: int) -> Any:
        """Return a row from a file that was found whole and has not changed since.

        If that is not known of the row's shard, the shard is checked first.
        """
        for _ in range(1 + retry):
            try:
                return super().get_item(sample_id, retry)
            except OSError as error:
                raise DataError(
                    f"{error.filename or self.files[shard_id].basename}: cannot be read:"
                    f" {error.strerror}; run the same command again when it can be"
                ) from None
            except Unchecked:
                cast(Shards, self.streams[self.stream_per_shard[shard_id]]).check(
                    self.files[shard_id]
                )
        path = f"{self.shards[shard_id].dirname}/{self.files[shard_id].basename}"
        raise DataError(
            f"{path}: another process writes to it while it is read; end that process, and run the"
            " same command again"
        )

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        """Yield the row ids of `it` in order, each once its shard is there.

        With a limited cache, rows wait for both of the threads that look ahead. A thread that fell
        behind would fetch shards again that were deleted after their last row.

        Upstream: mosaicml-streaming 0.13.0, `StreamingDataset._each_sample_id`.
        Mends: upstream waits 7 ms for a thread that looks ahead `predownload` rows at a time, even
        if every shard is there.
        """
        while not it.should_exit() and it.yield_index < it.total and not self._event.is_set():
            sample_id = it.sample_ids[it.yield_index]
            is_there = (
                not self.cache_limit
                and self._shard_states[self.spanner[sample_id][0]] == _ShardState.LOCAL
            )
            behind = min(it.ready_index, it.prepare_index) if self.cache_limit else it.ready_index
            if behind <= it.yield_index and not is_there:
                time.sleep(TICK)
                continue
            yield sample_id
            it.yield_index += 1
        it.on_exit()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not hasattr(self, "_event"):
            self._event = threading.Event()
            for stream in self.streams:
                cast(Shards, stream).stop = self._event
        self.opened.close()  # so that every epoch looks again at which files are there
        yield from super().__iter__()
        if self._event.is_set():
            raise DataError(
                "reading ahead failed, and the epoch would end early; the lines before this one"
                " say why"
            )
