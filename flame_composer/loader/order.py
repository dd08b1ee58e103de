"""An order of rows that can be entered anywhere, at a cost that does not depend on their number.

A stream is read in passes, one after the other without end; each has every row once. A pass puts
the shards in an order of its own and divides their rows among the canonical nodes, each of which
gets a `Part`: rows that follow one another, most of them of whole shards. Every shard of a part is
spread evenly over a window of `window` places around its own. How many of its rows come before any
place is then a formula, and so is how many rows of all shards do. The places are cut into bins,
sixteen a window. A bin can be laid out without those before it: the rows of each shard that fall
into it are taken from the shard's permutation, and shuffled together.

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
SEQUENCE = 4096  # rows at a time that are not shuffled

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(*numbers: int) -> int:
    """Return a random number of 64 bits that belongs to these numbers, which are 0 or more."""
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
    """The permutations of the shards used last, of `most` rows together, or of one shard."""

    def __init__(self, most: int):
        self.most, self.rows = most, 0
        self._made: OrderedDict[int, NDArray[np.uint32]] = OrderedDict()

    def of(self, size: int, key: int) -> NDArray[np.uint32]:
        """Return the permutation of a shard of `size` rows that belongs to `key` [size]."""
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
    """A canonical node's part of a pass: pieces of shards, in order, each within one shard.

    `shards` are their numbers, `lows` the places in the shards' permutations at which they begin,
    and `before` [pieces + 1] how many rows come before each of them, were they read one by one.
    """

    shards: Ints
    lows: Ints
    before: Ints
    step: int  # places in a bin
    # Where each piece's window begins and ends, never before that of the piece before
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
        return int(self.before[first] + self.taken(slice(first, last), place).sum())

    def touched(self, begin: int, end: int) -> tuple[int, int]:
        """Return the first piece whose window ends after `begin`, and the first from `end` on."""
        first = int(np.searchsorted(self.stops, begin, side="right"))
        return first, max(first, int(np.searchsorted(self.starts, end, side="left")))

    def taken(self, pieces: slice, place: int) -> Ints:
        """Return the number of rows of each of the `pieces` that come before `place`."""
        windows = self.stops[pieces] - self.starts[pieces]
        within = np.clip(place - self.starts[pieces], 0, windows)
        counts = np.diff(self.before[pieces.start : pieces.stop + 1])
        return (within * counts + self.phases[pieces]) // windows

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
        self.key = key_of(seed, stream)
        self.window, self.nodes, self.shuffle = window, nodes, shuffle
        self._shards: tuple[int, Ints] | None = None  # of the pass opened last

    def first_of(self, node: int, row: int) -> int:
        """Return how many rows of a node come before row `row` of the order."""
        return max(0, -((node - row) // self.nodes))

    def interleaved(self, start: int, stop: int) -> Ints:
        """Return the ids of rows `start` to before `stop` of the order, of all nodes [N]."""
        found = np.empty(max(0, stop - start), np.int64)
        for node in range(self.nodes):
            first, end = self.first_of(node, start), self.first_of(node, stop)
            found[(node - start) % self.nodes :: self.nodes] = read(self, node, first).take(
                end - first
            )
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
        first, last = number * self.num_rows, (number + 1) * self.num_rows
        sizes = [self.first_of(each, last) - self.first_of(each, first) for each in range(node + 1)]
        stop = sum(sizes)
        start = stop - sizes[-1]
        # The pieces of shards that lie between the rows `start` and `stop` of the pass
        begin, end = np.searchsorted(ends, [start, stop], side="right").tolist()
        shards, ends = shards[begin : end + 1], ends[begin : end + 1]
        begins = ends - self.sizes[shards]
        lows = np.maximum(start - begins, 0)
        counts = np.minimum(ends, stop) - begins - lows
        shards, lows, counts = (each[counts > 0] for each in (shards, lows, counts))
        before = np.concatenate(([0], counts.cumsum()))
        size = int(before[-1])
        window = self.window if self.window < size else 2 * size  # no larger: mix everything
        starts = before[:-1] + (counts - window) // 2
        stops = np.minimum(starts + window, size)
        starts = np.maximum(starts, 0)
        key = key_of(self.key, number, node)
        phases = randoms(shards, key) % (stops - starts).astype(np.uint64)
        step = max(1, min(window, size) // BINS)
        return Part(shards, lows, before, step, starts, stops, phases.astype(np.int64), key)

    def _shards_of(self, number: int) -> Ints:
        """Return the numbers of the shards in the order of a pass."""
        if not self.shuffle:
            return np.arange(len(self.sizes))
        if self._shards is None or self._shards[0] != number:
            self._shards = number, permutation(len(self.sizes), key_of(self.key, number))
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
    permutations = Permutations(2 * stream.window)
    while True:
        number, first, end = stream.pass_of(node, start)
        part = stream.part(number, node)
        if stream.shuffle:
            yield from _shuffled(stream, number, part, start - first, permutations)
        else:
            yield from _in_sequence(stream, part, start - first)
        start = end


def _shuffled(
    stream: StreamOrder, number: int, part: Part, start: int, permutations: Permutations
) -> Iterator[Ints]:
    """Yield the ids of a part's rows from `start` on, bin by bin."""
    first = part.bin_of(start)
    skipped = start - part.rows_before(first)
    for bin in range(first, part.num_bins):
        begin, end = part.place_of(bin), part.place_of(bin + 1)
        pieces = slice(*part.touched(begin, end))
        lows, highs = (part.lows[pieces] + part.taken(pieces, each) for each in (begin, end))
        used = np.flatnonzero(highs > lows)
        columns = (part.shards[pieces], lows, highs)
        found = [np.empty(0, np.int64)]
        for shard, low, high in zip(*(each[used].tolist() for each in columns), strict=True):
            size, key = int(stream.sizes[shard]), key_of(stream.key, number, 0, shard)
            found.append(permutations.of(size, key)[low:high] + stream.offsets[shard])
        ids = np.concatenate(found)
        yield ids[permutation(len(ids), key_of(part.key, bin))][skipped:]
        skipped = 0


def _in_sequence(stream: StreamOrder, part: Part, start: int) -> Iterator[Ints]:
    """Yield the ids of a part's rows from `start` on, one shard after the other."""
    for begin in range(start, part.size, SEQUENCE):
        rows = np.arange(begin, min(begin + SEQUENCE, part.size))
        piece = np.searchsorted(part.before, rows, side="right") - 1
        yield stream.offsets[part.shards[piece]] + part.lows[piece] + rows - part.before[piece]
