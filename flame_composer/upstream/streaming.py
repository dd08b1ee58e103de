"""mosaicml-streaming 0.13.0: StreamingDataset's order of rows, for the runs that began with it.

Up to 2026-11-30 every run had one of these orders, and a run goes on with the one it began with.
"""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.world import World

from flame_composer.errors import DataError, one_line

Ints = NDArray[np.int64]


def weigh(
    num_rows: Sequence[int], weights: Sequence[Mapping[str, float]], seed: int
) -> tuple[list[int], list[float]]:
    """Return how many rows an epoch has of each of the streams, and their shares of it.

    Each of `weights` has at most one of the keys proportion, repeat and choose, all the same one.

    Source: mosaicml-streaming 0.13.0, `Stream.apply_weights`, whose arithmetic decides how long an
    epoch is.
    """
    streams: list[Any] = [SimpleNamespace(**weight) for weight in weights]
    Stream.apply_weights(streams, np.array(num_rows, np.int64), None, seed)
    return [int(each.choose) for each in streams], [float(each.proportion) for each in streams]


class StreamingOrder:
    """The global batches of every epoch in the order that StreamingDataset has for them.

    An epoch is laid out whole, which takes some 50 bytes of memory a row.

    Upstream: mosaicml-streaming 0.13.0, `StreamingDataset._get_work`, `generate_work`.
    Mends: upstream lays out an epoch for the present number of ranks and workers, and repeats rows
    until the order divides among them. The number of batches, the rows in the last ones and, with
    several streams, everything after them then depend on the number of processes. Here it is laid
    out in global batches, of which every process takes its part.
    """

    def __init__(
        self,
        rows_per_shard: Sequence[Ints],
        weights: Sequence[Mapping[str, float]],
        *,
        global_batch_size: int,
        batching_method: str = "random",
        algo: str,
        seed: int,
        block_size: int | None = None,
        nodes: int = 1,
        shuffle: bool = True,
    ):
        """Order the rows of streams with these shards and `weights` (see `weigh`).

        Raises ValueError if a stream has too few rows for the batches (stratified, per_stream).
        """
        counts = np.array([len(rows) for rows in rows_per_shard])
        samples = np.concatenate(rows_per_shard)
        num_rows = [int(rows.sum()) for rows in rows_per_shard]
        self.choose, shares = weigh(num_rows, weights, seed)
        self.size, self.nodes = global_batch_size, nodes
        self.first_rows = np.concatenate(([0], samples.cumsum()))  # of the shards
        # If set, one of the processes that share this folder lays out an epoch for all of them.
        self.folder: Path | None = None
        # As StreamingDataset has it
        self.block_size = block_size or max(4_000_000 // nodes, 1 << 18)
        self._dataset = SimpleNamespace(
            batch_size=global_batch_size,
            epoch_size=sum(self.choose),
            epoch_seed_change=shuffle,
            initial_physical_nodes=None,
            num_canonical_nodes=nodes,
            num_streams=len(counts),
            partition_algo="relaxed",
            sample_offset_per_shard=samples.cumsum() - samples,
            samples_per_shard=samples,
            sampling_granularity=1,
            sampling_method="balanced",
            shard_offset_per_stream=counts.cumsum() - counts,
            shards_per_stream=counts,
            shuffle=shuffle,
            shuffle_algo=algo,
            shuffle_block_size=self.block_size,
            shuffle_seed=seed,
            streams=[
                SimpleNamespace(choose=choose, proportion=share)
                for choose, share in zip(self.choose, shares, strict=True)
            ],
        )
        self._dataset.resample_streams = functools.partial(
            StreamingDataset.resample_streams, cast(Any, self._dataset)
        )
        self._method = batching_method
        self.num_batches = sum(self.choose) // global_batch_size
        if batching_method != "random" and self.num_batches:
            # Each stream has its share of a batch, or batches of its own. Rows that do not fill a
            # whole batch are left out.
            self.num_batches = min(self.num_batches, len(self.lay_out(0)))

    def lay_out(self, epoch: int, first: int = 0) -> Ints:
        """Return the row ids of an epoch's batches from `first` on [batches, global batch size].

        There may be one more than the epoch has.
        """
        dataset, place = cast(Any, self._dataset), first * self.size
        try:
            order = generate_work(self._method, dataset, World(1, 1, 1, 0), epoch, place)
        except ArithmeticError as error:
            raise ValueError(one_line(error)) from None
        order = order.reshape(-1, self.size)
        return order[(order >= 0).all(axis=1)]

    def batches(
        self, epoch: int, first: int = 0, *, place: int = 0, places: int = 1
    ) -> Iterator[Ints]:
        """Yield the ids of the rows of an epoch's batches, from the batch `first` on.

        Of each batch these are every `places`-th row from `place` on: a rank's.
        """
        left = self.num_batches - first
        if left <= 0:
            return
        order = (
            self.lay_out(epoch, first)
            if self.folder is None
            else self._shared(epoch, first, self.folder)
        )
        for ids in order[:left]:
            yield np.array(ids[place::places])

    def _shared(self, epoch: int, first: int, folder: Path) -> Ints:
        """Return what `lay_out` does, from a file in `folder` that the first to ask makes."""
        path = folder / f"epoch-{epoch}-{first}"
        try:
            lock = os.open(folder / "epochs", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    # They stay mapped in the processes that read them; one that comes later lays
                    # out its epoch again.
                    for old in folder.glob("epoch-*"):
                        old.unlink()
                    self.lay_out(epoch, first).tofile(path)
                is_over = path.stat().st_size == 0  # an empty file cannot be mapped
                order = np.empty(0, np.int64) if is_over else np.memmap(path, np.int64, "r")
            finally:
                os.close(lock)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {one_line(error)}; set TMPDIR to a folder on a disk"
                " with space, and run the same command again"
            ) from None
        return order.reshape(-1, self.size)
