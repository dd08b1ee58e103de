"""The global batches of an epoch, made of the endless orders of one or more streams.

Epoch e takes the rows e x choose to (e + 1) x choose of each stream's order: no row comes again
before all have come, whatever part of a stream an epoch takes. Nothing here grows with the number
of rows, and any batch can be the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from flame_composer.loader.order import Ints, Numbers, StreamOrder, key_of, permutation, read

BatchingMethod = Literal["random", "stratified", "per_stream"]
Take = Callable[[int], Ints]  # takes the next so many numbers of a sequence

BLOCK = 4096  # draws that are shuffled together


class Draws:
    """Which stream each of a sequence of draws is from, at random but evenly all along.

    The draws are cut into blocks of about `BLOCK`. How many of a stream's `counts` lie in the
    blocks before one is a formula; a block's own are shuffled. Without a key, all draws of a stream
    come before those of the next.
    """

    def __init__(self, counts: Ints, key: int | None):
        self.counts, self.key = counts, key
        self.num_blocks = max(1, -(-int(counts.sum()) // BLOCK))
        self._firsts = self.counts.cumsum() - self.counts
        self._phases = [key_of(key or 0, each) % self.num_blocks for each in range(len(counts))]

    def before(self, block: int) -> Ints:
        """Return how many draws of each stream lie in the blocks before `block` [streams]."""
        if self.key is None:
            return np.clip(block * BLOCK - self._firsts, 0, self.counts)
        return (block * self.counts + self._phases) // self.num_blocks

    def streams(self, block: int) -> Ints:
        """Return the stream of each draw in a block [N]."""
        counts = self.before(block + 1) - self.before(block)
        streams = np.repeat(np.arange(len(counts)), counts)
        if self.key is None or len(counts) == 1:
            return streams
        return streams[permutation(len(streams), key_of(self.key, len(counts), block))]

    def enter(self, draw: int) -> tuple[Ints, Numbers]:
        """Return how many draws of each stream come before `draw`, and the streams from it on."""
        low, high = 0, self.num_blocks
        while high - low > 1:
            middle = (low + high) // 2
            if self.before(middle).sum() <= draw:
                low = middle
            else:
                high = middle
        before, streams = self.before(low), self.streams(low)
        skipped = draw - int(before.sum())
        before = before + np.bincount(streams[:skipped], minlength=len(before))
        later = map(self.streams, range(low + 1, self.num_blocks))
        return before, Numbers(itertools.chain([streams[skipped:]], later))


class Turns:
    """Whose turn each place of an epoch is: the nodes take turns until they have no more rows."""

    def __init__(self, totals: Ints):
        """Divide the places among nodes that have `totals` [nodes] rows."""
        self.nodes = len(totals)
        even = int(totals.min())
        self.in_turn = even * self.nodes
        later = range(even, int(totals.max()))
        self._rest = np.concatenate(
            [np.empty(0, np.int64), *(np.flatnonzero(totals > turn) for turn in later)]
        )

    def nodes_of(self, start: int, stop: int) -> Ints:
        """Return the node of each place from `start` to before `stop` [N]."""
        places = np.arange(start, min(stop, self.in_turn))
        rest = self._rest[max(0, start - self.in_turn) : max(0, stop - self.in_turn)]
        return np.concatenate([places % self.nodes, rest])

    def before(self, place: int) -> list[int]:
        """Return how many of the places before `place` are each node's [nodes]."""
        rest = self._rest[: max(0, place - self.in_turn)]
        return [
            len(range(node, min(place, self.in_turn), self.nodes)) + int((rest == node).sum())
            for node in range(self.nodes)
        ]


class Mixture:
    """The global batches of every epoch."""

    def __init__(
        self,
        streams: Sequence[StreamOrder],
        choose: Sequence[int],
        *,
        global_batch_size: int,
        batching_method: BatchingMethod = "random",
        seed: int,
    ):
        """Make batches of `global_batch_size` rows, of which an epoch has `choose` of each stream.

        The streams have the same canonical nodes and are shuffled alike. A row's id is its number,
        were the streams one after the other.

        Raises ValueError if a stream has no row in a batch of its share (stratified), or no batch
        (per_stream).
        """
        self.streams, self.choose = streams, list(choose)
        self.size, self.seed = global_batch_size, seed
        self.nodes, self.shuffle = streams[0].nodes, streams[0].shuffle
        self.firsts = np.cumsum([0, *(stream.num_rows for stream in streams)]).tolist()
        self.shares = shares_of(self.choose, self.size) if batching_method == "stratified" else []
        if batching_method == "random":
            self.num_batches, self._made = sum(self.choose) // self.size, self._random
        elif batching_method == "stratified":
            pairs = zip(self.choose, self.shares, strict=True)
            self.num_batches, self._made = min(a // b for a, b in pairs), self._stratified
        else:
            self.num_batches = sum(chosen // self.size for chosen in self.choose)
            self._made = self._per_stream
            if min(self.choose) < self.size:
                raise ValueError(
                    f"stream {int(np.argmin(self.choose))} has {min(self.choose)} rows an epoch,"
                    f" fewer than a batch of {self.size}"
                )

    def batches(self, epoch: int, first: int = 0) -> Iterator[Ints]:
        """Yield the ids [global batch size] of the rows of an epoch's batches, from `first` on."""
        if first < self.num_batches:
            yield from self._made(epoch, first)

    def _key(self, *numbers: int) -> int | None:
        return key_of(self.seed, *numbers) if self.shuffle else None

    def _random(self, epoch: int, first: int) -> Iterator[Ints]:
        """Each row is drawn from a stream."""
        bounds = np.array(
            [
                [
                    [stream.first_of(node, each * choose) for each in (epoch, epoch + 1)]
                    for stream, choose in zip(self.streams, self.choose, strict=True)
                ]
                for node in range(self.nodes)
            ]
        )
        turns = Turns((bounds[:, :, 1] - bounds[:, :, 0]).sum(axis=1))
        rows = [
            self._rows_of(node, bounds[node], self._key(epoch, node), start)
            for node, start in enumerate(turns.before(first * self.size))
        ]
        for batch in range(first, self.num_batches):
            yield fill(turns.nodes_of(batch * self.size, (batch + 1) * self.size), rows)

    def _rows_of(self, node: int, bounds: Ints, key: int | None, start: int) -> Take:
        """Return what takes a node's rows of an epoch, of all streams, from row `start` on.

        `bounds` [streams, 2] are the node's rows with which the epoch begins and ends.
        """
        before, draws = Draws(bounds[:, 1] - bounds[:, 0], key).enter(start)
        cursors = [
            self._cursor(stream, node, first)
            for stream, first in enumerate((bounds[:, 0] + before).tolist())
        ]
        return lambda count: fill(draws.take(count), cursors)

    def _cursor(self, stream: int, node: int, start: int) -> Take:
        cursor, first = read(self.streams[stream], node, start), self.firsts[stream]
        return lambda count: cursor.take(count) + first

    def _stratified(self, epoch: int, first: int) -> Iterator[Ints]:
        """Each batch has its share of every stream."""
        starts = [
            epoch * choose + first * share
            for choose, share in zip(self.choose, self.shares, strict=True)
        ]
        rows = [self._in_turn(stream, start) for stream, start in enumerate(starts)]
        for batch in range(first, self.num_batches):
            parts = [take(share) for take, share in zip(rows, self.shares, strict=True)]
            ids, nodes = (np.concatenate(each) for each in zip(*parts, strict=True))
            yield self._at_places(ids, nodes, self._key(epoch, batch))

    def _per_stream(self, epoch: int, first: int) -> Iterator[Ints]:
        """Each batch is of one stream."""
        counts = np.array([choose // self.size for choose in self.choose])
        before, draws = Draws(counts, self._key(epoch)).enter(first)
        rows = [
            self._in_turn(stream, epoch * choose + start * self.size)
            for stream, (choose, start) in enumerate(zip(self.choose, before.tolist(), strict=True))
        ]
        for batch in range(first, self.num_batches):
            ids, nodes = rows[int(draws.take(1)[0])](self.size)
            yield self._at_places(ids, nodes, self._key(epoch, batch))

    def _in_turn(self, stream: int, start: int) -> Callable[[int], tuple[Ints, Ints]]:
        """Return what takes a stream's rows from `start` on: their ids, and their nodes."""
        cursors = [
            self._cursor(stream, node, self.streams[stream].first_of(node, start))
            for node in range(self.nodes)
        ]
        places = itertools.count(start)

        def take(count: int) -> tuple[Ints, Ints]:
            nodes = np.fromiter(itertools.islice(places, count), np.int64, count) % self.nodes
            return fill(nodes, cursors), nodes

        return take

    def _at_places(self, ids: Ints, nodes: Ints, key: int | None) -> Ints:
        """Return the rows of a batch, shuffled, those of each node at its places if there are any.

        A node's places are every nodes-th; its machines read no others as long as there are enough.
        """
        if key is not None:
            order = permutation(len(ids), key)
            ids, nodes = ids[order], nodes[order]
        if self.nodes == 1:
            return ids
        places = np.argsort(np.arange(len(ids)) % self.nodes, kind="stable")
        found = np.full(len(ids), -1)
        left = []
        for node in range(self.nodes):
            own, free = ids[nodes == node], places[places % self.nodes == node]
            found[free[: len(own)]] = own[: len(free)]
            left.append(own[len(free) :])
        found[found < 0] = np.concatenate(left)
        return found


def fill(kinds: Ints, takes: Sequence[Take]) -> Ints:
    """Return numbers of several sequences, of the one that `kinds` [N] says at each place [N]."""
    found = np.empty(len(kinds), np.int64)
    for kind, take in enumerate(takes):
        here = kinds == kind
        found[here] = take(int(here.sum()))
    return found


def shares_of(choose: Sequence[int], size: int) -> list[int]:
    """Return how many rows of each stream a batch of `size` rows has, by what an epoch has of them.

    What does not go into whole rows goes to those who lack the most.

    Raises ValueError if a stream gets none.
    """
    total = sum(choose)
    shares = [size * each // total for each in choose]
    lacking = sorted(range(len(choose)), key=lambda each: -(size * choose[each] % total))
    for each in lacking[: size - sum(shares)]:
        shares[each] += 1
    if 0 in shares:
        raise ValueError(
            f"stream {shares.index(0)} is too small a part of the data for a row in a batch of"
            f" {size}"
        )
    return shares
