"""The global batches of an epoch, made of the endless orders of one or more streams.

Epoch e has the rows e x choose to (e + 1) x choose of each stream's order: whatever part of a
stream an epoch takes, it goes on where the last one ended. The rows at an epoch's end that do not
fill a batch are left out. Nothing here grows with the number of rows, and any batch can be the
first.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flame_composer.loader.order import (
    BATCH,
    BLOCKS,
    DRAWS,
    PHASES,
    Ints,
    Numbers,
    StreamOrder,
    key_of,
    permutation,
    read,
)

BatchingMethod = Literal["random", "stratified", "per_stream"]
Take = Callable[[int], Ints]  # takes the next so many numbers of a sequence
Wanted = NDArray[np.bool_]  # which places of a batch are asked for

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
        self._firsts = counts.cumsum() - counts
        keys = [key_of(PHASES, key or 0, each) for each in range(len(counts))]
        self._phases = np.array([each % self.num_blocks for each in keys])

    def before(self, block: int) -> Ints:
        """Return how many draws of each stream lie in the blocks before `block` [streams]."""
        if self.key is None:
            return np.clip(block * BLOCK - self._firsts, 0, self.counts)
        # (block * counts + phases) // num_blocks, without the product of two large numbers
        whole, rest = np.divmod(self.counts, self.num_blocks)
        return block * whole + (block * rest + self._phases) // self.num_blocks

    def streams(self, block: int) -> Ints:
        """Return the stream of each draw in a block [N]."""
        counts = self.before(block + 1) - self.before(block)
        streams = np.repeat(np.arange(len(counts)), counts)
        if self.key is None or len(counts) == 1:
            return streams
        return streams[permutation(len(streams), key_of(BLOCKS, self.key, block))]

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
        turns = (min(place, self.in_turn) - np.arange(self.nodes) + self.nodes - 1) // self.nodes
        found: list[int] = (turns + np.bincount(rest, minlength=self.nodes)).tolist()
        return found


class Rows:
    """The ids of a sequence of rows, which is opened where rows are taken, and only then."""

    def __init__(self, enter: Callable[[int], Take], position: int):
        """Begin at `position`; `enter` returns what takes the rows from a position on."""
        self._enter, self._position = enter, position
        self._take: Take | None = None

    def skip(self, count: int) -> None:
        """Leave out the next `count` rows."""
        if count:
            self._position, self._take = self._position + count, None

    def take(self, count: int) -> Ints:
        """Return the ids of the next `count` rows [count]."""
        if self._take is None:
            self._take = self._enter(self._position)
        self._position += count
        return self._take(count)


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
        self.streams, self.choose = streams, [int(each) for each in choose]
        self.size, self.seed, self.method = global_batch_size, int(seed), batching_method
        self.nodes, self.shuffle = streams[0].nodes, streams[0].shuffle
        self.firsts = np.cumsum([0, *(stream.num_rows for stream in streams)]).tolist()
        self.rows_per_epoch = sum(self.choose)
        self.shares: list[int] = []
        if batching_method == "random":
            self.num_batches = self.rows_per_epoch // self.size
        elif batching_method == "stratified":
            self.shares = shares_of(self.choose, self.size, self.nodes)
            pairs = zip(self.choose, self.shares, strict=True)
            self.num_batches = min(chosen // share for chosen, share in pairs)
        else:
            self.num_batches = sum(chosen // self.size for chosen in self.choose)
            if min(self.choose) < self.size:
                raise ValueError(
                    f"stream {self.choose.index(min(self.choose))} has {min(self.choose)} rows an"
                    f" epoch, fewer than a batch of {self.size}"
                )

    def batches(
        self, epoch: int, first: int = 0, *, place: int = 0, places: int = 1
    ) -> Iterator[Ints]:
        """Yield the ids of the rows of an epoch's batches, from the batch `first` on.

        Of each batch these are every `places`-th row from `place` on: a rank's. What belongs to
        other canonical nodes is not laid out.
        """
        if first >= self.num_batches:
            return
        mine = np.zeros(self.size, np.bool_)
        mine[place::places] = True
        made = {
            "random": self._random,
            "stratified": self._stratified,
            "per_stream": self._per_stream,
        }
        for ids in made[self.method](epoch, first, mine):
            yield ids[mine]

    def _key(self, *numbers: int) -> int | None:
        return key_of(*numbers[:1], self.seed, *numbers[1:]) if self.shuffle else None

    def _random(self, epoch: int, first: int, mine: Wanted) -> Iterator[Ints]:
        """Each row is drawn from a stream."""
        # The rows of each stream with which the epoch begins and ends for each node
        edges = np.array([[epoch * each, (epoch + 1) * each] for each in self.choose])
        nodes = np.arange(self.nodes)[:, None, None]
        bounds = np.maximum(0, (edges - nodes + self.nodes - 1) // self.nodes)
        turns = Turns((bounds[:, :, 1] - bounds[:, :, 0]).sum(axis=1))
        starts = turns.before(first * self.size)
        rows = [
            Rows(
                functools.partial(self._of_node, node, bounds[node], self._key(DRAWS, epoch, node)),
                start,
            )
            for node, start in enumerate(starts)
        ]
        for batch in range(first, self.num_batches):
            nodes_of = turns.nodes_of(batch * self.size, (batch + 1) * self.size)
            yield fill(nodes_of, rows, mine)

    def _of_node(self, node: int, bounds: Ints, key: int | None, start: int) -> Take:
        """Return what takes a node's rows of an epoch, of all streams, from row `start` on.

        `bounds` [streams, 2] are the node's rows with which the epoch begins and ends.
        """
        before, draws = Draws(bounds[:, 1] - bounds[:, 0], key).enter(start)
        rows = [
            Rows(functools.partial(self._of_stream, stream, node), begin)
            for stream, begin in enumerate((bounds[:, 0] + before).tolist())
        ]
        return lambda count: fill(draws.take(count), rows)

    def _of_stream(self, stream: int, node: int, start: int) -> Take:
        """Return what takes a node's rows of a stream, from row `start` on."""
        rows, first = read(self.streams[stream], node, start), self.firsts[stream]
        return lambda count: rows.take(count) + first

    def _by_node(self, stream: int, start: int) -> list[Rows]:
        """Return the rows of a stream of each node, from row `start` of the stream on."""
        return [
            Rows(
                functools.partial(self._of_stream, stream, node),
                self.streams[stream].first_of(node, start),
            )
            for node in range(self.nodes)
        ]

    def _stratified(self, epoch: int, first: int, mine: Wanted) -> Iterator[Ints]:
        """Each batch has its share of every stream."""
        shares = np.array(self.shares)
        starts = epoch * np.array(self.choose) + first * shares
        rows = [
            each
            for stream, start in enumerate(starts.tolist())
            for each in self._by_node(stream, start)
        ]
        streams = np.repeat(np.arange(len(shares)), shares)
        within = np.arange(self.size) - np.repeat(shares.cumsum() - shares, shares)
        for batch in range(first, self.num_batches):
            nodes = (starts[streams] + within) % self.nodes
            yield self._arranged(streams, nodes, rows, self._key(BATCH, epoch, batch), mine)
            starts += shares

    def _per_stream(self, epoch: int, first: int, mine: Wanted) -> Iterator[Ints]:
        """Each batch is of one stream."""
        counts = np.array([choose // self.size for choose in self.choose])
        before, draws = Draws(counts, self._key(DRAWS, epoch)).enter(first)
        starts = epoch * np.array(self.choose) + before * self.size
        rows = [
            each
            for stream, start in enumerate(starts.tolist())
            for each in self._by_node(stream, start)
        ]
        for batch in range(first, self.num_batches):
            stream = int(draws.take(1)[0])
            nodes = (starts[stream] + np.arange(self.size)) % self.nodes
            streams = np.full(self.size, stream)
            yield self._arranged(streams, nodes, rows, self._key(BATCH, epoch, batch), mine)
            starts[stream] += self.size

    def _arranged(
        self, streams: Ints, nodes: Ints, rows: Sequence[Rows], key: int | None, mine: Wanted
    ) -> Ints:
        """Return the rows of a batch, shuffled, those of each node at its places if there are any.

        A node's places are every nodes-th; its machines read no others as long as there are enough.
        """
        order = np.arange(self.size) if key is None else permutation(self.size, key)
        if self.nodes > 1:
            places = np.argsort(np.arange(self.size) % self.nodes, kind="stable")
            by_node = order[np.argsort(nodes[order], kind="stable")]
            wanted = np.bincount(nodes, minlength=self.nodes)
            there = np.bincount(places % self.nodes, minlength=self.nodes)
            kept = np.minimum(wanted, there)
            rank = np.arange(self.size)
            is_at_home = _within(rank, wanted) < np.repeat(kept, wanted)
            is_taken = _within(rank, there) < np.repeat(kept, there)
            order = np.empty(self.size, np.int64)
            order[places[is_taken]] = by_node[is_at_home]
            order[places[~is_taken]] = by_node[~is_at_home]
        return fill((streams * self.nodes + nodes)[order], rows, mine)


def _within(rank: Ints, sizes: Ints) -> Ints:
    """Return each number's place in its group, of groups that follow one another."""
    return rank - np.repeat(sizes.cumsum() - sizes, sizes)


def fill(kinds: Ints, rows: Sequence[Rows], mine: Wanted | None = None) -> Ints:
    """Return ids of several sequences, of the one that `kinds` [N] says at each place [N].

    Of sequences that are at none of the places in `mine` [N], rows are left out, and are -1.
    """
    found = np.full(len(kinds), -1)
    for kind in np.unique(kinds).tolist():
        here = kinds == kind
        if mine is None or (here & mine).any():
            found[here] = rows[kind].take(int(here.sum()))
        else:
            rows[kind].skip(int(here.sum()))
    return found


def shares_of(choose: Sequence[int], size: int, nodes: int = 1) -> list[int]:
    """Return how many rows of each stream a batch of `size` rows has, by what an epoch has of them.

    What does not go into whole rows goes to those who lack the most. If it can be, every node has
    as many rows of a stream as the others.

    Raises ValueError if a stream gets none.
    """
    if nodes > 1 and size % nodes == 0:
        even = apportion(choose, size // nodes)
        if 0 not in even:
            return [each * nodes for each in even]
    shares = apportion(choose, size)
    if 0 in shares:
        raise ValueError(
            f"stream {shares.index(0)} is too small a part of the data for a row in a batch of"
            f" {size}"
        )
    return shares


def apportion(counts: Sequence[int], size: int) -> list[int]:
    """Divide `size` in proportion to `counts`, what is left over to those who lack the most."""
    total = max(1, sum(counts))
    shares = [size * each // total for each in counts]
    lacking = sorted(range(len(counts)), key=lambda each: -(size * counts[each] % total))
    for each in lacking[: size - sum(shares)]:
        shares[each] += 1
    return shares
