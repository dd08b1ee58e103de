"""The disk space that an order of rows takes on a machine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.config.data import DataConfig
from flame_composer.dataset.open import Dataset
from flame_composer.loader.layout import Order
from flame_composer.loader.machine import Machine
from flame_composer.loader.mixture import Mixture
from flame_composer.loader.order import Ints, Part, StreamOrder
from flame_composer.upstream.streaming import StreamingOrder

PREDOWNLOAD = 8  # batches of a rank, if train_data.predownload is not set
MOST_NOTED = 1 << 22  # rows of all ranks that are looked at ahead of those that are read


class Footprint(NamedTuple):
    """What the shards that a machine reads in the first epoch take, bytes."""

    in_use: int  # at most, at once
    read: int  # all of them


class CacheNeeds(NamedTuple):
    """What a machine needs to delete no shard in use: bytes, and the rows of all windows."""

    smallest: int  # a cache of this size suffices, with the datasets' indexes
    largest: int  # the largest shard
    window: int
    read: int  # what a machine reads in an epoch


def cache_needs(
    order: Order, sizes: Ints, config: DataConfig, machine: Machine, *, indexes: int
) -> CacheNeeds:
    """Return what a cache of shards of `sizes` bytes [shards] on `machine` needs.

    `indexes` is what the datasets' indexes take in it. Loader processes are assumed to be as far
    apart as they can be.
    """
    rank_batch = max(1, order.size // machine.places)
    ahead = math.ceil((config.predownload or PREDOWNLOAD * rank_batch) / rank_batch)
    apart = max(1, config.num_workers) * (ahead + config.prefetch_factor + 1)
    in_use, read = footprint(order, sizes, machine, apart=apart)
    largest = int(sizes.max())
    if isinstance(order, StreamingOrder):
        window = order.block_size
    else:
        window = sum(stream.window for stream in order.streams)
    return CacheNeeds(indexes + max(in_use, 4 * largest), largest, window, read)


def sizes_of(datasets: Iterable[Dataset]) -> Ints:
    """Return the bytes of each shard of the datasets, one dataset after the other [shards]."""
    return np.concatenate([each.files.bytes for each in datasets])


def index_bytes(datasets: Iterable[Dataset]) -> int:
    """Return what the datasets' indexes take in their folders, bytes."""
    return sum(
        Path(each.folder, name).stat().st_size
        for each in datasets
        for name in ("index.json", "manifest.json")
    )


def batches_of_a_window(order: Order) -> int:
    """Return the number of batches in which all rows of a shard come that is being read.

    It is less for a small stream with large shards, whose rows are further apart.
    """
    if isinstance(order, StreamingOrder):
        rows = float(order.block_size * order.nodes)
    else:
        rows = max(
            min(stream.window * stream.nodes, stream.num_rows) * order.rows_per_epoch / chosen
            for stream, chosen in zip(order.streams, order.choose, strict=True)
            if chosen
        )
    # A shard's rows are also shuffled within a sixteenth of the window at both its ends.
    return math.ceil(min(1.25 * rows, MOST_NOTED) / order.size) + 1


def footprint(order: Order, sizes: Ints, machine: Machine, *, apart: int) -> Footprint:
    """Return what the shards of `sizes` bytes [shards] take on a machine.

    A shard is in use from `apart` batches before its first row on, until its last one is read.
    """
    if isinstance(order, StreamingOrder):
        return _of_rows(order, sizes, machine, apart)
    return _of_windows(order, sizes, machine, apart)


def _of_rows(order: StreamingOrder, sizes: Ints, machine: Machine, apart: int) -> Footprint:
    """Lay out the epoch and see which shards each batch needs."""
    shards, batches = [], []
    for batch, ids in enumerate(order.batches(0)):
        places = [machine.place_of(rank) for rank in range(machine.ranks)]
        ours = np.concatenate([ids[place :: machine.places] for place in places])
        found = np.unique(np.searchsorted(order.first_rows, ours, side="right") - 1)
        shards.append(found)
        batches.append(np.full(len(found), batch))
    all_shards, all_batches = np.concatenate(shards), np.concatenate(batches)
    used = np.unique(all_shards)
    first, last = np.empty(len(sizes), np.int64), np.empty(len(sizes), np.int64)
    # Where a shard occurs more than once, the last value assigned stays
    first[all_shards[::-1]], last[all_shards] = all_batches[::-1], all_batches
    most = most_at_once(first[used] - apart, last[used] + 1, sizes[used])
    return Footprint(most, int(sizes[used].sum()))


def most_at_once(begins: NDArray, ends: NDArray, sizes: Ints) -> int:
    """Return the most bytes at once of what is there from its begin until before its end [N]."""
    times = np.concatenate([begins, ends])
    change = np.concatenate([sizes, -sizes])
    # At the same time, what ends goes first.
    order = np.lexsort((change, times))
    return int(change[order].cumsum().max(initial=0))


def _of_windows(order: Mixture, sizes: Ints, machine: Machine, apart: int) -> Footprint:
    """Work out from the shards' windows when each of them is needed."""
    # Which of the nodes that take turns have rows in this machine's places?
    turns = 1 if machine.ranks % machine.together else machine.num_machines
    step = math.gcd(order.nodes, turns, order.size)
    nodes = range(machine.number % step, order.nodes, step)
    in_use = read = first = 0
    for stream, chosen in zip(order.streams, order.choose, strict=True):
        own = sizes[first : first + len(stream.sizes)]
        first += len(stream.sizes)
        if not chosen:
            continue
        # So many rows of a node come in `apart` batches, if they are all of this stream per_stream.
        share = 1.0 if order.method == "per_stream" else chosen / order.rows_per_epoch
        lead = apart * order.size * share / order.nodes
        is_read, at_once = np.zeros(len(own), np.bool_), 0
        for node in nodes:
            begins, ends, shards = _spans(stream, node)
            if chosen > stream.num_rows:  # what comes again soon, in the same epoch, is kept
                far = batches_of_a_window(order) * lead / apart
                begins, ends, shards = _joined(begins, ends, shards, far)
            at_once += most_at_once(begins - lead, ends, own[shards])
            is_read[shards[begins < stream.first_of(node, chosen)]] = True
        in_use += min(at_once, int(own.sum()))
        read += int(own[is_read].sum())
    return Footprint(in_use, read)


def _spans(stream: StreamOrder, node: int) -> tuple[NDArray, NDArray, Ints]:
    """Return from which to before which of a node's rows a shard is needed, and the shard [N].

    This is for the first two passes over the stream.
    """
    found: list[tuple[NDArray, NDArray, Ints]] = []
    row = 0
    for _ in range(2):
        number, first, end = stream.pass_of(node, row)
        if end > first:
            begins, ends, firsts = part_spans(stream.part(number, node), shuffled=stream.shuffle)
            shards = np.searchsorted(stream.offsets, firsts, side="right") - 1
            found.append((begins + first, ends + first, shards))
        row = end
    begins, ends, shards = (np.concatenate(each) for each in zip(*found, strict=True))
    return begins, ends, shards


def _joined(
    begins: NDArray, ends: NDArray, shards: Ints, far: float
) -> tuple[NDArray, NDArray, Ints]:
    """Return the spans [N] with those of a shard made one that are less than `far` rows apart."""
    order = np.lexsort((begins, shards))
    begins, ends, shards = begins[order], ends[order], shards[order]
    is_new = np.ones(len(shards), np.bool_)
    is_new[1:] = (shards[1:] != shards[:-1]) | (begins[1:] - ends[:-1] >= far)
    last = np.append(np.flatnonzero(is_new)[1:], len(shards)) - 1
    return begins[is_new], ends[last], shards[is_new]


def part_spans(part: Part, *, shuffled: bool) -> tuple[NDArray, NDArray, Ints]:
    """Return from which to before which row of a part each piece is needed, and its first id [N].

    It is known to about a row for each shard that is in use.
    """
    if not shuffled:
        return part.before[:-1].astype(float), part.before[1:].astype(float), part.firsts
    # The rows of a group come evenly in its window: the number of rows before a place is a line
    # that changes its slope where a window begins or ends.
    slopes = np.diff(part.groups) / (part.stops - part.starts)
    places = np.concatenate([part.starts, part.stops])
    order = np.argsort(places, kind="stable")
    places = places[order]
    slope = np.concatenate([slopes, -slopes])[order].cumsum()
    rows = np.concatenate([[0.0], (np.diff(places) * slope[:-1]).cumsum()])
    # A bin is shuffled as a whole.
    begins = np.interp(part.starts // part.step * part.step, places, rows)
    ends = np.interp(-(-part.stops // part.step) * part.step, places, rows)
    group = np.searchsorted(part.groups, part.before[:-1], side="right") - 1
    return begins[group], ends[group], part.firsts
