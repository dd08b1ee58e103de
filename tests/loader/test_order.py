"""The order of rows: each once, entered anywhere, mixed well, at a cost that does not grow."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_composer.bench import orders
from flame_composer.loader import mixture, order
from flame_composer.loader.mixture import BatchingMethod, Draws, Mixture, Turns, shares_of
from flame_composer.loader.order import StreamOrder, key_of, permutation, randoms, read

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)
NODES = st.integers(1, 5)
WINDOWS = st.integers(1, 200)
METHODS: tuple[BatchingMethod, ...] = ("random", "stratified", "per_stream")


# Random numbers


def test_random_numbers_are_those_of_splitmix64() -> None:
    """The first numbers of the generator with the seed 1234567, from its authors' code."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert randoms(np.arange(1, 5), 1234567).tolist() == known
    state = 1234567
    for expected in known:  # key_of is the same step, with a number put in
        assert key_of(state) == expected
        state = state + 0x9E3779B97F4A7C15 & 2**64 - 1


@given(st.integers(0, 2000), st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once(size: int, key: int) -> None:
    assert sorted(permutation(size, key)) == list(range(size))


def test_permutations_are_uniform() -> None:
    """Of 24,000 permutations of four numbers each of the 24 comes about a thousand times."""
    found = Counter(tuple(permutation(4, key_of(7, n)).tolist()) for n in range(24_000))
    assert len(found) == 24
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 50  # 23 degrees of freedom


def test_an_order_outlives_versions() -> None:
    """These bytes must never change: runs are continued by them."""
    streams = [
        StreamOrder([5, 0, 9, 4], seed=17, stream=0, window=8, nodes=2),
        StreamOrder([6, 7], seed=17, stream=1, window=8, nodes=2),
    ]
    made = Mixture(streams, [18, 9], global_batch_size=9, seed=17)
    assert [batch.tolist() for batch in made.batches(1)] == [
        [9, 1, 29, 22, 16, 21, 7, 12, 24],
        [27, 14, 4, 22, 3, 6, 13, 17, 2],
        [8, 11, 5, 0, 15, 26, 18, 10, 29],
    ]


# One stream


@given(SIZES, NODES, WINDOWS, st.booleans(), st.data())
def test_a_pass_has_every_row_once_and_can_be_entered_anywhere(
    sizes: list[int], nodes: int, window: int, shuffle: bool, data: st.DataObject
) -> None:
    def make() -> StreamOrder:
        return StreamOrder(sizes, seed=1, window=window, nodes=nodes, shuffle=shuffle)

    total = sum(sizes)
    rows = make().interleaved(0, 3 * total)
    for number in range(3):
        assert sorted(rows[number * total : (number + 1) * total]) == list(range(total))
    start = data.draw(st.integers(0, 3 * total))
    stop = data.draw(st.integers(start, 3 * total))
    assert make().interleaved(start, stop).tolist() == rows[start:stop].tolist()
    node = data.draw(st.integers(0, nodes - 1))
    own = rows[node::nodes].tolist()
    first = data.draw(st.integers(0, len(own)))
    assert read(make(), node, first).take(len(own) - first).tolist() == own[first:]


@given(SIZES, st.integers(1, 50))
def test_without_shuffling_rows_come_as_they_are(sizes: list[int], window: int) -> None:
    made = StreamOrder(sizes, seed=1, window=window, shuffle=False)
    assert made.interleaved(0, 2 * sum(sizes)).tolist() == 2 * list(range(sum(sizes)))


def test_nodes_share_no_shard_but_those_at_their_borders() -> None:
    made = StreamOrder([50] * 40, seed=1, window=100, nodes=4)
    shards = [set(read(made, node, 0).take(500) // 50) for node in range(4)]
    assert all(len(own) in (10, 11) for own in shards)
    for one, other in itertools.combinations(shards, 2):
        assert len(one & other) <= 1


def test_passes_differ_and_so_do_seeds_and_streams() -> None:
    orders = [
        StreamOrder([9] * 9, seed=seed, stream=stream, window=20).interleaved(0, 162)
        for seed, stream in ((1, 0), (2, 0), (1, 1))
    ]
    passes = [tuple(rows[start : start + 81]) for rows in orders for start in (0, 81)]
    assert len(set(passes)) == len(passes)


@pytest.mark.parametrize("window", [1000, 4096, 1 << 18])
def test_a_shard_stays_within_its_window(window: int) -> None:
    """Its rows lie within `window` places; if that is more than there are, anywhere."""
    made = StreamOrder([250] * 80, seed=1, window=window)
    rows, spans = made.interleaved(0, 20_000), []
    for shard in range(80):
        spans.append(int(np.ptp(np.flatnonzero(rows // 250 == shard))))
    # Places are denser at the ends, by a fifth at most, a bin at either end is shuffled, and a
    # group has the rows of two of these shards.
    assert max(spans) <= min(20_000, 1.2 * window * (1 + 2 / order.BINS) + 500)
    assert np.median(spans) >= 0.8 * min(20_000, window)


@pytest.mark.parametrize("sizes", [[1] * 3000, [10, 200, 50] * 40, [5000, *[10] * 300, 700]])
def test_shards_of_all_sizes_are_spread(sizes: list[int]) -> None:
    """However small the window is that is asked for, neighbours do not stay together."""
    made = StreamOrder(sizes, seed=1, window=64)
    rows = made.interleaved(0, made.num_rows)
    assert sorted(rows) == list(range(made.num_rows))
    assert (np.diff(rows) == 1).mean() < 0.05
    # No shard has more than half of any hundred rows, unless it has most of all rows.
    shards = np.searchsorted(made.offsets, rows, side="right")
    most = max(np.bincount(shards[at : at + 100]).max() for at in range(0, len(rows) - 100, 100))
    assert most <= max(50, 130 * max(sizes) / sum(sizes))


def test_a_stream_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="stream 2 has no rows"):
        StreamOrder([0, 0], seed=1, stream=2, window=8)


# How well rows are mixed


def test_rows_are_mixed_as_well_as_by_py1e() -> None:
    """Of the same block: as evenly, with as few shards open, and with as few new ones a batch."""
    found = orders.compare_mixing()
    ours, theirs = found["spread"], found["py1e"]
    assert ours.evenness <= theirs.evenness + 0.05, found
    assert ours.most_open <= theirs.most_open + 2, found
    assert ours.most_new <= theirs.most_new, found


def test_neighbours_are_apart() -> None:
    """Rows that follow one another in a shard hardly ever do so in the order."""
    rows = StreamOrder([1000] * 50, seed=1, window=10_000).interleaved(0, 50_000)
    assert (np.diff(rows) == 1).mean() < 0.002


# Several streams


@st.composite
def mixtures(draw: st.DrawFn) -> Any:
    """What makes the same mixture again, and the rows of each of its streams."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=4))
    totals = [sum(each) for each in sizes]
    is_whole = draw(st.booleans())
    choose = [total if is_whole else draw(st.integers(1, 2 * total)) for total in totals]
    nodes, window, shuffle = draw(NODES), draw(WINDOWS), draw(st.booleans())
    batch, method = draw(st.integers(1, 12)), draw(st.sampled_from(METHODS))

    def make() -> Mixture:
        streams = [
            StreamOrder(each, seed=5, stream=n, window=window, nodes=nodes, shuffle=shuffle)
            for n, each in enumerate(sizes)
        ]
        return Mixture(streams, choose, global_batch_size=batch, batching_method=method, seed=5)

    return make, totals, choose, method


@settings(max_examples=100)
@given(mixtures(), st.sampled_from([1, 3, 4096]), st.data())
def test_epochs_have_what_they_choose(made: Any, block: int, data: st.DataObject) -> None:
    """Any batch can be the first; an epoch has no row twice before the stream's all have come."""
    make, totals, choose, method = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "BLOCK", block)
        try:
            epochs = make()
        except ValueError:
            assert method != "random"
            return
        counts: Counter[int] = Counter()
        for epoch in range(3):
            batches = list(epochs.batches(epoch))
            assert [batch.shape for batch in batches] == [(epochs.size,)] * epochs.num_batches
            if batches:
                first = data.draw(st.integers(0, len(batches) - 1))
                again = make().batches(epoch, first)
                assert [b.tolist() for b in again] == [b.tolist() for b in batches[first:]]
            rows = Counter(np.concatenate([*batches, np.empty(0, np.int64)]).tolist())
            own = [
                sum(rows[id] for id in range(start, end))
                for start, end in itertools.pairwise(epochs.firsts)
            ]
            assert all(number <= chosen for number, chosen in zip(own, choose, strict=True))
            if method == "random":
                assert sum(own) == sum(choose) // epochs.size * epochs.size
            if method == "per_stream":
                assert own == [chosen // epochs.size * epochs.size for chosen in choose]
            if method == "stratified":
                assert own == [share * len(batches) for share in epochs.shares]
            for id, count in rows.items():
                stream = np.searchsorted(epochs.firsts, id, side="right") - 1
                assert count <= math.ceil(choose[stream] / totals[stream]) + 1
            counts += rows
        assert list(epochs.batches(0, epochs.num_batches)) == []


@pytest.mark.parametrize("nodes", [1, 3])
def test_ten_epochs_count_every_row_as_expected(nodes: int) -> None:
    """Floor or ceil of its expectation, whatever part of a stream an epoch takes."""
    sizes, choose = [[7, 9, 4], [30], [11, 2]], [6, 70, 13]
    streams = [
        StreamOrder(each, seed=2, stream=n, window=9, nodes=nodes) for n, each in enumerate(sizes)
    ]
    made = Mixture(streams, choose, global_batch_size=1, seed=2)
    rows = Counter(int(batch[0]) for epoch in range(10) for batch in made.batches(epoch))
    for stream, (start, end) in enumerate(itertools.pairwise(made.firsts)):
        expected = 10 * choose[stream] / (end - start)
        found = {rows[id] for id in range(start, end)}
        assert found <= {math.floor(expected), math.ceil(expected)}, (stream, expected)


@settings(max_examples=50)
@given(mixtures(), st.sampled_from([(1, 1), (2, 3), (1, 64), (16, 4)]), st.integers(1, 5))
def test_ranks_and_workers_divide_batches(
    made: Any, devices: tuple[int, int], workers: int
) -> None:
    """Whatever their number, together they read the same global batches."""
    make, *_ = made
    machines, ranks = devices
    try:
        batches = list(make().batches(0))
    except ValueError:
        return
    places = machines * ranks
    for place in {0, places // 2, places - 1}:
        own = [batch[place::places].tolist() for batch in batches]
        assert [b.tolist() for b in make().batches(0, place=place, places=places)] == own
        for worker in range(min(workers, len(batches))):
            later = make().batches(0, worker, place=place, places=places)
            assert [b.tolist() for b in later][::workers] == own[worker::workers]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choose", [[2000, 2000], [1500, 500]])
def test_a_machine_reads_the_rows_of_its_node(method: BatchingMethod, choose: list[int]) -> None:
    """With as many canonical nodes as machines, and it lays out no others."""
    streams = [StreamOrder([50] * 40, seed=1, stream=n, window=100, nodes=4) for n in range(2)]
    made = Mixture(streams, choose, global_batch_size=80, batching_method=method, seed=1)
    own = []
    for machine in range(4):
        laid_out: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                mixture, "read", lambda *given, to=laid_out: to.append(given[1]) or read(*given)
            )
            batches = list(made.batches(0, place=machine, places=4))
        assert set(laid_out) == {machine}
        own.append(set((np.concatenate(batches) // 50).tolist()))
    for one, other in itertools.combinations(own, 2):
        assert len(one & other) <= 2  # a shard at the border, of each stream
    if choose == [2000, 2000]:
        assert set.union(*own) == set(range(80))


@pytest.mark.parametrize("nodes", [3, 65536])
def test_any_number_of_nodes(nodes: int) -> None:
    """Even more than there are rows; and those of others cost nothing."""
    made = Mixture(
        [StreamOrder([500] * 90, seed=1, window=4000, nodes=nodes)],
        [45_000],
        global_batch_size=1000,
        seed=1,
    )
    begin = time.process_time()
    batches = list(made.batches(7, 40, place=1, places=500))
    assert [len(batch) for batch in batches] == [2] * 5
    assert time.process_time() - begin < 20


def test_large_epochs() -> None:
    """A million million draws, of which no product is taken that does not fit into 64 bits."""
    draws = Draws(np.array([4 * 10**11, 10**6]), 5)
    before, taken = draws.enter(2 * 10**11)
    assert before.sum() == 2 * 10**11
    assert abs(before[1] - 500_000) <= 1
    assert taken.take(10_000).sum() <= 2


def test_streams_come_evenly() -> None:
    """All along an epoch, in each thousand draws as many of a stream as its share, nearly."""
    draws = Draws(np.array([90_000, 9_000, 1_000]), 3)
    before, taken = draws.enter(0)
    assert before.tolist() == [0, 0, 0]
    found = taken.take(100_000)
    for start in range(0, 100_000, 1000):
        counts = np.bincount(found[start : start + 1000], minlength=3)
        assert np.abs(counts - [900, 90, 10]).max() < 60
    assert (np.diff(found) != 0).mean() > 0.15  # they alternate: 1 - (0.9^2 + 0.09^2 + 0.01^2)


def test_turns_end_with_those_who_have_more() -> None:
    turns = Turns(np.array([3, 2, 4]))
    assert turns.nodes_of(0, 9).tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 2]
    for place in range(10):
        found = turns.nodes_of(0, place)
        assert turns.before(place) == np.bincount(found, minlength=3).tolist()
        assert turns.nodes_of(place, 9).tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 2][place:]


@pytest.mark.parametrize(
    ("choose", "size", "shares"),
    [
        ([1, 1], 4, [2, 2]),
        ([1, 2], 4, [1, 3]),
        ([5, 3, 2], 10, [5, 3, 2]),
        ([1, 1, 1], 4, [2, 1, 1]),
    ],
)
def test_shares(choose: list[int], size: int, shares: list[int]) -> None:
    assert shares_of(choose, size) == shares


def test_what_gets_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="stream 1 is too small a part of the data"):
        shares_of([1000, 1], 4)
    streams = [StreamOrder([size], seed=1, stream=n, window=4) for n, size in enumerate((8, 3))]
    with pytest.raises(ValueError, match="stream 1 has 3 rows an epoch, fewer than a batch of 4"):
        Mixture(streams, [8, 3], global_batch_size=4, batching_method="per_stream", seed=1)


# Cost

FAR = """
import json, resource, sys, time
import numpy as np
from flame_composer.loader.mixture import Mixture
from flame_composer.loader.order import StreamOrder

shards = int(sys.argv[1])
made = StreamOrder(np.full(2, 16_222), seed=1, window=1 << 18)  # what numpy sets up once
next(Mixture([made], [made.num_rows], global_batch_size=8, seed=1).batches(0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.process_time()
made = StreamOrder(np.full(shards, 16_222), seed=1, window=1 << 18)
mixed = Mixture([made], [made.num_rows], global_batch_size=1024, seed=1)
batch = next(mixed.batches(0, int(sys.argv[2]) * mixed.num_batches // 100))
seconds = time.process_time() - begin
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
assert len(set(batch.tolist())) == 1024
"""


def test_seven_thousand_million_rows_are_entered_at_once() -> None:
    """15 trillion tokens in rows of 2048: 450,000 shards; what takes memory is the shards."""
    kilobytes = [
        int(subprocess.check_output([sys.executable, "-c", FAR, "450000", at]).split(b",")[1][:-2])
        for at in ("0", "99")
    ]
    assert max(kilobytes) < 100_000


def test_what_orders_cost_is_measured_and_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(orders, "NUMBERS", (100_000, 1_000_000))
    monkeypatch.setattr(orders, "MOST_LAID_OUT", 100_000)
    orders.measure_orders(str(tmp_path / "orders.png"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert [line[-3] for line in lines[1:6]] == ["100,000", "1,000,000"] * 2 + ["100,000"]
    assert [line[0] for line in lines[7:]] == ["spread", "py1e"]
    assert (tmp_path / "orders.png").read_bytes().startswith(b"\x89PNG")
