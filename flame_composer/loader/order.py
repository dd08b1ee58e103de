"""An order of rows that can be entered anywhere, at a cost that does not depend on their number.

A stream is read in passes, one after the other without end; each has every row once. A pass puts
the shards in an order of its own and divides their rows among the canonical nodes, each of which
gets a `Part`: pieces of shards, most of them whole. Small neighbours are put together to groups.
Every group is spread evenly over a window of `window` places around its own. How many of its rows
come before any place is then a formula, and so is how many rows of all groups do. The places are
cut into bins, sixteen a window. A bin can be laid out without those before it: the rows of each
group that fall into it are taken from the group's permutation, and shuffled together.

To open a pass takes time and memory by the number of shards, to find a row a binary search.

Random numbers are those of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators"), since an order must outlive numpy's versions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BINS = 16  # of a window
GROUP = 256  # rows at most, and a 64th of a window
SEQUENCE = 4096  # rows at a time that are not shuffled

# What a key is for, so that no two uses have the same random numbers
STREAM, SHARDS, PART, PHASES, ROWS, BIN, DRAWS, BLOCKS, BATCH = range(9)

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(*numbers: int) -> int:
    """Return a random number of 64 bits that belongs to these numbers, 0 or more.

    The first says what it is for, e.g. ROWS.
    """
    key = 0
    for number in numbers:
        key = (key ^ number) + _GOLDEN & _MASK
        key = (key ^ key >> 30) * _FACTORS[0] & _MASK
        key = (key ^ key >> 27) * _FACTORS[1] & _MASK
        key ^= key >> 31
    return key


def randoms(numbers: Ints, key: int) -> NDArray[np.uint64]:
    """Return a random number of 64 bits for each of `numbers` [N]."""
    made = numbers.astype(np.uint64)
    made *= np.uint64(_GOLDEN)
    made += np.uint64(key)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        made ^= made >> np.uint64(shift)
        made *= np.uint64(factor)
    made ^= made >> np.uint64(31)
    return made


def permutation(size: int, key: int) -> Ints:
    """Return the numbers below `size`, fewer than 2^32, in the random order of `key` [size]."""
    numbers = np.arange(size)
    bits = np.uint64(max(1, (size - 1).bit_length()))
    # Sorted with the numbers in the low bits: no two are equal, so that all ways to sort agree.
    mixed = randoms(numbers, key)
    mixed <<= bits
    mixed |= numbers.astype(np.uint64)
    mixed.sort()
    mixed &= (np.uint64(1) << bits) - np.uint64(1)
    return mixed.astype(np.int64)


class Permutations:
    """The permutations used last, of `most` rows together, or the last alone."""

    def __init__(self, most: int):
        self.most, self.rows = most, 0
        self._made: OrderedDict[int, NDArray[np.uint32]] = OrderedDict()

    def of(self, size: int, key: int) -> NDArray[np.uint32]:
        """Return the permutation of `size` numbers that belongs to `key` [size]."""
        found = self._made.get(key)
        if found is None:
            found = permutation(size, key).astype(np.uint32)
            self._made[key] = found
            self.rows += size
            while self.rows > self.most and len(self._made) > 1:
                self.rows -= len(self._made.popitem(last=False)[1])
        else:
            self._made.move_to_end(key)
        return found


@dataclass(frozen=True)
class Part:
    """A canonical node's part of a pass: pieces of shards, in order, and what spreads them.

    `firsts` are the ids of the pieces' first rows, `before` [pieces + 1] how many rows come before
    each piece, were they read one by one, and `groups` [groups + 1] the same for the groups.
    """

    firsts: Ints
    before: Ints
    groups: Ints
    step: int  # places in a bin
    # Where each group's window begins and ends, never before that of the group before
    starts: Ints
    stops: Ints
    phases: Ints  # below the windows' sizes: how much sooner than after its share of it a row comes
    key: int

    @property
    def size(self) -> int:
        """The number of rows, and of places."""
        return int(self.before[-1])

    @property
    def num_bins(self) -> int:
        """The number of bins, some of which may be empty."""
        return -(-self.size // self.step)

    def place_of(self, bin: int) -> int:
        """Return the place at which a bin begins; the bin after the last one is at the end."""
        return min(bin * self.step, self.size)

    def rows_before(self, bin: int) -> int:
        """Return the number of rows in the bins before `bin`."""
        place = self.place_of(bin)
        first, last = self.touched(place, place)
        return int(self.groups[first] + self.taken(slice(first, last), place).sum())

    def touched(self, begin: int, end: int) -> tuple[int, int]:
        """Return the first group whose window ends after `begin`, and the first from `end` on."""
        first = int(np.searchsorted(self.stops, begin, side="right"))
        return first, max(first, int(np.searchsorted(self.starts, end, side="left")))

    def taken(self, groups: slice, place: int) -> Ints:
        """Return the number of rows of each of the `groups` that come before `place`."""
        windows = self.stops[groups] - self.starts[groups]
        within = np.clip(place - self.starts[groups], 0, windows)
        counts = np.diff(self.groups[groups.start : groups.stop + 1])
        return (within * counts + self.phases[groups]) // windows

    def bin_of(self, row: int) -> int:
        """Return the bin that holds the row with this number, below `size`."""
        low, high = 0, self.num_bins
        while high - low > 1:
            middle = (low + high) // 2
            if self.rows_before(middle) <= row:
                low = middle
            else:
                high = middle
        return low

    def ids(self, rows: Ints, first: int = 0, last: int | None = None) -> Ints:
        """Return the ids of the rows [N] with these numbers, were all rows read one by one.

        They are in the pieces from `first` to before `last`.
        """
        pieces = first + np.searchsorted(self.before[first + 1 : last], rows, side="right")
        return self.firsts[pieces] + rows - self.before[pieces]


class StreamOrder:
    """The endless order of a stream's rows."""

    def __init__(
        self,
        rows_per_shard: Sequence[int] | Ints,
        *,
        seed: int,
        stream: int = 0,
        window: int,
        nodes: int = 1,
        shuffle: bool = True,
    ):
        """Order the rows of shards, which are numbered in the shards' order from 0 on.

        `window` is the number of rows over which a shard is spread, `nodes` that of the canonical
        nodes: row r of the order belongs to the node r mod `nodes`. The streams of a mixture are
        told apart by the number `stream`.
        """
        self.sizes: Ints = np.asarray(rows_per_shard, np.int64)
        self.offsets = np.concatenate(([0], self.sizes.cumsum()))
        self.num_rows = int(self.offsets[-1])
        if self.num_rows == 0:
            raise ValueError(f"stream {stream} has no rows")
        self.key = key_of(STREAM, int(seed), stream)
        # A shard that is larger than its window would come all at once.
        self.window = max(window, 4 * int(self.sizes.max()))
        self.nodes, self.shuffle = nodes, shuffle
        self._shards: tuple[int, Ints] | None = None  # of the pass opened last

    def first_of(self, node: int, row: int) -> int:
        """Return how many rows of a node come before row `row` of the order."""
        return max(0, -((node - row) // self.nodes))

    def interleaved(self, start: int, stop: int) -> Ints:
        """Return the ids of rows `start` to before `stop` of the order, of all nodes [N]."""
        found = np.empty(max(0, stop - start), np.int64)
        for node in range(self.nodes):
            here = found[(node - start) % self.nodes :: self.nodes]
            here[:] = read(self, node, self.first_of(node, start)).take(len(here))
        return found

    def pass_of(self, node: int, row: int) -> tuple[int, int, int]:
        """Return which pass a node's row is in, and where the node's part of it begins and ends."""
        number = (row * self.nodes + node) // self.num_rows
        first = self.first_of(node, number * self.num_rows)
        return number, first, self.first_of(node, (number + 1) * self.num_rows)

    def part(self, number: int, node: int) -> Part:
        """Return the node's part of pass `number`."""
        shards = self._shards_of(number)
        ends = self.sizes[shards].cumsum()
        # Row r of the order is the node's if r mod nodes is: how many rows of the pass are those of
        # the nodes before, and how many its own?
        first, last = number * self.num_rows, (number + 1) * self.num_rows
        each = np.arange(node + 1)
        sizes = (last - each + self.nodes - 1) // self.nodes
        sizes -= np.maximum(0, (first - each + self.nodes - 1) // self.nodes)
        stop = int(sizes.sum())
        start = stop - int(sizes[-1])
        # The pieces of shards that lie between the rows `start` and `stop` of the pass
        begin, end = np.searchsorted(ends, [start, stop], side="right").tolist()
        shards, ends = shards[begin : end + 1], ends[begin : end + 1]
        begins = ends - self.sizes[shards]
        lows = np.maximum(start - begins, 0)
        counts = np.minimum(ends, stop) - begins - lows
        shards, lows, counts = (each[counts > 0] for each in (shards, lows, counts))
        before = np.concatenate(([0], counts.cumsum()))
        key = key_of(PART, self.key, number, node)
        return Part(self.offsets[shards] + lows, before, *self._spread(before, key), key)

    def _spread(self, before: Ints, key: int) -> tuple[Ints, int, Ints, Ints, Ints]:
        """Return the groups of a part, its bins' size, the groups' windows and their phases."""
        size = int(before[-1])
        group = min(GROUP, max(1, self.window // 64))
        edges = np.flatnonzero(np.diff(before[:-1] // group, prepend=-1))
        groups = np.append(before[edges], size)
        counts = np.diff(groups)
        window = self.window if self.window < size else 2 * size  # no larger: mix everything
        starts = groups[:-1] + (counts - window) // 2
        stops = np.minimum(starts + window, size)
        starts = np.maximum(starts, 0)
        phases = randoms(np.arange(len(counts)), key_of(PHASES, key))
        phases %= (stops - starts).astype(np.uint64)
        step = max(1, min(window, size) // BINS)
        return groups, step, starts, stops, phases.astype(np.int64)

    def _shards_of(self, number: int) -> Ints:
        """Return the numbers of the shards in the order of a pass."""
        if not self.shuffle:
            return np.arange(len(self.sizes))
        if self._shards is None or self._shards[0] != number:
            key = key_of(SHARDS, self.key, number)
            self._shards = number, permutation(len(self.sizes), key)
        return self._shards[1]


class Numbers:
    """A sequence of numbers that come in arrays of any sizes, and are taken in others."""

    def __init__(self, arrays: Iterator[Ints]):
        self._arrays, self._left = arrays, np.empty(0, np.int64)

    def take(self, count: int) -> Ints:
        """Return the next `count` numbers [count]."""
        found = []
        while count > len(self._left):
            found.append(self._left)
            count -= len(self._left)
            self._left = next(self._arrays)
        found.append(self._left[:count])
        self._left = self._left[count:]
        return np.concatenate(found)


def read(stream: StreamOrder, node: int, start: int) -> Numbers:
    """Return the ids of a stream's rows that belong to a node, from its row `start` on."""
    return Numbers(_runs(stream, node, start))


def _runs(stream: StreamOrder, node: int, start: int) -> Iterator[Ints]:
    """Yield the ids of the rows from `start` on, some at a time."""
    while True:
        number, first, end = stream.pass_of(node, start)
        part = stream.part(number, node)
        if stream.shuffle:
            yield from _shuffled(part, start - first, 2 * stream.window)
        else:
            for begin in range(start - first, part.size, SEQUENCE):
                yield part.ids(np.arange(begin, min(begin + SEQUENCE, part.size)))
        start = end


def _shuffled(part: Part, start: int, window: int) -> Iterator[Ints]:
    """Yield the ids of a part's rows from `start` on, bin by bin."""
    permutations = Permutations(window)
    # The pieces of each group
    edges = np.searchsorted(part.before, part.groups)
    first = part.bin_of(start)
    skipped = start - part.rows_before(first)
    for bin in range(first, part.num_bins):
        begin, end = part.place_of(bin), part.place_of(bin + 1)
        low, high = part.touched(begin, end)
        ranges = (part.taken(slice(low, high), each).tolist() for each in (begin, end))
        found = [np.empty(0, np.int64)]
        for group, (taken, until) in enumerate(zip(*ranges, strict=True), low):
            if taken == until:
                continue
            base = int(part.groups[group])
            key = key_of(ROWS, part.key, group)
            rows = permutations.of(int(part.groups[group + 1]) - base, key)[taken:until]
            pieces = int(edges[group]), int(edges[group + 1])
            found.append(part.ids(rows.astype(np.int64) + base, *pieces))
        ids = np.concatenate(found)
        yield ids[permutation(len(ids), key_of(BIN, part.key, bin))][skipped:]
        skipped = 0
